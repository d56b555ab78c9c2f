"""The server's half of HTTP/2 conversations, written out byte by byte."""

from __future__ import annotations

import base64
import socket
import struct
import time
from collections.abc import Iterable, Sequence

import hpack

from fake_bank import FakeBank
from membank.client.transport.contract import FetchAnswer, PushAnswer
from membank.client.transport.data_connection import Address, DataConnection
from membank.client.transport.http2 import Http2Connection
from membank.client.transport.landing import Landing
from membank.client.transport.payloads import FetchedPayloads
from membank.client.transport.requests import fetch_request
from membank.v1 import block_service_pb2 as block_pb
from membank.wire import convert
from membank.wire.buffers import BufferPool
from membank.wire.errors import MembankError, to_status_proto
from membank.wire.http2.buffered_socket import BufferedSocket
from membank.wire.http2.frames import PROBE, Flag, Frame, frame
from membank.wire.records import Update
from membank.wire.spec import BlockRef

SETTINGS = frame(Frame.SETTINGS, 0, 0)
ADDRESS = Address(
    endpoint="shard:7600",
    host="shard",
    port=7600,
    authorization="Bearer sesame",
    tls=None,
    server_name=None,
    keepalive_s=30.0,
    keepalive_timeout_s=10.0,
)
REFS = (BlockRef(1, 0), BlockRef(2, 1), BlockRef(2, 0))


def headers_frame(
    fields: Iterable[tuple[str, str]], *, stream: int = 1, flags: int = Flag.END_HEADERS
) -> bytes:
    """Return headers that need no table to be understood."""
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    return frame(Frame.HEADERS, flags, stream, encoder.encode(list(fields)))


def head(*, stream: int = 1) -> bytes:
    """Return the headers of an answer that goes well."""
    return headers_frame([(":status", "200"), ("content-type", "application/grpc")], stream=stream)


def trailers(*fields: tuple[str, str], stream: int = 1) -> bytes:
    """Return what ends a stream; without fields, well."""
    return headers_frame(
        fields or [("grpc-status", "0")], stream=stream, flags=Flag.END_HEADERS | Flag.END_STREAM
    )


def refusal(error: MembankError) -> bytes:
    """Return an answer that is nothing but an error."""
    details = base64.b64encode(to_status_proto(error).SerializeToString()).rstrip(b"=")
    return trailers(
        (":status", "200"),
        ("content-type", "application/grpc"),
        ("grpc-status", str(error.code.value[0])),
        ("grpc-message", "not%20here"),
        ("grpc-status-details-bin", details.decode()),
    )


def data(body: bytes, *, padding: int | None = None, stream: int = 1) -> bytes:
    """Return a frame of data."""
    if padding is None:
        return frame(Frame.DATA, 0, stream, body)
    return frame(Frame.DATA, Flag.PADDED, stream, bytes([padding]) + body + bytes(padding))


def message(body: bytes | block_pb.FetchBlocksResponse, *, compressed: int = 0) -> bytes:
    """Return a message as gRPC frames it."""
    encoded = body if isinstance(body, bytes) else body.SerializeToString()
    return struct.pack(">BI", compressed, len(encoded)) + encoded


def answer_messages(
    bank: FakeBank, refs: Sequence[BlockRef] = REFS
) -> list[block_pb.FetchBlocksResponse]:
    """Return the answer of a shard as one message of headers and one of data per block."""
    fetched = bank.shard_of(refs[0]).fetch(refs)
    headers = [convert.header_to_pb(block.header) for block in fetched.blocks]
    weights = [block.weight for block in fetched.blocks if block.weight is not None]
    return [
        block_pb.FetchBlocksResponse(revision=fetched.revision, headers=headers),
        *(block_pb.FetchBlocksResponse(data=weight.tobytes()) for weight in weights),
    ]


def whole_answer(bank: FakeBank, refs: Sequence[BlockRef] = REFS) -> bytes:
    """Return a conversation's server half that goes well, a frame per message."""
    bodies = map(message, answer_messages(bank, refs))
    return SETTINGS + head() + b"".join(map(data, bodies)) + trailers()


class Dripping(socket.socket):
    """A socket that yields at most `num_bytes` at a time, as a network may."""

    num_bytes = 1 << 30

    def recvmsg_into(self, buffers, *args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN002, ANN201
        # docstring inherited
        first = buffers[0]
        return super().recvmsg_into([first[: self.num_bytes]], *args)


class Client:
    """A client whose other end a test holds.

    Parameters
    ----------
    drip
        Bytes that it reads at most at a time; None = as many as are there.
    keepalive_s
        Silence after which it probes, in seconds.
    """

    def __init__(self, *, drip: int | None = None, keepalive_s: float = 30.0) -> None:
        mine, self.server = socket.socketpair()
        end: socket.socket = mine
        if drip is not None:
            dripping = Dripping(fileno=mine.detach())
            dripping.num_bytes = drip
            end = dripping
        self.end = BufferedSocket(
            end, keepalive_s=keepalive_s, keepalive_timeout_s=keepalive_s, probe=PROBE
        )
        self.connection: DataConnection | None = None

    def connect(self, *, timeout_s: float = 10.0) -> DataConnection:
        """Exchange settings; the server's must be there or come."""
        self.end.end_at(time.monotonic() + timeout_s)
        self.connection = DataConnection(self.end, Http2Connection.open(self.end), ADDRESS)
        return self.connection

    def fetch(
        self,
        refs: Sequence[BlockRef] = REFS,
        *,
        landing: Landing | None = None,
        timeout_s: float = 10.0,
    ) -> FetchAnswer:
        """Fetch blocks."""
        connection = self.connection or self.connect()
        payloads = FetchedPayloads(
            refs, landing or Landing(BufferPool(0)), max_bytes=1 << 30, where="shard:7600"
        )
        connection.fetch(request_of(refs), payloads, ends=time.monotonic() + timeout_s)
        return payloads.finish()

    def push(self, update: Update, *, timeout_s: float = 10.0) -> PushAnswer:
        """Push gradients."""
        connection = self.connection or self.connect()
        return connection.push(update, bank="", ends=time.monotonic() + timeout_s)

    def close(self) -> None:
        """Close both ends."""
        self.end.close()
        self.server.close()


def request_of(refs: Sequence[BlockRef]) -> block_pb.FetchBlocksRequest:
    """Return a request for blocks as they are."""
    return fetch_request(refs, bank="", held_versions=None, dtype=None, min_revision=0, snapshot="")


def fetched_from(script: bytes, *, drip: int | None = None) -> FetchAnswer:
    """Return what a client makes of a server that says `script` and then closes."""
    client = Client(drip=drip)
    try:
        client.server.sendall(script)
        client.server.shutdown(socket.SHUT_WR)
        return client.fetch()
    finally:
        client.close()


def frames_in(sent: bytes) -> list[tuple[int, int, int, bytes]]:
    """Return type, flags, stream and payload of each frame that a client sent after its preface."""
    rest = sent.partition(b"SM\r\n\r\n")[2]
    frames = []
    while rest:
        length = int.from_bytes(rest[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", rest[3:9])
        frames.append((kind, flags, stream, rest[9 : 9 + length]))
        rest = rest[9 + length :]
    return frames


def sent_by(client: Client) -> list[tuple[int, int, int, bytes]]:
    """Return what a client has sent so far, as `frames_in` does."""
    client.server.setblocking(False)
    sent = b""
    try:
        while part := client.server.recv(1 << 20):
            sent += part
    except BlockingIOError:
        pass
    return frames_in(sent)
