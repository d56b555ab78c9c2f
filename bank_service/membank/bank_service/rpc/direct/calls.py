"""Calls of gRPC over a connection of our own: what is asked, who may, and what is answered."""

from __future__ import annotations

import base64
import re
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from urllib.parse import quote

import grpc
from google.protobuf.message import DecodeError

from membank.bank_service.rpc.admission import admit, leaving
from membank.bank_service.rpc.auth import BLOCK_SERVICE, Authenticator
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.direct.http2 import ServerEnd
from membank.bank_service.rpc.fetching import answer_messages, fetched
from membank.bank_service.shard.contract import ShardApi
from membank.v1 import block_service_pb2 as pb
from membank.wire.alternative import MISDIRECTED, SERVER_KEY
from membank.wire.errors import (
    DeadlineError,
    InvalidArgumentError,
    MembankError,
    to_status_proto,
)
from membank.wire.http2.frames import ProtocolError
from membank.wire.http2.headers import encode_headers
from membank.wire.http2.pieces import Piece

LONGEST_CALL_S = 600.0
"""Time of calls that set themselves none, or more: so nobody holds memory for ever."""

_LARGE_BYTES = 256 << 10
_MESSAGE_HEAD = struct.Struct(">BI")
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_CONTENT = ("content-type", "application/grpc")
_PLAIN = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

_HEAD = encode_headers([(":status", "200"), _CONTENT])
_WELL = encode_headers([("grpc-status", "0")])

Refusal = tuple[grpc.StatusCode, str]
"""Status of a call that is none of the service's, and what is said about it."""
_Method = Callable[[ServerEnd, float], None]


class DataCalls:
    """The data path of a shard, as gRPC calls it.

    Parameters
    ----------
    shard
        The shard.
    budget
        Bound on payload bytes in flight, shared with all other ways in.
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
        authenticator: Authenticator,
        *,
        max_message_bytes: int,
        server_id: str,
    ) -> None:
        self._shard = shard
        self._budget = budget
        self._authenticator = authenticator
        self._max_message_bytes = max_message_bytes
        self._server_id = server_id
        self._methods: dict[str, _Method] = {BLOCK_SERVICE + "FetchBlocks": self._fetch}

    def serve(self, http2: ServerEnd, headers: dict[str, str]) -> None:
        """Answer one call.

        Parameters
        ----------
        http2
            Where it came, and is answered.
        headers
            Its headers.

        Raises
        ------
        OSError, ProtocolError, StreamResetError
            As `ServerEnd` does: nobody hears the answer, or not in time.
        """
        ends = time.monotonic() + min(_timeout_s(headers), LONGEST_CALL_S)
        http2.end_at(ends)
        path = headers.get(":path", "")
        if (misfit := self._misfit(headers)) is not None:
            http2.answer(encode_headers([(":status", misfit)]))
        elif path not in self._methods:
            _refuse(http2, (grpc.StatusCode.UNIMPLEMENTED, "Method not found!"))
        elif headers.get("grpc-encoding", "identity") != "identity":
            _refuse(http2, (grpc.StatusCode.UNIMPLEMENTED, "compressed messages are not read here"))
        else:
            try:
                admit(self._authenticator, headers.items(), path)
            except MembankError as err:
                _refuse(http2, err)
                return
            self._methods[path](http2, ends)

    def _misfit(self, headers: dict[str, str]) -> str | None:
        """Return the status of HTTP for what is no call to this server; None = it is one."""
        if headers.get(":method") != "POST":
            return "405"
        if not headers.get("content-type", "").startswith("application/grpc"):
            return "415"
        if headers.get(SERVER_KEY, self._server_id) != self._server_id:
            return MISDIRECTED
        return None

    def _fetch(self, http2: ServerEnd, ends: float) -> None:
        message = self._only_message(http2)
        if not isinstance(message, bytes):
            _refuse(http2, message)
            return
        with ExitStack() as held:
            try:
                body, num_bytes = self._answer(message, ends, held)
            except Exception as err:
                _refuse(http2, leaving(err, BLOCK_SERVICE + "FetchBlocks"))
                return
            if num_bytes > _LARGE_BYTES:
                # Notices that the caller has given up, before all that is sent.
                http2.refresh()
            http2.answer(_HEAD, body, _WELL)

    def _answer(self, message: bytes, ends: float, held: ExitStack) -> tuple[Iterator[Piece], int]:
        """Find blocks; return the answer, made as it is sent, and the bytes of their content.

        What `held` holds keeps them, and the bytes that are reserved for them.
        """
        if time.monotonic() >= ends:
            raise DeadlineError("the deadline of the call passed before anything was done")
        try:
            request = pb.FetchBlocksRequest.FromString(message)
        except DecodeError as err:
            raise InvalidArgumentError(f"the request cannot be read: {err}") from err
        result = held.enter_context(fetched(request, self._shard, self._budget))
        messages = answer_messages(result, layers_per_part=request.layers_per_part)
        return _framed(messages), sum(block.header.num_bytes for block in result.blocks)

    def _only_message(self, http2: ServerEnd) -> bytes | Refusal:
        """Read a request of one message, to its end."""
        head = http2.read(_MESSAGE_HEAD.size)
        if len(head) < _MESSAGE_HEAD.size:
            return grpc.StatusCode.INVALID_ARGUMENT, "the request has no message"
        compressed, length = _MESSAGE_HEAD.unpack(head)
        if compressed:
            return grpc.StatusCode.INTERNAL, "a compressed message without a grpc-encoding"
        if length > self._max_message_bytes:
            return (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"a message of {length} bytes; accepted: {self._max_message_bytes}",
            )
        message = http2.read(length)
        if len(message) < length:
            raise ProtocolError("the request ends within a message")
        if http2.available():
            return grpc.StatusCode.INVALID_ARGUMENT, "the request has more than one message"
        return message


def _framed(messages: Iterable[list[Piece]]) -> Iterator[Piece]:
    """Yield the pieces of messages as gRPC frames them."""
    for pieces in messages:
        yield _MESSAGE_HEAD.pack(0, sum(map(len, pieces)))
        yield from pieces


def _refuse(http2: ServerEnd, why: MembankError | Refusal) -> None:
    """End a call with a status, and nothing before that."""
    if isinstance(why, MembankError):
        code, message = why.code, why.message
        details = base64.b64encode(to_status_proto(why).SerializeToString()).decode()
        more = [("grpc-status-details-bin", details.rstrip("="))]
    else:
        (code, message), more = why, []
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
