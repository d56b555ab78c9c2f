"""HTTP/2 (RFC 9113) for one request at a time per connection, whose answer may be large. Blocking.

It multiplexes nothing and keeps nothing: what arrives is read when somebody asks for it, straight
into the memory that it is meant for. So a slow reader is waited for by TCP's own window.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Self

import hpack

from membank.client.buffered_socket import BufferedSocket

Headers = Mapping[str, str]

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEAD = struct.Struct(">HBBBI")  # the length has 24 bits
_SETTING = struct.Struct(">HI")
_WORD = struct.Struct(">I")

_DEFAULT_WINDOW = 65_535
_DEFAULT_FRAME_BYTES = 16_384
_MAX_FRAME_BYTES = (1 << 24) - 1
_MAX_WINDOW = (1 << 31) - 1
_MAX_STREAM = (1 << 31) - 1
_WINDOW = 32 << 20
"""Bytes that the other end may send before it hears that earlier ones were read."""
_MAX_CONTROL_BYTES = 16_384
"""Largest frame that is kept as a whole; only those of payload are larger."""
_MAX_HEADER_BYTES = 64 << 10
_MAX_KNOWN_BLOCKS = 64


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
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


class ErrorCode(IntEnum):
    """Why a stream or a connection ends, as far as anybody looks at it."""

    NO_ERROR = 0
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


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return a frame as it travels."""
    length = len(payload)
    return _FRAME_HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream) + payload


def encode_headers(headers: Sequence[tuple[str, str]]) -> bytes:
    """Return a block of headers, or a part of one; it uses no table, so it is good for any request.

    Not by `hpack.Encoder`, which writes all that it encodes to the log, credentials included.
    """
    return b"".join(
        (b"\x10" if name == "authorization" else b"\0") + _literal(name) + _literal(value)
        for name, value in headers
    )


def _literal(text: str) -> bytes:
    """Return a string as RFC 7541, 5.2 wants it, with its length in front."""
    raw = text.encode("latin-1")
    rest = len(raw) - 0x7F
    if rest < 0:
        return bytes([len(raw)]) + raw
    length = bytearray([0x7F])
    while rest >= 0x80:
        length.append(rest & 0x7F | 0x80)
        rest >>= 7
    length.append(rest)
    return bytes(length) + raw


PROBE = frame(Frame.PING, 0, 0, b"membank?")
"""Asks whether the other end is there."""


class Http2Connection:
    """The client's end of a connection.

    Parameters
    ----------
    end
        Where frames go and come from.

    Notes
    -----
    All methods raise `OSError` where the connection broke, `TimeoutError` where the time is over,
    and `ProtocolError`; those that read, also `StreamResetError`. After any of these the connection
    is of no use.
    """

    def __init__(self, end: BufferedSocket) -> None:
        self._end = end
        self._decoder = hpack.Decoder(max_header_list_size=_MAX_HEADER_BYTES)
        self._known_blocks: dict[bytes, dict[str, str]] = {}
        self._is_going = False
        # What the other end takes.
        self._peer_frame_bytes = _DEFAULT_FRAME_BYTES
        self._peer_initial_window = _DEFAULT_WINDOW
        self._send_window = _DEFAULT_WINDOW
        self._stream_send_window = 0
        # What it may send, and what was read of that since it was last told.
        self._window = _WINDOW
        self._consumed = 0
        self._stream_window = 0
        self._stream_consumed = 0
        self._stream = -1
        self._is_sent = True
        self._is_ended = True
        self._left = 0  # in the frame of data that is being read, and the padding after that
        self._padding = 0
        self.headers: dict[str, str] | None = None
        """Headers of the answer; None = they have not come."""
        self.trailers: dict[str, str] | None = None
        """What ended the answer; None = nothing yet, or data did."""

    @classmethod
    def open(cls, end: BufferedSocket) -> Self:
        """Exchange settings on a new connection."""
        settings = {
            Setting.HEADER_TABLE_SIZE: 0,
            Setting.ENABLE_PUSH: 0,
            Setting.INITIAL_WINDOW_SIZE: _WINDOW,
            Setting.MAX_FRAME_SIZE: _MAX_FRAME_BYTES,
            Setting.MAX_HEADER_LIST_SIZE: _MAX_HEADER_BYTES,
        }
        body = b"".join(_SETTING.pack(name, value) for name, value in settings.items())
        more = _WORD.pack(_WINDOW - _DEFAULT_WINDOW)
        end.send(
            _PREFACE + frame(Frame.SETTINGS, 0, 0, body) + frame(Frame.WINDOW_UPDATE, 0, 0, more)
        )
        connection = cls(end)
        length, kind, flags, stream = connection._frame_head()
        if kind != Frame.SETTINGS or flags & Flag.ACK:
            raise ProtocolError("the other end does not begin with its settings")
        connection._control(length, kind, flags, stream)
        return connection

    @property
    def is_usable(self) -> bool:
        """Whether another request may be made."""
        is_idle = self._is_sent and self._is_ended and not self._left
        return is_idle and not self._is_going and self._stream < _MAX_STREAM

    def refresh(self) -> None:
        """Read what came between requests, such as a probe or the end of the connection."""
        while self._end.has_input():
            self._next_frame()

    def request(self, block: bytes, body: bytes) -> None:
        """Send a request.

        Parameters
        ----------
        block
            Its headers, encoded; they fit into a frame.
        body
            Its body.
        """
        self._stream += 2
        self._stream_send_window = self._peer_initial_window
        self._stream_window, self._stream_consumed = _WINDOW, 0
        self._is_sent = self._is_ended = False
        self.headers = self.trailers = None
        pending = frame(Frame.HEADERS, Flag.END_HEADERS, self._stream, block)
        at = 0
        while True:
            room = min(self._send_window, self._stream_send_window, self._peer_frame_bytes)
            part = body[at : at + max(0, room)]
            at += len(part)
            if part or at == len(body):
                self._send_window -= len(part)
                self._stream_send_window -= len(part)
                flags = Flag.END_STREAM if at == len(body) else 0
                pending += frame(Frame.DATA, flags, self._stream, part)
                if flags:
                    break
            self._end.send(pending)
            pending = b""
            if self._is_blocked():
                self._next_frame()
                if self._is_ended or self._left:
                    return  # it answers before it has heard all
        self._end.send(pending)
        self._is_sent = True

    def available(self) -> int:
        """Wait for data of the answer and return how many bytes come in one piece; 0 = no more."""
        while not self._left:
            self._skip_padding()
            if self._is_ended:
                return 0
            self._next_frame()
        return self._left

    def read_into(self, pieces: list[memoryview]) -> int:
        """Write data of the answer to memory and return how many bytes, at least 1.

        Parameters
        ----------
        pieces
            Where to; together no more than `available` bytes.
        """
        count = self._end.read_into(pieces)
        self._left -= count
        self._consume(count)
        return count

    def read(self, num_bytes: int) -> bytes:
        """Return the next data of the answer; less than `num_bytes` only at its end."""
        if num_bytes <= min(self._left, _DEFAULT_FRAME_BYTES):
            data = bytes(self._end.take(num_bytes))
            self._left -= num_bytes
            self._consume(num_bytes)
            return data
        data_read = bytearray(num_bytes)
        rest = memoryview(data_read)
        while rest and (available := self.available()):
            rest = rest[self.read_into([rest[:available]]) :]
        return bytes(data_read[: num_bytes - len(rest)])

    def cancel(self) -> None:
        """Tell the other end that nobody waits for the rest of the answer."""
        if self._stream > 0 and not (self._is_ended and self._is_sent):
            code = _WORD.pack(ErrorCode.CANCEL)
            self._end.send(frame(Frame.RST_STREAM, 0, self._stream, code))

    def _is_blocked(self) -> bool:
        return min(self._send_window, self._stream_send_window) <= 0

    def _consume(self, num_bytes: int) -> None:
        """Note what was read, and let the other end send as much again."""
        self._consumed += num_bytes
        self._stream_consumed += num_bytes
        update = b""
        if self._consumed >= _WINDOW // 2:
            update = frame(Frame.WINDOW_UPDATE, 0, 0, _WORD.pack(self._consumed))
            self._window, self._consumed = self._window + self._consumed, 0
        if self._stream_consumed >= _WINDOW // 2 and not self._is_ended:
            more = _WORD.pack(self._stream_consumed)
            update += frame(Frame.WINDOW_UPDATE, 0, self._stream, more)
            self._stream_window += self._stream_consumed
            self._stream_consumed = 0
        if update:
            self._end.send(update)

    def _frame_head(self) -> tuple[int, int, int, int]:
        high, low, kind, flags, stream = _FRAME_HEAD.unpack(self._end.take(_FRAME_HEAD.size))
        return high << 8 | low, kind, flags, stream & _MAX_STREAM

    def _next_frame(self) -> None:
        """Read the next frame; of one with data, what precedes them."""
        self._end.check_time()
        length, kind, flags, stream = self._frame_head()
        if kind == Frame.DATA:
            self._begin_data(length, flags, stream)
        elif kind == Frame.HEADERS:
            self._take_headers(length, flags, stream)
        else:
            self._control(length, kind, flags, stream)

    def _begin_data(self, length: int, flags: int, stream: int) -> None:
        if stream != self._stream or self._is_ended or self.headers is None:
            raise ProtocolError(f"data on stream {stream}, which awaits none")
        self._window -= length
        self._stream_window -= length
        if min(self._window, self._stream_window) < 0:
            raise ProtocolError("more data than the windows allow")
        self._left = length
        self._is_ended = bool(flags & Flag.END_STREAM)
        if flags & Flag.PADDED:
            self._padding = self._pad_length(length)
            self._left -= 1 + self._padding
            self._consume(1)

    def _pad_length(self, length: int) -> int:
        padding = self._end.take(1)[0] if length else 0
        if padding >= length:
            raise ProtocolError(f"padding of {padding} bytes in a frame of {length}")
        return padding

    def _skip_padding(self) -> None:
        if self._padding:
            self._skip(self._padding)
            self._consume(self._padding)
            self._padding = 0

    def _take_headers(self, length: int, flags: int, stream: int) -> None:
        if stream != self._stream or self._is_ended:
            raise ProtocolError(f"headers on stream {stream}, which awaits none")
        block = self._header_part(length, flags)
        ended = bool(flags & Flag.END_STREAM)
        while not flags & Flag.END_HEADERS:
            length, kind, flags, continued = self._frame_head()
            if kind != Frame.CONTINUATION or continued != stream:
                raise ProtocolError("headers are interrupted")
            if len(block) + length > _MAX_HEADER_BYTES:
                raise ProtocolError("the headers are too large")
            block += self._whole(length)
        headers = self._decoded(block)
        if self.headers is None and headers.get(":status", "").startswith("1") and not ended:
            return  # informational; those that count come later
        if self.headers is None:
            self.headers = headers
        elif not ended:
            raise ProtocolError("headers in the midst of data")
        if ended:
            self.trailers = headers
            self._is_ended = True

    def _header_part(self, length: int, flags: int) -> bytes:
        part = self._whole(length)
        begin, end = 0, len(part)
        if flags & Flag.PADDED:
            begin, end = 1, end - (part[0] if part else 0)
        if flags & Flag.PRIORITY:
            begin += 5
        if begin > end:
            raise ProtocolError("a frame of headers is too short")
        return part[begin:end]

    def _decoded(self, block: bytes) -> dict[str, str]:
        if block in self._known_blocks:
            return self._known_blocks[block]
        try:
            headers = {str(name): str(value) for name, value in self._decoder.decode(block)}
        except (hpack.HPACKError, UnicodeDecodeError) as err:
            raise ProtocolError(f"headers cannot be read: {err}") from err
        if not self._decoder.max_allowed_table_size and len(block) < 256:
            if len(self._known_blocks) >= _MAX_KNOWN_BLOCKS:
                self._known_blocks.clear()
            self._known_blocks[block] = headers
        return headers

    def _control(self, length: int, kind: int, flags: int, stream: int) -> None:
        """Read a frame that holds no part of an answer."""
        if kind == Frame.SETTINGS:
            self._take_settings(self._whole(length), flags, stream)
        elif kind == Frame.PING:
            payload = self._whole(length)
            if len(payload) != 8 or stream:
                raise ProtocolError("a malformed ping")
            if not flags & Flag.ACK:
                self._end.send(frame(Frame.PING, Flag.ACK, 0, payload))
        elif kind == Frame.GOAWAY:
            last, _ = struct.unpack(">II", self._sized(length, 8, at_least=True))
            self._skip(length - 8)
            self._is_going = True
            if not self._is_ended and last & _MAX_STREAM < self._stream:
                raise ConnectionAbortedError("the other end takes no more requests")
        elif kind == Frame.RST_STREAM:
            (code,) = _WORD.unpack(self._sized(length, 4))
            # Once it has answered, it only says that it does not wait for the rest of the request.
            if stream == self._stream and not self._is_ended:
                raise StreamResetError(code)
        elif kind == Frame.WINDOW_UPDATE:
            self._widen(_WORD.unpack(self._sized(length, 4))[0] & _MAX_WINDOW, stream)
        elif kind in (Frame.PUSH_PROMISE, Frame.CONTINUATION):
            raise ProtocolError(f"a frame of type {kind} that nobody awaits")
        else:
            self._skip(length)

    def _take_settings(self, payload: bytes, flags: int, stream: int) -> None:
        if stream or len(payload) % _SETTING.size or (flags & Flag.ACK and payload):
            raise ProtocolError("malformed settings")
        if flags & Flag.ACK:
            # From here on it uses no table.
            self._decoder.max_allowed_table_size = 0
            return
        for name, value in _SETTING.iter_unpack(payload):
            if name == Setting.INITIAL_WINDOW_SIZE:
                if value > _MAX_WINDOW:
                    raise ProtocolError(f"a window of {value} bytes")
                self._stream_send_window += value - self._peer_initial_window
                self._peer_initial_window = value
            elif name == Setting.MAX_FRAME_SIZE:
                if not _DEFAULT_FRAME_BYTES <= value <= _MAX_FRAME_BYTES:
                    raise ProtocolError(f"frames of {value} bytes")
                self._peer_frame_bytes = value
        self._end.send(frame(Frame.SETTINGS, Flag.ACK, 0))

    def _widen(self, more: int, stream: int) -> None:
        if stream == 0:
            self._send_window += more
        elif stream == self._stream:
            self._stream_send_window += more
        if not more or max(self._send_window, self._stream_send_window) > _MAX_WINDOW:
            raise ProtocolError(f"a window grows by {more} bytes")

    def _sized(self, length: int, size: int, *, at_least: bool = False) -> bytes:
        if length < size or (length > size and not at_least):
            raise ProtocolError(f"a frame has {length} bytes instead of {size}")
        return bytes(self._end.take(size))

    def _whole(self, length: int) -> bytes:
        if length > _MAX_CONTROL_BYTES:
            raise ProtocolError(f"a frame of control has {length} bytes")
        return bytes(self._end.take(length))

    def _skip(self, length: int) -> None:
        while length:
            length -= len(self._end.take(min(length, _MAX_CONTROL_BYTES)))
