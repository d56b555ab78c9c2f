"""A connection over which payloads go straight from and into the memory that they are for. Blocking.

It speaks gRPC, to a shard's port for data or to the server that all other calls go to, without
grpcio: that would hand each message through three buffers, which takes twice the time that the
bytes need to travel.
"""

from __future__ import annotations

import base64
import binascii
import math
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Self
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from membank.client.transport.call_errors import call_error
from membank.client.transport.contract import PushAnswer
from membank.client.transport.http2 import Http2Connection
from membank.client.transport.payloads import FETCH_DATA, FetchedPayloads, push_pieces
from membank.client.transport.requests import push_answer
from membank.v1 import block_service_pb2 as block_pb
from membank.wire.alternative import ALTERNATIVE_KEY, MISDIRECTED, SERVER_KEY, Alternative
from membank.wire.errors import MembankError, Reason, UnavailableError
from membank.wire.framing import MAX_MESSAGE_BYTES
from membank.wire.http2.buffered_socket import BufferedSocket
from membank.wire.http2.frames import PROBE, ErrorCode, ProtocolError, StreamResetError
from membank.wire.http2.headers import encode_headers
from membank.wire.http2.messages import (
    CutShortError,
    framed,
    next_message,
    read_whole,
    receive,
)
from membank.wire.http2.pieces import Piece
from membank.wire.records import Update

_SERVICE = "/membank.v1.BlockService"
_FETCH = "FetchBlocks"
_PUSH = "PushUpdates"
_MAX_TIMEOUT_DIGITS = 8
_REFRESH_S = 0.05
_HTTP_OK = "200"
_CODES = {code.value[0]: code for code in grpc.StatusCode}

# What gRPC makes of answers that are none of its own (doc/http-grpc-status-mapping.md).
_CODE_OF_HTTP = {
    "400": grpc.StatusCode.INTERNAL,
    "401": grpc.StatusCode.UNAUTHENTICATED,
    "403": grpc.StatusCode.PERMISSION_DENIED,
    "404": grpc.StatusCode.UNIMPLEMENTED,
    "429": grpc.StatusCode.UNAVAILABLE,
    "502": grpc.StatusCode.UNAVAILABLE,
    "503": grpc.StatusCode.UNAVAILABLE,
    "504": grpc.StatusCode.UNAVAILABLE,
}
# The same of streams that are reset; any other code is INTERNAL.
_CODE_OF_RESET: dict[int, grpc.StatusCode] = {
    ErrorCode.REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    ErrorCode.CANCEL: grpc.StatusCode.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: grpc.StatusCode.PERMISSION_DENIED,
}


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where and how to connect."""

    endpoint: str
    """Address, ``host:port``."""
    host: str
    """Its host."""
    port: int
    """Its port."""
    authorization: str | None
    """Value of the header; None = no credentials."""
    tls: ssl.SSLContext | None
    """None = no TLS."""
    server_name: str | None
    """Name that the certificate must bear; None = `host`."""
    alternative: Alternative | None = None
    """The port for data to connect to; None = `port`."""
    keepalive_s: float
    """As in `ClientConfig`."""
    keepalive_timeout_s: float
    """As in `ClientConfig`."""


class MisdirectedError(Exception):
    """The port for data is another server's by now; nothing was done."""


class DataConnection:
    """A connection to a shard; one call at a time, from any thread.

    Parameters
    ----------
    end
        The connected socket.
    http2
        What is spoken over it.
    address
        What it is connected to.
    """

    def __init__(self, end: BufferedSocket, http2: Http2Connection, address: Address) -> None:
        self._end = end
        self._http2 = http2
        self._endpoint = address.endpoint
        self._is_secured = address.tls is not None
        self.to = address.alternative
        """The port for data that it is to; None = it is to the endpoint itself."""
        self.told: Alternative | None = None
        """The port for data that the endpoint has told of; None = none."""
        self._told_by = ""
        self.has_broken = False
        """Whether it ended in the midst of a call."""
        self._is_retired = False
        self._heads = {
            method: encode_headers(_request_headers(address, method)) for method in (_FETCH, _PUSH)
        }
        self._is_abandoned = False

    @classmethod
    def open(cls, address: Address, *, ends: float) -> Self:
        """Connect.

        Parameters
        ----------
        address
            To what.
        ends
            Point in time of `time.monotonic` up to which it may take.

        Raises
        ------
        OSError
            If nobody is there, or nobody to be trusted.
        ProtocolError
            If whoever is there does not speak HTTP/2.
        """
        port = address.port if address.alternative is None else address.alternative.port
        plain = socket.create_connection((address.host, port), _left_s(ends))
        try:
            plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end = BufferedSocket(
                plain if address.tls is None else _secured(plain, address.tls, address),
                keepalive_s=address.keepalive_s,
                keepalive_timeout_s=address.keepalive_timeout_s,
                probe=PROBE,
            )
            end.end_at(ends)
            return cls(end, Http2Connection.open(end), address)
        except BaseException:
            plain.close()
            raise

    def fetch(
        self, request: block_pb.FetchBlocksRequest, payloads: FetchedPayloads, *, ends: float
    ) -> None:
        """Fetch blocks.

        Parameters
        ----------
        request
            What to fetch.
        payloads
            Takes what comes.
        ends
            Point in time of `time.monotonic` up to which it may take.

        Raises
        ------
        MembankError
            What the service raised, what `payloads` raises, or what `GrpcChannel` raises for calls
            that fail on the way.
        MisdirectedError
            If the port for data is another server's.
        ProtocolError
            If the other end says what cannot be understood.
        """

        def read() -> None:
            while (length := self._next_length(_FETCH)) is not None:
                receive(self._http2, length, FETCH_DATA, payloads)

        self._call(_FETCH, framed([request.SerializeToString()]), read, ends)

    def push(self, update: Update, *, bank: str, ends: float) -> PushAnswer:
        """Apply gradients, which are sent from where they lie.

        Parameters
        ----------
        update
            The push; not changed before this returns.
        bank
            Name of the bank; "" = the one that is served.
        ends
            Point in time of `time.monotonic` up to which it may take.

        Raises
        ------
        MembankError, MisdirectedError, ProtocolError
            As `fetch` does.
        """
        answers: list[block_pb.PushUpdatesResponse] = []

        def read() -> None:
            while (length := self._next_length(_PUSH)) is not None:
                try:
                    message = read_whole(self._http2, length)
                    answers.append(block_pb.PushUpdatesResponse.FromString(message))
                except DecodeError as err:
                    raise ProtocolError(f"a message that cannot be read: {err}") from err

        self._call(_PUSH, push_pieces(update, bank=bank), read, ends)
        if len(answers) != 1:
            raise ProtocolError(f"{len(answers)} answers to a push")
        return push_answer(answers[0])

    def is_usable(self) -> bool:
        """Say, without waiting for anything to come, whether another call may be made."""
        if self._is_abandoned or self._is_retired or not self._http2.is_usable:
            return False
        # What has begun to come is waited for; nothing else is.
        self._end.end_at(time.monotonic() + _REFRESH_S)
        try:
            self._http2.refresh()
        except (OSError, ProtocolError, StreamResetError):
            return False
        return self._http2.is_usable

    def retire(self) -> None:
        """Make no further call."""
        self._is_retired = True

    def abandon(self) -> None:
        """Make a call in another thread fail; that thread, or whoever waits for it, closes."""
        self._is_abandoned = True
        # Not closed: another file could get the socket's number while that thread still uses it.
        self._end.shut_down()

    def close(self) -> None:
        """End the connection; nobody may be using it."""
        self._end.close()

    def _call(
        self, method: str, body: Sequence[Piece], read: Callable[[], None], ends: float
    ) -> None:
        self._end.end_at(ends)
        try:
            timeout = encode_headers([("grpc-timeout", _timeout(_left_s(ends)))])
            self._http2.request(self._heads[method] + timeout, body)
            try:
                read()
            except CutShortError:
                # Why it ended says more.
                self._check_status(method)
                raise
            self._learn()
            self._check_status(method)
        except TimeoutError as err:
            if isinstance(err, MembankError):
                raise
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            raise self._error(method, code, "Deadline Exceeded") from err
        except OSError as err:
            if self._is_abandoned:
                raise UnavailableError(
                    f"{self._endpoint} {method}: the connection was closed during the call",
                    reason=Reason.CANCELLED,
                ) from err
            self.has_broken = True
            raise self._error(method, grpc.StatusCode.UNAVAILABLE, str(err)) from err
        except StreamResetError as err:
            code = _CODE_OF_RESET.get(err.code, grpc.StatusCode.INTERNAL)
            raise self._error(method, code, str(err)) from err
        finally:
            if not self._http2.is_usable:
                # So that the server stops, although the connection is closed soon: it may be one
                # of a proxy.
                with suppress(OSError):
                    self._http2.cancel()

    def _next_length(self, method: str) -> int | None:
        """Wait for the next message of an answer and return its size; None = there is none."""
        # Of a page about an error, such as a proxy makes, the status is all that counts.
        if not self._http2.available() or not _is_grpc(self._http2.headers or {}):
            return None
        head = next_message(self._http2)
        if head is None:
            return None
        is_compressed, length = head
        if is_compressed:
            raise ProtocolError("a compressed message, which nobody asked for")
        if length > MAX_MESSAGE_BYTES:
            raise self._error(
                method,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"a message of {length} bytes; accepted: {MAX_MESSAGE_BYTES}",
            )
        return length

    def _learn(self) -> None:
        """Note where the endpoint says that its port for data is."""
        value = (self._http2.headers or {}).get(ALTERNATIVE_KEY, "")
        if value != self._told_by:
            self._told_by = value
            self.told = Alternative.of_header(value, is_secured=self._is_secured)

    def _check_status(self, method: str) -> None:
        """Raise unless the call ended well."""
        headers, trailers = self._http2.headers or {}, self._http2.trailers or {}
        status = trailers.get("grpc-status", "")
        if status == "0":
            return
        if status.isdecimal():
            code = _CODES.get(int(status), grpc.StatusCode.UNKNOWN)
            details = _binary(trailers.get("grpc-status-details-bin"))
            raise self._error(method, code, unquote(trailers.get("grpc-message", "")), details)
        http = headers.get(":status", "")
        if http == MISDIRECTED and self.to is not None:
            raise MisdirectedError
        code = _CODE_OF_HTTP.get(http, grpc.StatusCode.UNKNOWN)
        problem = f"an answer without a status of gRPC; that of HTTP is {http}"
        raise self._error(method, code, problem)

    def _error(
        self, method: str, code: grpc.StatusCode, message: str, details: bytes | None = None
    ) -> MembankError:
        return call_error(code, message, details, endpoint=self._endpoint, method=method)


def _secured(plain: socket.socket, tls: ssl.SSLContext, address: Address) -> ssl.SSLSocket:
    secured = tls.wrap_socket(plain, server_hostname=address.server_name or address.host)
    if secured.selected_alpn_protocol() != "h2":
        secured.close()
        raise ProtocolError("the other end does not offer HTTP/2")
    return secured


def _request_headers(address: Address, method: str) -> list[tuple[str, str]]:
    headers = [
        (":method", "POST"),
        (":scheme", "http" if address.tls is None else "https"),
        (":path", f"{_SERVICE}/{method}"),
        (":authority", address.server_name or address.endpoint),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", "membank"),
    ]
    if address.alternative is not None:
        headers.append((SERVER_KEY, address.alternative.server_id))
    if address.authorization is not None:
        headers.append(("authorization", address.authorization))
    return headers


def _is_grpc(headers: dict[str, str]) -> bool:
    is_well = headers.get(":status") == _HTTP_OK
    return is_well and headers.get("content-type", "").startswith("application/grpc")


def _binary(value: str | None) -> bytes | None:
    if value is None:
        return None
    try:
        return base64.b64decode(value + "=" * (-len(value) % 4))
    except binascii.Error:
        return None


def _left_s(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _timeout(seconds: float) -> str:
    """Return a time as gRPC writes it; rounded up, so that this end notices first."""
    millis = str(math.ceil(seconds * 1000))
    return f"{millis}m" if len(millis) <= _MAX_TIMEOUT_DIGITS else f"{math.ceil(seconds):.0f}S"
