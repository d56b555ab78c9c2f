"""A connection over which blocks are fetched straight into the memory that they are for. Blocking.

It speaks gRPC, to the server that all other calls go to, without grpcio: that would hand each
message through three buffers, which takes twice the time that the bytes need to travel.
"""

from __future__ import annotations

import base64
import binascii
import math
import socket
import ssl
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn, Self
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError

from membank.client.transport.call_errors import call_error
from membank.client.transport.http2 import Http2Connection
from membank.client.transport.payloads import FETCH_DATA, FetchedPayloads
from membank.v1 import block_service_pb2 as block_pb
from membank.wire.alternative import ALTERNATIVE_KEY, MISDIRECTED, SERVER_KEY, Alternative
from membank.wire.errors import MembankError, Reason, UnavailableError
from membank.wire.framing import MAX_MESSAGE_BYTES
from membank.wire.http2.buffered_socket import BufferedSocket
from membank.wire.http2.frames import PROBE, ErrorCode, ProtocolError, StreamResetError
from membank.wire.http2.headers import encode_headers

_METHOD = "FetchBlocks"
_PATH = f"/membank.v1.BlockService/{_METHOD}"
_MESSAGE_HEAD = struct.Struct(">BI")
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


class FetchConnection:
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
        self._head = encode_headers(_request_headers(address))
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
        self._end.end_at(ends)
        try:
            self._request(request, ends)
            self._read(payloads)
            self._learn()
            self._check_status()
        except TimeoutError as err:
            if isinstance(err, MembankError):
                raise
            raise self._error(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from err
        except OSError as err:
            if self._is_abandoned:
                raise UnavailableError(
                    f"{self._endpoint} {_METHOD}: the connection was closed during the call",
                    reason=Reason.CANCELLED,
                ) from err
            self.has_broken = True
            raise self._error(grpc.StatusCode.UNAVAILABLE, str(err)) from err
        except StreamResetError as err:
            code = _CODE_OF_RESET.get(err.code, grpc.StatusCode.INTERNAL)
            raise self._error(code, str(err)) from err
        finally:
            if not self._http2.is_usable:
                # So that the server stops, although the connection is closed soon: it may be one
                # of a proxy.
                with suppress(OSError):
                    self._http2.cancel()

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

    def _request(self, request: block_pb.FetchBlocksRequest, ends: float) -> None:
        message = request.SerializeToString()
        block = self._head + encode_headers([("grpc-timeout", _timeout(_left_s(ends)))])
        self._http2.request(block, [_MESSAGE_HEAD.pack(0, len(message)) + message])

    def _read(self, payloads: FetchedPayloads) -> None:
        http2 = self._http2
        while http2.available():
            if not _is_grpc(http2.headers or {}):
                return  # a page about an error, such as a proxy makes
            compressed, length = _MESSAGE_HEAD.unpack(self._whole(_MESSAGE_HEAD.size))
            if compressed:
                raise ProtocolError("a compressed message, which nobody asked for")
            if length > MAX_MESSAGE_BYTES:
                raise self._error(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    f"a message of {length} bytes; accepted: {MAX_MESSAGE_BYTES}",
                )
            # No byte of the data: those few would cost as much as all the others of the message.
            head = self._whole(FETCH_DATA.head_bytes(length))
            start = FETCH_DATA.data_start(head, length)
            if start is None:
                payloads.take(_parsed(head + self._whole(length - len(head))))
                continue
            if start < len(head):
                payloads.take(memoryview(head)[start:])
            self._land(payloads, length - len(head))

    def _land(self, payloads: FetchedPayloads, num_bytes: int) -> None:
        while num_bytes:
            available = self._http2.available()
            if not available:
                self._broken_off()
            count = self._http2.read_into(payloads.room(min(num_bytes, available)))
            payloads.landed(count)
            num_bytes -= count

    def _whole(self, num_bytes: int) -> bytes:
        data = self._http2.read(num_bytes)
        if len(data) < num_bytes:
            self._broken_off()
        return data

    def _learn(self) -> None:
        """Note where the endpoint says that its port for data is."""
        value = (self._http2.headers or {}).get(ALTERNATIVE_KEY, "")
        if value != self._told_by:
            self._told_by = value
            self.told = Alternative.of_header(value, is_secured=self._is_secured)

    def _broken_off(self) -> NoReturn:
        """Raise why the answer ended within a message."""
        self._check_status()
        raise ProtocolError("the answer ends within a message")

    def _check_status(self) -> None:
        """Raise unless the call ended well."""
        headers, trailers = self._http2.headers or {}, self._http2.trailers or {}
        status = trailers.get("grpc-status", "")
        if status == "0":
            return
        if status.isdecimal():
            code = _CODES.get(int(status), grpc.StatusCode.UNKNOWN)
            details = _binary(trailers.get("grpc-status-details-bin"))
            raise self._error(code, unquote(trailers.get("grpc-message", "")), details)
        http = headers.get(":status", "")
        if http == MISDIRECTED and self.to is not None:
            raise MisdirectedError
        code = _CODE_OF_HTTP.get(http, grpc.StatusCode.UNKNOWN)
        raise self._error(code, f"an answer without a status of gRPC; that of HTTP is {http}")

    def _error(
        self, code: grpc.StatusCode, message: str, details: bytes | None = None
    ) -> MembankError:
        return call_error(code, message, details, endpoint=self._endpoint, method=_METHOD)


def _secured(plain: socket.socket, tls: ssl.SSLContext, address: Address) -> ssl.SSLSocket:
    secured = tls.wrap_socket(plain, server_hostname=address.server_name or address.host)
    if secured.selected_alpn_protocol() != "h2":
        secured.close()
        raise ProtocolError("the other end does not offer HTTP/2")
    return secured


def _request_headers(address: Address) -> list[tuple[str, str]]:
    headers = [
        (":method", "POST"),
        (":scheme", "http" if address.tls is None else "https"),
        (":path", _PATH),
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


def _parsed(message: bytes) -> block_pb.FetchBlocksResponse | memoryview:
    try:
        return FETCH_DATA.deserialize(message)
    except DecodeError as err:
        raise ProtocolError(f"a message that cannot be read: {err}") from err


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
