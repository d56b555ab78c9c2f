"""Messages that carry nothing but payload bytes, read and written without the generated code.

protobuf copies a bytes field when it is set, when its message is serialized, and when it is parsed.
For a stream of payloads these are half of all copies, so here the few bytes around the payload are
put on and taken off by hand. On the wire nothing changes: whatever is not exactly one data field
goes through the generated code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Generic, Protocol, Self, TypeVar, cast

from google.protobuf.message import Message

_LENGTH_DELIMITED = 2
_MAX_LENGTH_BYTES = 5
"""Of a varint that says how long a field is; more than 32 bits fit into no message."""

DATA_HEAD_BYTES = 2 + _MAX_LENGTH_BYTES
"""Most bytes in front of the data of a message that has nothing else."""


class DataMessage(Protocol):
    """A message with a field ``bytes data``, beside whatever else."""

    data: bytes
    """The next payload bytes."""

    def SerializeToString(self) -> bytes:
        # docstring inherited
        ...

    @classmethod
    def FromString(cls, s: bytes) -> Self:
        # docstring inherited
        ...


M = TypeVar("M", bound=DataMessage)


class DataCodec(Generic[M]):
    """Serializer and deserializer of one type of message of a payload stream.

    Parameters
    ----------
    kind
        The generated class; its payload field is called ``data``.
    """

    def __init__(self, kind: type[M]) -> None:
        self._kind = kind
        number = cast("type[Message]", kind).DESCRIPTOR.fields_by_name["data"].number
        self._tag = _varint(number << 3 | _LENGTH_DELIMITED)
        # All but the last message of a stream have the same one.
        self._head = lru_cache(maxsize=64)(lambda length: self._tag + _varint(length))
        self._head_bytes = lru_cache(maxsize=64)(self._counted_head_bytes)

    def encode(self, parts: Sequence[memoryview]) -> bytes:
        """Return the serialized message whose data are `parts`, one after the other.

        Parameters
        ----------
        parts
            Flat views of bytes; copied once.
        """
        return b"".join(self.pieces(parts))

    def pieces(self, parts: Sequence[memoryview]) -> list[bytes | bytearray | memoryview]:
        """Return what `encode` does, in pieces: nothing is copied."""
        return [self._head(sum(map(len, parts))), *parts]

    def serialize(self, message: M | bytes) -> bytes:
        """Return a message as it travels; one that `encode` made is that already."""
        return message if isinstance(message, bytes) else message.SerializeToString()

    def deserialize(self, encoded: bytes) -> M | memoryview:
        """Return a message, or a view of its data where it has nothing else.

        Raises
        ------
        google.protobuf.message.DecodeError
            If it is no message of this type.
        """
        start = self.data_start(encoded[:DATA_HEAD_BYTES], len(encoded))
        return self._kind.FromString(encoded) if start is None else memoryview(encoded)[start:]

    def head_bytes(self, num_bytes: int) -> int:
        """Return how many bytes precede the data of a message of `num_bytes` that has nothing else.

        Where no such message has that size, or this, `data_start` says so of them.
        """
        return self._head_bytes(num_bytes)

    def data_start(self, head: bytes, num_bytes: int) -> int | None:
        """Return where the data of a message begin, or None where it has anything else.

        Parameters
        ----------
        head
            The first `DATA_HEAD_BYTES` of the message, or all where it has less.
        num_bytes
            Size of the message.
        """
        if not head.startswith(self._tag):
            return None
        length, at = 0, len(self._tag)
        for shift, byte in enumerate(head[at : at + _MAX_LENGTH_BYTES]):
            length |= (byte & 0x7F) << (7 * shift)
            at += 1
            if byte < 0x80:
                return at if at + length == num_bytes else None
        return None

    def _counted_head_bytes(self, num_bytes: int) -> int:
        for head_bytes in range(len(self._tag) + 1, DATA_HEAD_BYTES):
            if num_bytes - head_bytes < 1 << 7 * (head_bytes - len(self._tag)):
                return min(num_bytes, head_bytes)
        return min(num_bytes, DATA_HEAD_BYTES)


def data_of(message: DataMessage | memoryview) -> bytes | memoryview:
    """Return the payload bytes of what `DataCodec.deserialize` returned."""
    return message if isinstance(message, memoryview) else message.data


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
