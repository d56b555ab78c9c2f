"""The server's end of an HTTP/2 connection."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Self

from membank.wire.http2.buffered_socket import BufferedSocket
from membank.wire.http2.end import Http2End
from membank.wire.http2.frames import (
    PREFACE,
    WORD,
    ErrorCode,
    Frame,
    ProtocolError,
    Setting,
    frame,
)
from membank.wire.http2.pieces import Piece


class ServerEnd(Http2End):
    """The server's end: one request at a time, further ones are refused.

    Parameters
    ----------
    end
        Where frames go and come from.
    stall_s
        Seconds within which the other end must take or send the next piece of a call.
    """

    def __init__(self, end: BufferedSocket, *, stall_s: float) -> None:
        super().__init__(end)
        self._stall_s = stall_s
        self._ends = 0.0
        self._highest = 0  # stream that the other end has begun
        self._begun: list[dict[str, str]] = []  # headers of the request that has come, if one has

    @classmethod
    def open(cls, end: BufferedSocket, *, stall_s: float) -> Self:
        """Exchange settings on a new connection."""
        connection = cls(end, stall_s=stall_s)
        connection.end_at(time.monotonic() + stall_s)
        connection._greet(b"", {Setting.MAX_CONCURRENT_STREAMS: 1})
        if end.take(len(PREFACE)) != PREFACE:
            raise ProtocolError("the other end does not speak HTTP/2")
        connection._be_greeted()
        return connection

    @property
    def is_usable(self) -> bool:
        """Whether another request may come."""
        is_over = self._is_sent and self._is_ended and not self._is_sending
        return is_over and not self._is_going

    def end_at(self, ends: float) -> None:
        """Bound all that follows by a point in time of `time.monotonic`."""
        self._ends = ends
        self._end.end_at(min(ends, time.monotonic() + self._stall_s))

    def next_request(self) -> dict[str, str] | None:
        """Return the headers of the next request; None = something else came, such as a probe."""
        self._discard()
        while not self._begun and self._end.has_input():
            self._next_frame()
        return self._begun.pop() if self._begun else None

    def answer(self, head: bytes, body: Iterable[Piece] = (), trailers: bytes = b"") -> None:
        """Answer the request.

        Parameters
        ----------
        head
            Headers, encoded.
        body
            The body, in pieces, which are sent from where they lie, and made as they are needed.
        trailers
            What follows it, encoded; empty = the headers are the whole answer.
        """
        first = self._header_frames(head, ends=not trailers)
        if trailers:
            self._send_stream(first, body, self._header_frames(trailers, ends=True))
        else:
            self._send_pieces([first])
            self._is_sent = True
        if not self._is_ended:
            # The rest of the request need not be sent.
            self.reset(ErrorCode.NO_ERROR)

    def reset(self, code: ErrorCode) -> None:
        """Give the present stream up and say why."""
        self._end.send(frame(Frame.RST_STREAM, 0, self._stream, WORD.pack(code)))
        self.give_up()

    def give_up(self) -> None:
        """Expect and say nothing more on the present stream: the other end has given it up."""
        self._is_sent = self._is_ended = True

    def go_away(self, code: ErrorCode = ErrorCode.NO_ERROR) -> None:
        """Say that no further request is heard, if that can be said now."""
        if not self._is_sending:
            self.end_at(time.monotonic() + self._stall_s)
            self._end.send(frame(Frame.GOAWAY, 0, 0, WORD.pack(self._highest) + WORD.pack(code)))

    @property
    def _can_be_reset(self) -> bool:
        return not self._is_sent

    def _awaits_data(self, stream: int) -> bool:
        if not 0 < stream <= self._highest:
            raise ProtocolError(f"data on stream {stream}, which has not begun")
        return stream == self._stream and not self._is_ended

    def _heard_while_sending(self) -> None:
        self._discard()

    def _told_to_go(self, last: int) -> None:
        # It begins no further call; the one at hand is answered.
        pass

    def _take_input(self) -> bool:
        # A refusal may be sent in the midst of a frame.
        self._discard()
        return super()._take_input()

    def _send_pieces(self, pieces: list[Piece]) -> None:
        # Each frame has a time of its own: who takes the last one slowly shall not live on the
        # patience that was meant for all.
        self.end_at(self._ends)
        super()._send_pieces(pieces)

    def _take_headers(self, stream: int, headers: dict[str, str], *, ended: bool) -> None:
        if not stream % 2:
            raise ProtocolError(f"a client's stream has the number {stream}")
        if stream <= self._highest:
            # What follows a body says nothing here, and nor does a stream that was given up.
            if stream == self._stream and not self._is_ended:
                if not ended:
                    raise ProtocolError("headers in the midst of data")
                self._is_ended = True
            return
        self._highest = stream
        if not self._is_sent:
            refused = WORD.pack(ErrorCode.REFUSED_STREAM)
            self._reply(frame(Frame.RST_STREAM, 0, stream, refused))
            return
        self._begin_stream(stream)
        self._is_ended = ended
        self._begun.append(headers)
