"""What both ends of a connection do: frames of control, windows, and the data of one stream at a time.

It multiplexes nothing and keeps nothing: what arrives is read when somebody asks for it, straight
into the memory that it is meant for, and what leaves is sent from where it lies. So a slow reader
is waited for by TCP's own window.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable

from membank.wire.http2.buffered_socket import BufferedSocket
from membank.wire.http2.frames import (
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    FRAME_HEAD,
    MAX_CONTROL_BYTES,
    MAX_FRAME_BYTES,
    MAX_STREAM,
    MAX_WINDOW,
    SETTING,
    WORD,
    Flag,
    Frame,
    ProtocolError,
    Setting,
    StreamResetError,
    frame,
    frame_head,
    header_frames,
)
from membank.wire.http2.headers import MAX_HEADER_BYTES, NO_TABLE, HeaderReader
from membank.wire.http2.pieces import Piece, Pieces

WINDOW = 32 << 20
"""Bytes that the other end may send before it hears that earlier ones were read."""
_SENT_FRAME_BYTES = 4 << 20
"""Most data of a frame that is sent: a call that its caller gave up is noticed between two."""
_MAX_REPLY_BYTES = 64 << 10
_MAX_IDLE_FRAMES = 1_000
"""Most frames in a row with which nothing gets on: to read them costs more than to make them."""


class Http2End(ABC):
    """One end of a connection.

    Parameters
    ----------
    end
        Where frames go and come from.

    Notes
    -----
    All methods raise `OSError` where the connection broke, `TimeoutError` where the time is over,
    and `ProtocolError`; those that read or send data, also `StreamResetError`. After an `OSError`
    or a `ProtocolError` the connection is of no use.
    """

    def __init__(self, end: BufferedSocket) -> None:
        self._end = end
        self._header_reader = HeaderReader()
        self._is_going = False
        # What the other end takes.
        self._peer_frame_bytes = DEFAULT_FRAME_BYTES
        self._peer_initial_window = DEFAULT_WINDOW
        self._send_window = DEFAULT_WINDOW
        self._stream_send_window = 0
        # What it may send, and what was read of that since it was last told.
        self._window = WINDOW
        self._consumed = 0
        self._stream_window = 0
        self._stream_consumed = 0
        self._stream = -1
        self._is_sent = True
        self._is_ended = True
        self._left = 0  # in the frame of data that is being read, and the padding after that
        self._padding = 0
        self._is_table_given_up = False
        # While a frame is under way, nothing may come in between.
        self._is_sending = False
        self._replies = bytearray()
        self._reset: int | None = None
        self._num_idle_frames = 0

    def refresh(self) -> None:
        """Take what came meanwhile, such as a probe or the end of the connection; wait for nothing."""
        while self._end.has_input():
            self._next_frame()

    def available(self) -> int:
        """Wait for data of the stream and return how many bytes come in one piece; 0 = no more."""
        while not self._left:
            self._skip_padding()
            if self._is_ended:
                return 0
            self._next_frame()
        return self._left

    def read_into(self, pieces: list[memoryview]) -> int:
        """Write data of the stream to memory and return how many bytes, at least 1.

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
        """Return the next data of the stream; less than `num_bytes` only at its end."""
        if num_bytes <= min(self._left, DEFAULT_FRAME_BYTES):
            data = bytes(self._end.take(num_bytes))
            self._left -= num_bytes
            self._consume(num_bytes)
            return data
        data_read = bytearray(num_bytes)
        rest = memoryview(data_read)
        while rest and (available := self.available()):
            rest = rest[self.read_into([rest[:available]]) :]
        return bytes(data_read[: num_bytes - len(rest)])

    @abstractmethod
    def _take_headers(self, stream: int, headers: dict[str, str], *, ended: bool) -> None:
        """Take headers that have come."""

    @abstractmethod
    def _awaits_data(self, stream: int) -> bool:
        """Say whether data on a stream are to be read; False = they are of no interest."""

    @property
    @abstractmethod
    def _can_be_reset(self) -> bool:
        """Whether the other end may still give the present stream up."""

    def _greet(self, preface: bytes, settings: dict[int, int]) -> None:
        """Send the settings of this end, those that both have included."""
        settings = {
            # No table: headers that have the same bytes mean the same.
            Setting.HEADER_TABLE_SIZE: 0,
            Setting.INITIAL_WINDOW_SIZE: WINDOW,
            Setting.MAX_FRAME_SIZE: MAX_FRAME_BYTES,
            Setting.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
            **settings,
        }
        body = b"".join(SETTING.pack(name, value) for name, value in settings.items())
        more = WORD.pack(WINDOW - DEFAULT_WINDOW)
        self._end.send(
            preface + frame(Frame.SETTINGS, 0, 0, body) + frame(Frame.WINDOW_UPDATE, 0, 0, more)
        )

    def _be_greeted(self) -> None:
        """Take the settings of the other end, with which it begins."""
        length, kind, flags, stream = self._frame_head()
        if kind != Frame.SETTINGS or flags & Flag.ACK:
            raise ProtocolError("the other end does not begin with its settings")
        self._control(length, kind, flags, stream)

    def _begin_stream(self, stream: int) -> None:
        self._stream = stream
        self._stream_send_window = self._peer_initial_window
        self._stream_window, self._stream_consumed = WINDOW, 0
        self._is_sent = self._is_ended = False
        self._reset = None

    def _header_frames(self, block: bytes, *, ends: bool) -> bytes:
        """Return the frames of encoded headers on the present stream."""
        if not self._is_table_given_up:
            # The other end may have said that it keeps none, and then wants to hear of it.
            self._is_table_given_up = True
            block = NO_TABLE + block
        return header_frames(block, stream=self._stream, ends=ends)

    def _send_stream(self, head: bytes, body: Iterable[Piece], tail: bytes) -> None:
        """Send the whole of this end's half of the stream, as the windows of the other end allow.

        Parameters
        ----------
        head
            Frames that precede the data.
        body
            The data, taken piece by piece; may change once this has returned.
        tail
            Frames that end the stream; empty = the last of the data does.
        """
        rest = Pieces(body)
        outgoing: list[Piece] = [head]
        while True:
            room = min(self._send_window, self._stream_send_window)
            count = min(room, self._peer_frame_bytes, _SENT_FRAME_BYTES)
            if count > 0 or not rest:
                data, count = rest.cut(max(0, count))
                is_last = not rest
                if count or not tail:
                    flags = Flag.END_STREAM if is_last and not tail else 0
                    outgoing.append(frame_head(count, Frame.DATA, flags, self._stream))
                    outgoing += data
                    self._send_window -= count
                    self._stream_send_window -= count
                if is_last:
                    break
            self._send_pieces(outgoing)
            outgoing = []
            while min(self._send_window, self._stream_send_window) <= 0:
                self._next_frame()
                self._heard_while_sending()
        self._send_pieces([*outgoing, tail] if tail else outgoing)
        self._is_sent = True

    def _send_pieces(self, pieces: list[Piece]) -> None:
        """Send whole frames; what the other end says meanwhile is listened to."""
        if not pieces:
            return
        self._is_sending = True
        self._end.send_pieces(pieces, self._take_input)
        self._is_sending = False
        self._num_idle_frames = 0
        if self._replies:
            replies, self._replies = bytes(self._replies), bytearray()
            self._end.send(replies)
        if self._reset is not None:
            raise StreamResetError(self._reset)

    def _take_input(self) -> bool:
        """Take what came while a frame is under way; False = no more before its end."""
        # Whoever gave the stream up may have begun the next one: that is for later.
        while self._reset is None and self._end.has_input():
            self._next_frame()
            self._heard_while_sending()
        return self._reset is None

    @abstractmethod
    def _heard_while_sending(self) -> None:
        """React to data that came before this end has said all; nobody reads them."""

    def _reply(self, frames: bytes) -> None:
        if not self._is_sending:
            self._end.send(frames)
            return
        self._replies += frames
        if len(self._replies) > _MAX_REPLY_BYTES:
            raise ProtocolError("the other end asks for much and takes no answer")

    def _consume(self, num_bytes: int, *, is_stray: bool = False) -> None:
        """Note what was read, and let the other end send as much again."""
        self._consumed += num_bytes
        self._stream_consumed += 0 if is_stray else num_bytes
        update = b""
        if self._consumed >= WINDOW // 2:
            update = frame(Frame.WINDOW_UPDATE, 0, 0, WORD.pack(self._consumed))
            self._window, self._consumed = self._window + self._consumed, 0
        if self._stream_consumed >= WINDOW // 2 and not self._is_ended:
            more = WORD.pack(self._stream_consumed)
            update += frame(Frame.WINDOW_UPDATE, 0, self._stream, more)
            self._stream_window += self._stream_consumed
            self._stream_consumed = 0
        if update:
            self._reply(update)

    def _frame_head(self) -> tuple[int, int, int, int]:
        high, low, kind, flags, stream = FRAME_HEAD.unpack(self._end.take(FRAME_HEAD.size))
        return high << 8 | low, kind, flags, stream & MAX_STREAM

    def _next_frame(self) -> None:
        """Read the next frame; of one with data, what precedes them."""
        self._end.check_time()
        length, kind, flags, stream = self._frame_head()
        self._num_idle_frames += 1
        if self._num_idle_frames > _MAX_IDLE_FRAMES:
            raise ProtocolError(f"{_MAX_IDLE_FRAMES} frames with which nothing gets on")
        if kind == Frame.DATA:
            self._begin_data(length, flags, stream)
        elif kind == Frame.HEADERS:
            block = self._header_block(length, flags, stream)
            headers = self._header_reader.read(block)
            self._take_headers(stream, headers, ended=bool(flags & Flag.END_STREAM))
        else:
            self._control(length, kind, flags, stream)

    def _begin_data(self, length: int, flags: int, stream: int) -> None:
        self._window -= length
        is_awaited = self._awaits_data(stream)
        if is_awaited:
            self._stream_window -= length
        if min(self._window, self._stream_window) < 0:
            raise ProtocolError("more data than the windows allow")
        if not is_awaited:
            self._skip(length)
            self._consume(length, is_stray=True)
            return
        self._left = length
        if length:
            self._num_idle_frames = 0
        self._is_ended = bool(flags & Flag.END_STREAM)
        if flags & Flag.PADDED:
            self._padding = self._pad_length(length)
            self._left -= 1 + self._padding
            self._consume(1)

    def _discard(self) -> None:
        """Skip what is left of the frame of data that is being read."""
        self._skip(self._left)
        self._consume(self._left)
        self._left = 0
        self._skip_padding()

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

    def _header_block(self, length: int, flags: int, stream: int) -> bytes:
        block = self._header_part(length, flags)
        while not flags & Flag.END_HEADERS:
            length, kind, flags, continued = self._frame_head()
            if kind != Frame.CONTINUATION or continued != stream:
                raise ProtocolError("headers are interrupted")
            if not length and not flags & Flag.END_HEADERS:
                raise ProtocolError("headers go on with nothing")  # for ever, it might
            block += self._header_bytes(length, MAX_HEADER_BYTES - len(block))
        return block

    def _header_part(self, length: int, flags: int) -> bytes:
        part = self._header_bytes(length, MAX_HEADER_BYTES)
        begin, end = 0, len(part)
        if flags & Flag.PADDED:
            begin, end = 1, end - (part[0] if part else 0)
        if flags & Flag.PRIORITY:
            begin += 5
        if begin > end:
            raise ProtocolError("a frame of headers is too short")
        return part[begin:end]

    def _header_bytes(self, length: int, max_bytes: int) -> bytes:
        """Read a whole frame of headers, which may be larger than those of control."""
        if length > max_bytes:
            raise ProtocolError("the headers are too large")
        parts = []
        while length:
            parts.append(bytes(self._end.take(min(length, MAX_CONTROL_BYTES))))
            length -= len(parts[-1])
        return b"".join(parts)

    def _control(self, length: int, kind: int, flags: int, stream: int) -> None:
        """Read a frame that holds no part of a call."""
        if kind == Frame.SETTINGS:
            self._take_settings(self._whole(length), flags, stream)
        elif kind == Frame.PING:
            payload = self._whole(length)
            if len(payload) != 8 or stream:
                raise ProtocolError("a malformed ping")
            if not flags & Flag.ACK:
                self._reply(frame(Frame.PING, Flag.ACK, 0, payload))
        elif kind == Frame.GOAWAY:
            last, _ = struct.unpack(">II", self._sized(length, 8, at_least=True))
            self._skip(length - 8)
            self._is_going = True
            self._told_to_go(last & MAX_STREAM)
        elif kind == Frame.RST_STREAM:
            (code,) = WORD.unpack(self._sized(length, 4))
            if stream == self._stream and self._can_be_reset:
                self._reset_with(code)
        elif kind == Frame.WINDOW_UPDATE:
            self._widen(WORD.unpack(self._sized(length, 4))[0] & MAX_WINDOW, stream)
        elif kind in (Frame.PUSH_PROMISE, Frame.CONTINUATION):
            raise ProtocolError(f"a frame of type {kind} that nobody awaits")
        else:
            self._skip(length)

    @abstractmethod
    def _told_to_go(self, last: int) -> None:
        """Note that the other end takes no stream after `last`."""

    def _reset_with(self, code: int) -> None:
        if not self._is_sending:
            raise StreamResetError(code)
        # The frame that is under way is sent to its end, or no other could follow it.
        self._reset = code

    def _take_settings(self, payload: bytes, flags: int, stream: int) -> None:
        if stream or len(payload) % SETTING.size or (flags & Flag.ACK and payload):
            raise ProtocolError("malformed settings")
        if flags & Flag.ACK:
            self._header_reader.forget_table()
            return
        for name, value in SETTING.iter_unpack(payload):
            if name == Setting.INITIAL_WINDOW_SIZE:
                if value > MAX_WINDOW:
                    raise ProtocolError(f"a window of {value} bytes")
                self._stream_send_window += value - self._peer_initial_window
                self._peer_initial_window = value
            elif name == Setting.MAX_FRAME_SIZE:
                if not DEFAULT_FRAME_BYTES <= value <= MAX_FRAME_BYTES:
                    raise ProtocolError(f"frames of {value} bytes")
                self._peer_frame_bytes = value
        self._reply(frame(Frame.SETTINGS, Flag.ACK, 0))

    def _widen(self, more: int, stream: int) -> None:
        if stream == 0:
            self._send_window += more
        elif stream == self._stream:
            self._stream_send_window += more
        if not more or max(self._send_window, self._stream_send_window) > MAX_WINDOW:
            raise ProtocolError(f"a window grows by {more} bytes")

    def _sized(self, length: int, size: int, *, at_least: bool = False) -> bytes:
        if length < size or (length > size and not at_least):
            raise ProtocolError(f"a frame has {length} bytes instead of {size}")
        return bytes(self._end.take(size))

    def _whole(self, length: int) -> bytes:
        if length > MAX_CONTROL_BYTES:
            raise ProtocolError(f"a frame of control has {length} bytes")
        return bytes(self._end.take(length))

    def _skip(self, length: int) -> None:
        while length:
            length -= len(self._end.take(min(length, MAX_CONTROL_BYTES)))
