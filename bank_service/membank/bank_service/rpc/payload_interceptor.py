"""Lets the payloads of the two data streams past the generated code."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import grpc

from membank.bank_service.rpc.auth import BLOCK_SERVICE
from membank.bank_service.rpc.pushing import PUSH_DATA

if TYPE_CHECKING:
    # Generic in its stubs alone. One interceptor serves methods of all message types.
    _Handler = grpc.RpcMethodHandler[Any, Any]


class PayloadInterceptor(grpc.ServerInterceptor):
    """Sends answers of `FetchBlocks` as they are, and reads requests of `PushUpdates` by `DataCodec`.

    So the handler of the former yields messages that are serialized already, and that of the latter
    gets views of the data of messages that hold nothing else.
    """

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        # docstring inherited
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        if handler_call_details.method == f"{BLOCK_SERVICE}FetchBlocks":
            return grpc.unary_stream_rpc_method_handler(
                cast("Any", handler.unary_stream),
                request_deserializer=handler.request_deserializer,
                response_serializer=bytes,
            )
        if handler_call_details.method == f"{BLOCK_SERVICE}PushUpdates":
            return grpc.stream_unary_rpc_method_handler(
                cast("Any", handler.stream_unary),
                request_deserializer=PUSH_DATA.deserialize,
                response_serializer=handler.response_serializer,
            )
        return handler
