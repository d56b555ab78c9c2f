"""The status that a service gave to a call, where gRPC would lose it."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, TypeVar

import grpc
import grpc.aio

T = TypeVar("T")


_NOT_A_STATUS = "Internal error from Core"


class ServedStatus:
    """Remembers the status that the service gave to a call.

    A service may refuse a call while its data is still being sent. grpc.aio then sets two statuses,
    in either order, and reports the later one: that of the service, and its own "Internal error from
    Core" for the message that could not be sent any more. Seen in 2 of 60 refused pushes of 6 MB
    (grpcio 1.85); the caller could not know whether to come again.

    Parameters
    ----------
    call
        A call that was just made.
    """

    def __init__(self, call: grpc.aio.Call) -> None:
        self._call = call
        self._error: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._note)

    def error_or(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Return the service's status as an error, or `error` where it gave none."""
        return self._error or error

    def _note(self, _: object) -> None:
        code, details = _result(self._call.code()), _result(self._call.details())
        if code is not grpc.StatusCode.OK and details != _NOT_A_STATUS:
            trailing = grpc.aio.Metadata(*_result(self._call.trailing_metadata()))
            self._error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details)


def _result(coroutine: Coroutine[Any, Any, T]) -> T:
    # Of a call that is done: there is nothing to wait for, and waiting would be too late.
    try:
        coroutine.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise AssertionError("a call that is done has its status")
