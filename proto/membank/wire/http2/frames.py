"""Frames, and what both ends of a connection know about them."""

from __future__ import annotations

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""What a client says first."""
FRAME_HEAD = struct.Struct(">HBBBI")
"""Precedes each frame: length (24 bits, so in two parts), type, flags, stream."""
SETTING = struct.Struct(">HI")
WORD = struct.Struct(">I")

DEFAULT_WINDOW = 65_535
DEFAULT_FRAME_BYTES = 16_384
MAX_FRAME_BYTES = (1 << 24) - 1
MAX_WINDOW = (1 << 31) - 1
MAX_STREAM = (1 << 31) - 1
MAX_CONTROL_BYTES = 16_384
"""Largest frame that is kept as a whole; only those of headers and payload are larger."""


class Frame(IntEnum):
    """Types of frames."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag(IntEnum):
    """Flags of frames."""

    ACK = 0x1
    END_STREAM = 0x1
    END_HEADERS = 0x4
    PADDED = 0x8
    PRIORITY = 0x20


class Setting(IntEnum):
    """Names of settings."""

    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ErrorCode(IntEnum):
    """Why a stream or a connection ends, as far as anybody looks at it."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    REFUSED_STREAM = 7
    CANCEL = 8
    ENHANCE_YOUR_CALM = 11
    INADEQUATE_SECURITY = 12


class ProtocolError(Exception):
    """The other end says what is no HTTP/2, or more than it may."""


class StreamResetError(Exception):
    """The other end gave the stream up.

    Parameters
    ----------
    code
        Its `ErrorCode`.
    """

    def __init__(self, code: int) -> None:
        super().__init__(f"the stream was reset with code {code}")
        self.code = code


def frame_head(length: int, kind: int, flags: int, stream: int) -> bytes:
    """Return what precedes the `length` bytes of a frame."""
    return FRAME_HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame as it travels."""
    return frame_head(len(payload), kind, flags, stream) + payload


def header_frames(block: bytes, *, stream: int, ends: bool) -> bytes:
    """Return the frames of a block of headers.

    Parameters
    ----------
    block
        The headers, encoded, of any size.
    stream
        Their stream.
    ends
        Whether nothing follows them on it.
    """
    first, rest = block[:DEFAULT_FRAME_BYTES], block[DEFAULT_FRAME_BYTES:]
    flags = Flag.END_STREAM if ends else 0
    frames = frame(Frame.HEADERS, flags | (0 if rest else Flag.END_HEADERS), stream, first)
    while rest:
        part, rest = rest[:DEFAULT_FRAME_BYTES], rest[DEFAULT_FRAME_BYTES:]
        frames += frame(Frame.CONTINUATION, 0 if rest else Flag.END_HEADERS, stream, part)
    return frames


PROBE = frame(Frame.PING, 0, 0, b"membank?")
"""Asks whether the other end is there."""
