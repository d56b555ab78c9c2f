"""The client's end of an HTTP/2 connection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from membank.wire.http2.buffered_socket import BufferedSocket
from membank.wire.http2.end import Http2End
from membank.wire.http2.frames import (
    MAX_STREAM,
    PREFACE,
    WORD,
    ErrorCode,
    Frame,
    ProtocolError,
    Setting,
    frame,
)
from membank.wire.http2.pieces import Piece


class Http2Connection(Http2End):
    """The client's end: one request at a time.

    Parameters
    ----------
    end
        Where frames go and come from.
    """

    def __init__(self, end: BufferedSocket) -> None:
        super().__init__(end)
        self.headers: dict[str, str] | None = None
        """Headers of the answer; None = they have not come."""
        self.trailers: dict[str, str] | None = None
        """What ended the answer; None = nothing yet, or data did."""

    @classmethod
    def open(cls, end: BufferedSocket) -> Self:
        """Exchange settings on a new connection."""
        connection = cls(end)
        connection._greet(PREFACE, {Setting.ENABLE_PUSH: 0})
        connection._be_greeted()
        return connection

    @property
    def is_usable(self) -> bool:
        """Whether another request may be made."""
        is_over = self._is_sent and self._is_ended and not self._left
        return is_over and not self._is_going and self._stream < MAX_STREAM

    def request(self, block: bytes, body: Sequence[Piece]) -> None:
        """Send a request, or as much of it as the other end hears before it answers.

        Parameters
        ----------
        block
            Its headers, encoded.
        body
            Its body, in pieces, which are sent from where they lie.
        """
        self._begin_stream(self._stream + 2)
        self.headers = self.trailers = None
        try:
            self._send_stream(self._header_frames(block, ends=False), body, b"")
        except _AnsweredError:
            # It will not hear the rest, so the connection is of no use after that.
            return

    def cancel(self) -> None:
        """Tell the other end that nobody waits for the rest of the answer."""
        if self._stream > 0 and not self._is_sending and not (self._is_ended and self._is_sent):
            code = WORD.pack(ErrorCode.CANCEL)
            self._end.send(frame(Frame.RST_STREAM, 0, self._stream, code))

    @property
    def _can_be_reset(self) -> bool:
        # Once it has answered, it only says that it does not wait for the rest of the request.
        return not self._is_ended

    def _awaits_data(self, stream: int) -> bool:
        if stream != self._stream or self._is_ended or self.headers is None:
            raise ProtocolError(f"data on stream {stream}, which awaits none")
        return True

    def _heard_while_sending(self) -> None:
        if self._is_ended or self._left:
            raise _AnsweredError

    def _take_headers(self, stream: int, headers: dict[str, str], *, ended: bool) -> None:
        if stream != self._stream or self._is_ended:
            raise ProtocolError(f"headers on stream {stream}, which awaits none")
        if self.headers is None and headers.get(":status", "").startswith("1") and not ended:
            return  # informational; those that count come later
        if self.headers is None:
            self.headers = headers
        elif not ended:
            raise ProtocolError("headers in the midst of data")
        if ended:
            self.trailers = headers
            self._is_ended = True

    def _told_to_go(self, last: int) -> None:
        if not self._is_ended and last < self._stream:
            raise ConnectionAbortedError("the other end takes no more requests")


class _AnsweredError(Exception):
    """The other end answers before it has heard all."""
