"""Messages of gRPC on a stream, whose payload lands where it is for."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Protocol, TypeVar

from google.protobuf.message import DecodeError

from membank.wire.data_messages import DataCodec, DataMessage
from membank.wire.http2.end import Http2End
from membank.wire.http2.frames import ProtocolError
from membank.wire.http2.pieces import Piece

M = TypeVar("M", bound=DataMessage)
M_contra = TypeVar("M_contra", bound=DataMessage, contravariant=True)

_HEAD = struct.Struct(">BI")


class CutShortError(ProtocolError):
    """The stream ends within a message."""


class PayloadTarget(Protocol[M_contra]):
    """Takes the messages of a payload stream."""

    def take(self, message: M_contra | memoryview) -> None:
        """Take a message, or its data where it has nothing else."""

    def room(self, max_bytes: int) -> list[memoryview]:
        """Return where the next data are to land, as `PayloadAssembler.room` does."""

    def landed(self, num_bytes: int) -> None:
        """Say that the next `num_bytes` are where `room` put them."""


def framed(pieces: Sequence[Piece]) -> list[Piece]:
    """Return the pieces of a serialized message with what precedes it on a stream."""
    return [_HEAD.pack(0, sum(map(len, pieces))), *pieces]


def next_message(http2: Http2End) -> tuple[bool, int] | None:
    """Wait for the next message.

    Parameters
    ----------
    http2
        Where it comes.

    Returns
    -------
    bool
        Whether it is compressed.
    int
        Its size in bytes. None in place of both = there is no further one.

    Raises
    ------
    CutShortError
        If the stream ends within what precedes a message.
    """
    if not http2.available():
        return None
    compressed, length = _HEAD.unpack(read_whole(http2, _HEAD.size))
    return bool(compressed), length


def read_whole(http2: Http2End, num_bytes: int) -> bytes:
    """Return the next bytes of a message.

    Raises
    ------
    CutShortError
        If the stream ends before.
    """
    data = http2.read(num_bytes)
    if len(data) < num_bytes:
        raise CutShortError("the stream ends within a message")
    return data


def receive(http2: Http2End, num_bytes: int, codec: DataCodec[M], target: PayloadTarget[M]) -> None:
    """Hand a message over; data of one that has nothing else are read into their place.

    Parameters
    ----------
    http2
        Where it comes.
    num_bytes
        Its size.
    codec
        Knows its type.
    target
        Takes it; whatever it raises leaves this.

    Raises
    ------
    CutShortError
        If the stream ends before.
    ProtocolError
        If it cannot be read.
    """
    # No byte of the data: those few would cost as much as all the others of the message.
    head = read_whole(http2, codec.head_bytes(num_bytes))
    start = codec.data_start(head, num_bytes)
    if start is None:
        target.take(parsed(head + read_whole(http2, num_bytes - len(head)), codec))
        return
    if start < len(head):
        target.take(memoryview(head)[start:])
    left = num_bytes - len(head)
    while left:
        available = http2.available()
        if not available:
            raise CutShortError("the stream ends within a message")
        count = http2.read_into(target.room(min(left, available)))
        target.landed(count)
        left -= count


def parsed(message: bytes, codec: DataCodec[M]) -> M | memoryview:
    """Return a message as `DataCodec.deserialize` does; `ProtocolError` where it cannot be read."""
    try:
        return codec.deserialize(message)
    except DecodeError as err:
        raise ProtocolError(f"a message that cannot be read: {err}") from err
