"""Calls of gRPC over a connection of our own: what is asked, who may, and what is answered."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from urllib.parse import quote

import grpc
from google.protobuf.message import DecodeError

from membank.bank_service.rpc.admission import admit, leaving
from membank.bank_service.rpc.auth import BLOCK_SERVICE, Authenticator
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.direct.http2 import ServerEnd
from membank.bank_service.rpc.fetching import answer_messages, fetched
from membank.bank_service.rpc.pushing import PUSH_DATA, StreamedGradients, reserved
from membank.bank_service.shard.contract import ShardApi
from membank.v1 import block_service_pb2 as pb
from membank.wire.alternative import MISDIRECTED, SERVER_KEY
from membank.wire.buffers import BufferPool
from membank.wire.errors import (
    DeadlineError,
    InvalidArgumentError,
    MembankError,
    to_status_proto,
)
from membank.wire.http2.frames import ProtocolError, StreamResetError
from membank.wire.http2.headers import encode_headers
from membank.wire.http2.messages import framed, next_message, read_whole, receive
from membank.wire.http2.pieces import Piece

LONGEST_CALL_S = 600.0
"""Time of calls that set themselves none, or more: so nobody holds memory for ever."""

_LARGE_BYTES = 256 << 10
_FETCH = BLOCK_SERVICE + "FetchBlocks"
_PUSH = BLOCK_SERVICE + "PushUpdates"
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_CONTENT = ("content-type", "application/grpc")
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

_HEAD = encode_headers([(":status", "200"), _CONTENT])
_WELL = encode_headers([("grpc-status", "0")])

_Method = Callable[[ServerEnd, float, ExitStack], tuple[Iterable[Piece], int]]
"""Does a call and returns the body of its answer, and about how many bytes that has."""


class _RefusedError(Exception):
    """A call that is refused in words of gRPC, not of the service."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class DataCalls:
    """The data path of a shard, as gRPC calls it.

    Parameters
    ----------
    shard
        The shard.
    budget
        Bound on payload bytes in flight, shared with all other ways in.
    gradients
        Memory that gradients land in.
    authenticator
        Tells who calls.
    max_message_bytes
        Largest message accepted.
    server_id
        Name of this server; calls that are meant for another one are refused.
    """

    def __init__(
        self,
        shard: ShardApi,
        budget: ByteBudget,
        gradients: BufferPool,
        authenticator: Authenticator,
        *,
        max_message_bytes: int,
        server_id: str,
    ) -> None:
        self._shard = shard
        self._budget = budget
        self._gradients = gradients
        self._authenticator = authenticator
        self._max_message_bytes = max_message_bytes
        self._server_id = server_id
        self._methods: dict[str, _Method] = {_FETCH: self._fetch, _PUSH: self._push}

    def serve(self, http2: ServerEnd, headers: dict[str, str]) -> bool:
        """Answer one call.

        Parameters
        ----------
        http2
            Where it came, and is answered.
        headers
            Its headers.

        Returns
        -------
        bool
            Whether it was done; False = refused. Those who are refused all they ask for are not to
            keep others out.

        Raises
        ------
        OSError, ProtocolError, StreamResetError
            As `ServerEnd` does: nobody hears the answer, or not in time.
        """
        ends = time.monotonic() + min(_timeout_s(headers), LONGEST_CALL_S)
        http2.end_at(ends)
        if (misfit := self._misfit(headers)) is not None:
            http2.answer(encode_headers([(":status", misfit)]))
            return False
        with ExitStack() as held:
            try:
                body, num_bytes = self._answer(http2, headers, ends, held)
            except (MembankError, _RefusedError) as err:
                # Told although the caller may not have said all.
                _refuse(http2, err)
                return False
            if num_bytes > _LARGE_BYTES:
                # Notices that the caller has given up, before all that is sent.
                http2.refresh()
            http2.answer(_HEAD, body, _WELL)
        return True

    def _answer(
        self, http2: ServerEnd, headers: dict[str, str], ends: float, held: ExitStack
    ) -> tuple[Iterable[Piece], int]:
        """Do what a call asks for and return the answer, as a `_Method` does, good while `held` is."""
        path = headers.get(":path", "")
        method = self._methods.get(path)
        if method is None:
            raise _RefusedError(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        if headers.get("grpc-encoding", "identity") != "identity":
            raise _RefusedError(
                grpc.StatusCode.UNIMPLEMENTED, "compressed messages are not read here"
            )
        try:
            admit(self._authenticator, headers.items(), path)
            return method(http2, ends, held)
        except (MembankError, OSError, ProtocolError, StreamResetError, _RefusedError):
            # Those of the system's kinds are the connection's: the shard's come through `_leaving`.
            raise
        except Exception as err:
            raise leaving(err, path) from None

    def _misfit(self, headers: dict[str, str]) -> str | None:
        """Return the status of HTTP for what is no call to this server; None = it is one."""
        if headers.get(":method") != "POST":
            return "405"
        if not headers.get("content-type", "").startswith("application/grpc"):
            return "415"
        if headers.get(SERVER_KEY, self._server_id) != self._server_id:
            return MISDIRECTED
        return None

    def _fetch(self, http2: ServerEnd, ends: float, held: ExitStack) -> tuple[Iterable[Piece], int]:
        message = self._only_message(http2)
        with _leaving(_FETCH):
            _check_time(ends)
            try:
                request = pb.FetchBlocksRequest.FromString(message)
            except DecodeError as err:
                raise InvalidArgumentError(f"the request cannot be read: {err}") from err
            result = held.enter_context(fetched(request, self._shard, self._budget))
            messages = answer_messages(result, layers_per_part=request.layers_per_part)
            # Made as it is sent; what `held` holds keeps the blocks that long.
            body = chain.from_iterable(map(framed, messages))
            return body, sum(block.header.num_bytes for block in result.blocks)

    def _push(self, http2: ServerEnd, ends: float, held: ExitStack) -> tuple[Iterable[Piece], int]:
        first = self._first_message(http2)
        with reserved(first, self._shard, self._budget, self._gradients) as push:
            gradients = StreamedGradients(push)
            gradients.take(push.head)
            while (length := self._next_length(http2)) is not None:
                # Each message has a time of its own: who sends slowly shall not live on the
                # patience that was meant for all.
                http2.end_at(ends)
                receive(http2, length, PUSH_DATA, gradients)
            buffers = gradients.finish()
            # A caller that left will send the same request id again; do the work once, then.
            http2.refresh()
            with _leaving(_PUSH):
                _check_time(ends)
                answer = push.apply(buffers).SerializeToString()
        return framed([answer]), len(answer)

    def _first_message(self, http2: ServerEnd) -> pb.PushUpdatesRequest | memoryview | None:
        length = self._next_length(http2)
        if length is None:
            return None
        try:
            return PUSH_DATA.deserialize(read_whole(http2, length))
        except DecodeError as err:
            raise InvalidArgumentError(f"the push cannot be read: {err}") from err

    def _only_message(self, http2: ServerEnd) -> bytes:
        """Read a request of one message, to its end."""
        length = self._next_length(http2)
        if length is None:
            raise _RefusedError(grpc.StatusCode.INVALID_ARGUMENT, "the request has no message")
        message = read_whole(http2, length)
        if http2.available():
            raise _RefusedError(
                grpc.StatusCode.INVALID_ARGUMENT, "the request has more than one message"
            )
        return message

    def _next_length(self, http2: ServerEnd) -> int | None:
        """Wait for the next message of a request and return its size; None = there is none."""
        head = next_message(http2)
        if head is None:
            return None
        is_compressed, length = head
        if is_compressed:
            raise _RefusedError(
                grpc.StatusCode.INTERNAL, "a compressed message without a grpc-encoding"
            )
        if length > self._max_message_bytes:
            raise _RefusedError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"a message of {length} bytes; accepted: {self._max_message_bytes}",
            )
        return length


@contextmanager
def _leaving(method: str) -> Iterator[None]:
    """Let errors of the shard leave as callers are told of them."""
    try:
        yield
    except Exception as err:
        # Not from itself: such a ring would keep the memory of gradients until it is collected.
        raise leaving(err, method) from None


def _check_time(ends: float) -> None:
    if time.monotonic() >= ends:
        raise DeadlineError("the deadline of the call passed before anything was done")


def _refuse(http2: ServerEnd, why: MembankError | _RefusedError) -> None:
    """End a call with a status, and nothing before that."""
    code, message = why.code, why.message
    more = []
    if isinstance(why, MembankError):
        details = base64.b64encode(to_status_proto(why).SerializeToString()).decode()
        more = [("grpc-status-details-bin", details.rstrip("="))]
    status = [("grpc-status", str(code.value[0])), ("grpc-message", quote(message, safe=_PLAIN))]
    http2.answer(encode_headers([(":status", "200"), _CONTENT, *status, *more]))


def _timeout_s(headers: dict[str, str]) -> float:
    """Return the time that a caller gives, in seconds."""
    value = headers.get("grpc-timeout")
    if value is None:
        return LONGEST_CALL_S
    match = _TIMEOUT.fullmatch(value)
    if match is None:
        raise ProtocolError(f"a grpc-timeout of {value!r}")
    return int(match[1]) * _UNIT_S[match[2]]
