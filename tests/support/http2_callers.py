"""The client's half of HTTP/2 conversations, written out byte by byte, and shards to have them with."""

from __future__ import annotations

import base64
import fcntl
import socket
import struct
import termios
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, cast
from urllib.parse import unquote

import grpc
import hpack
import numpy as np

from fake_bank import SPEC
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.direct import DataListener
from membank.bank_service.rpc.server import ServerConfig
from membank.bank_service.shard import ShardApi
from membank.bank_service.shard.contract import FetchResult
from membank.v1 import block_service_pb2 as block_pb
from membank.wire import convert
from membank.wire.crc import crc32c
from membank.wire.errors import MembankError, from_rpc_status
from membank.wire.http2.frames import (
    FRAME_HEAD,
    PREFACE,
    SETTING,
    WORD,
    Flag,
    Frame,
    Setting,
    frame,
)
from membank.wire.records import Block, BlockHeader
from membank.wire.spec import BankSpec, BlockRef

PATH = "/membank.v1.BlockService/FetchBlocks"
REF = BlockRef(1, 0)
WINDOW = 65_535
"""Bytes that a caller takes who says nothing of it."""


@dataclass(frozen=True)
class Said:
    """A frame that a server has sent."""

    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def ends(self) -> bool:
        """Whether it ends its stream."""
        return self.kind in (Frame.DATA, Frame.HEADERS) and bool(self.flags & Flag.END_STREAM)


def setting(name: int, value: int) -> bytes:
    """Return settings of one."""
    return frame(Frame.SETTINGS, 0, 0, SETTING.pack(name, value))


def wider(by: int, *, stream: int = 0) -> bytes:
    """Return a widened window."""
    return frame(Frame.WINDOW_UPDATE, 0, stream, WORD.pack(by))


def message(refs: Sequence[BlockRef] = (REF,)) -> bytes:
    """Return a request for blocks, as gRPC frames it."""
    request = block_pb.FetchBlocksRequest(refs=map(convert.ref_to_pb, refs))
    return framed_message(request.SerializeToString())


def framed_message(encoded: bytes) -> bytes:
    """Return a message as gRPC frames it."""
    return struct.pack(">BI", 0, len(encoded)) + encoded


def head(stream: int = 1, *, flags: int = Flag.END_HEADERS, **changed: str | None) -> bytes:
    """Return the headers of a request; underscores in names of `changed` stand for hyphens."""
    fields: dict[str, str | None] = {
        ":method": "POST",
        ":scheme": "http",
        ":path": PATH,
        ":authority": "shard",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    for name, value in changed.items():
        name = name.replace("_", "-")
        fields[f":{name}" if f":{name}" in fields else name] = value
    encoder = hpack.Encoder()
    encoder.header_table_size = 0
    block = encoder.encode([(name, value) for name, value in fields.items() if value is not None])
    return frame(Frame.HEADERS, flags, stream, block)


def request(stream: int = 1, body: bytes | None = None, **changed: str | None) -> bytes:
    """Return a whole request."""
    body = message() if body is None else body
    return head(stream, flags=Flag.END_HEADERS, **changed) + frame(
        Frame.DATA, Flag.END_STREAM, stream, body
    )


class RawCaller:
    """A caller whose every byte a test decides on.

    Parameters
    ----------
    port
        Where to.
    greeting
        What it says first.
    """

    def __init__(
        self,
        port: int,
        *,
        greeting: bytes = PREFACE + frame(Frame.SETTINGS, 0, 0),
    ) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), 10.0)
        self._file = self.socket.makefile("rb")
        self._decoder = hpack.Decoder()
        self.say(greeting)

    def say(self, *frames: bytes) -> None:
        """Send frames."""
        self.socket.sendall(b"".join(frames))

    def wait_until_heard(self) -> None:
        """Wait until the other end's kernel has all that was said."""
        ends = time.monotonic() + 10
        while fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)) != bytes(4):
            assert time.monotonic() < ends

    def next(self) -> Said | None:
        """Return the next frame; None = the server has hung up."""
        try:
            start = self._file.read(FRAME_HEAD.size)
        except ConnectionResetError:
            return None
        if len(start) < FRAME_HEAD.size:
            return None
        high, low, kind, flags, stream = FRAME_HEAD.unpack(start)
        return Said(kind, flags, stream, self._file.read(high << 8 | low))

    def next_of(self, *kinds: int) -> Said:
        """Return the next frame of one of `kinds`, past all others."""
        while (said := self.next()) is not None:
            if said.kind in kinds:
                return said
        raise AssertionError(f"the server has hung up, and said nothing of {kinds}")

    def fields(self, said: Said) -> dict[str, str]:
        """Return what a frame of headers says."""
        return {str(name): str(value) for name, value in self._decoder.decode(said.payload)}

    def answer(self) -> tuple[dict[str, str], bytes, dict[str, str]]:
        """Return headers, body and trailers of the next answer."""
        first = self.next_of(Frame.HEADERS)
        headers = self.fields(first)
        if first.ends:
            return headers, b"", headers
        body = bytearray()
        while (said := self.next_of(Frame.DATA, Frame.HEADERS)).kind == Frame.DATA:
            body += said.payload
        return headers, bytes(body), self.fields(said)

    def is_hung_up_on(self) -> bool:
        """Wait until the server has hung up, and say so."""
        while self.next() is not None:
            pass
        return True

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class OneBlock:
    """A shard that answers every fetch by the same block, when it may.

    Parameters
    ----------
    num_bytes
        Size of the block.
    """

    spec: BankSpec = SPEC

    def __init__(self, num_bytes: int) -> None:
        self.content = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
        header = BlockHeader(
            ref=REF, version=1, num_bytes=num_bytes, crc32c=crc32c(self.content), shape=(num_bytes,)
        )
        self._block = Block(header=header, weight=self.content)
        self.error: Exception | None = None
        self.is_asked = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def fetch(self, *_: object, **__: object) -> FetchResult:
        """Answer."""
        self.is_asked.set()
        assert self.may_answer.wait(10.0)
        if self.error is not None:
            raise self.error
        return FetchResult(revision=7, blocks=(self._block,))


class ListenerRig:
    """A data listener around a shard.

    Parameters
    ----------
    num_bytes
        Size of the shard's block.
    token_file, tls_cert, tls_key
        As in `ServerConfig`.
    limits
        Limits of `DataListener`.
    """

    def __init__(
        self,
        num_bytes: int = 100,
        *,
        token_file: Path | None = None,
        tls: tuple[Path, Path] | None = None,
        **limits: float,
    ) -> None:
        self.shard = OneBlock(num_bytes)
        self.budget = ByteBudget(1 << 30)
        config = ServerConfig(
            drain_s=1.0,
            token_file=token_file,
            tls_cert=tls and tls[0],
            tls_key=tls and tls[1],
        )
        self.listener = DataListener(config, cast("ShardApi", self.shard), self.budget, **limits)  # type: ignore[arg-type]
        self.port = self.listener.alternative.port

    def wait_until_idle(self) -> None:
        """Wait until no call holds bytes, and nobody is connected."""
        ends = time.monotonic() + 10
        while self.budget.used_bytes or self.listener.num_connections:
            assert time.monotonic() < ends, "a call that has ended holds something still"
            threading.Event().wait(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shard.may_answer.set()
        self.listener.stop()


def payload_of(body: bytes | bytearray) -> bytes:
    """Return the payload that the messages of an answer carry."""
    parts, at = [], 0
    while at < len(body):
        _, length = struct.unpack_from(">BI", body, at)
        encoded = bytes(body[at + 5 : at + 5 + length])
        parts.append(block_pb.FetchBlocksResponse.FromString(encoded).data)
        at += 5 + length
    return b"".join(parts)


def check(rig: ListenerRig, caller: RawCaller) -> None:
    """Check that the next answer is the shard's block."""
    headers, body, trailers = caller.answer()
    assert (headers[":status"], headers["content-type"]) == ("200", "application/grpc")
    assert trailers == {"grpc-status": "0"}
    assert payload_of(body) == rig.shard.content.tobytes()


def error_in(trailers: dict[str, str]) -> MembankError:
    """Return the error that a call ended with."""
    code = next(c for c in grpc.StatusCode if str(c.value[0]) == trailers["grpc-status"])
    details = trailers.get("grpc-status-details-bin")
    decoded = None if details is None else base64.b64decode(details + "=" * (-len(details) % 4))
    return from_rpc_status(code, unquote(trailers["grpc-message"]), decoded, "here")


LARGE_WINDOWS = setting(Setting.INITIAL_WINDOW_SIZE, 1 << 30) + wider(1 << 30)
"""A caller that takes whatever comes."""
