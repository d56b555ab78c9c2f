"""What happens around every call: who calls, may they, and how errors leave the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import grpc

from membank.bank_service.rpc.admission import admit, leaving
from membank.bank_service.rpc.auth import (
    METHOD_ROLES,
    Authenticator,
    Principal,
    current_principal,
)
from membank.wire.errors import DeadlineError, InternalError, MembankError, to_status

if TYPE_CHECKING:
    # Generic in its stubs alone. One interceptor serves methods of all message types.
    _Handler = grpc.RpcMethodHandler[Any, Any]

_Behavior = Callable[[object, grpc.ServicerContext], object]
_StreamBehavior = Callable[[object, grpc.ServicerContext], Iterator[object]]

_HEALTH_PREFIX = "/grpc.health.v1.Health/"


class CallInterceptor(grpc.ServerInterceptor):
    """Authenticates calls, checks roles and turns errors into statuses, as `admission` says.

    Parameters
    ----------
    authenticator
        Tells who calls.
    """

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], _Handler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        # docstring inherited
        handler = continuation(handler_call_details)
        method = handler_call_details.method
        # Probes of load balancers carry no token, and health tells nothing about the bank.
        if handler is None or method.startswith(_HEALTH_PREFIX):
            return handler
        return self._guard(handler, method)

    def _guard(self, handler: _Handler, method: str) -> _Handler:
        # Of the four attributes of a handler, one holds its behaviour.
        single = handler.unary_unary or handler.stream_unary
        stream = handler.unary_stream or handler.stream_stream
        if single is not None:
            guarded: object = self._single(cast("_Behavior", single), method)
        else:
            guarded = self._stream(cast("_StreamBehavior", stream), method)
        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(
            cast("Any", guarded),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _single(self, behavior: _Behavior, method: str) -> _Behavior:
        def guarded(request: object, context: grpc.ServicerContext) -> object:
            with self._call(method, context) as principal:
                token = current_principal.set(principal)
                try:
                    return behavior(request, context)
                finally:
                    current_principal.reset(token)

        return guarded

    def _stream(self, behavior: _StreamBehavior, method: str) -> _StreamBehavior:
        # No principal here: a generator may be finished on another thread than it began on.
        def guarded(request: object, context: grpc.ServicerContext) -> Iterator[object]:
            with self._call(method, context):
                yield from behavior(request, context)

        return guarded

    @contextmanager
    def _call(self, method: str, context: grpc.ServicerContext) -> Iterator[Principal]:
        try:
            yield admit(self._authenticator, context.invocation_metadata(), method)
        except grpc.RpcError:
            # The request stream broke: the caller is gone, and so is whoever would read a status.
            context.abort(grpc.StatusCode.CANCELLED, "the request stream ended early")
        except Exception as err:
            is_known = isinstance(err, MembankError) and not isinstance(err, InternalError)
            if not is_known and not _is_ours(method):
                raise
            context.abort_with_status(to_status(leaving(err, method)))


def check_alive(context: grpc.ServicerContext) -> None:
    """Raise unless somebody still waits for the answer.

    Raises
    ------
    DeadlineError
        If the call was cancelled or its deadline passed.
    """
    if not context.is_active():
        raise DeadlineError("the caller cancelled or its deadline passed; nothing was done")


def _is_ours(method: str) -> bool:
    # grpc's own services (reflection) abort by raising a bare Exception.
    return method in METHOD_ROLES
