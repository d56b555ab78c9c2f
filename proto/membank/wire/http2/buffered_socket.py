"""A connected socket that is read in small pieces from a buffer, and in large ones past it."""

from __future__ import annotations

import select
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress

from membank.wire.http2.pieces import Piece

_BUFFER_BYTES = 64 << 10
"""Read at once where somebody asks for a few bytes: a small answer is one call of the system."""
_SURPLUS_BYTES = 4 << 10
"""Read beyond a large piece: the heads that follow it, and little of what would be copied twice."""
_NOT_YET = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


class BufferedSocket:
    """One end of a TCP or TLS connection. Not safe for threads, but for `shut_down`.

    Parameters
    ----------
    end
        A connected socket; closed with this.
    keepalive_s
        Silence of the other end after which it is probed, in seconds.
    keepalive_timeout_s
        Time for its answer, in seconds.
    probe
        Bytes that the other end answers with any others.

    Notes
    -----
    Whatever sends or receives raises `OSError` where the other end is gone or does not answer a
    probe, and `TimeoutError` at the time that `end_at` has set. The connection is of no use then.
    """

    def __init__(
        self, end: socket.socket, *, keepalive_s: float, keepalive_timeout_s: float, probe: bytes
    ) -> None:
        end.setblocking(False)
        self._socket = end
        self._is_plain = not isinstance(end, ssl.SSLSocket)
        self._poll = select.poll()
        self._ends = 0.0
        self._keepalive_s = keepalive_s
        self._keepalive_timeout_s = keepalive_timeout_s
        self._probe = probe
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._is_sending = False
        # What was read and is not yet taken.
        self._start = 0
        self._end = 0

    def end_at(self, ends: float) -> None:
        """Bound all that follows by a point in time of `time.monotonic`."""
        self._ends = ends

    def check_time(self) -> None:
        """Raise `TimeoutError` if the time is over, which a stream that never pauses would not."""
        if time.monotonic() >= self._ends:
            raise TimeoutError

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self._socket.send(rest) :]
            except _NOT_YET as err:
                self._wait(_awaited(err, select.POLLOUT))

    def send_pieces(self, pieces: list[Piece], take_input: Callable[[], bool]) -> None:
        """Send pieces, one after the other, from where they lie.

        Parameters
        ----------
        pieces
            The pieces; at most 1,024. Emptied.
        take_input
            Called where the other end has said something and reads nothing; may read and must not
            send. False = it wants to hear no more.
        """
        self._is_sending = True
        heed = select.POLLIN
        try:
            pieces.reverse()
            while pieces:
                try:
                    count = self._send_now(pieces)
                except _NOT_YET as err:
                    event = _awaited(err, select.POLLOUT)
                    if self._wait(event | heed) & heed and not take_input():
                        heed = 0
                    continue
                while pieces and count >= len(pieces[-1]):
                    count -= len(pieces.pop())
                if count:
                    pieces[-1] = memoryview(pieces[-1])[count:]
        finally:
            self._is_sending = False

    def wait_for_input(self, other: int, timeout_s: float) -> bool:
        """Wait, while nothing is under way, until there are bytes to take.

        Parameters
        ----------
        other
            Descriptor of another file; what can be read there ends the wait as well.
        timeout_s
            Longest wait, in seconds.

        Returns
        -------
        bool
            Whether there are, or the other end is gone.
        """
        # TLS may hold what the system has given it already.
        if self._start < self._end or (not self._is_plain and self.has_input()):
            return True
        self._poll.register(self._socket, select.POLLIN)
        self._poll.register(other, select.POLLIN)
        ready = self._poll.poll(1000 * timeout_s)
        self._poll.unregister(other)
        return any(number != other for number, _ in ready)

    def take(self, num_bytes: int) -> memoryview:
        """Return the next bytes, in memory that is good until the next call.

        Parameters
        ----------
        num_bytes
            How many, at most 16,384.
        """
        while self._end - self._start < num_bytes:
            if self._start == self._end:
                self._start = self._end = 0
            elif self._start + num_bytes > len(self._buffer):
                rest = bytes(self._buffer[self._start : self._end])
                self._buffer[: len(rest)] = rest
                self._start, self._end = 0, len(rest)
            self._end += self._receive([self._buffer[self._end :]])
        self._start += num_bytes
        return self._buffer[self._start - num_bytes : self._start]

    def read_into(self, pieces: list[memoryview]) -> int:
        """Write the next bytes to memory, as many as are there, and return how many; at least 1.

        Parameters
        ----------
        pieces
            Where to, one piece after the other; none is empty.
        """
        if self._start < self._end:
            count = min(len(pieces[0]), self._end - self._start)
            pieces[0][:count] = self._buffer[self._start : self._start + count]
            self._start += count
            return count
        count = self._receive([*pieces, self._buffer[:_SURPLUS_BYTES]])
        room = sum(map(len, pieces))
        self._start, self._end = 0, max(0, count - room)
        return min(count, room)

    def has_input(self) -> bool:
        """Say whether there are bytes to take, without waiting for any."""
        if self._start == self._end:
            try:
                self._start, self._end = 0, self._receive_now([self._buffer])
            except _NOT_YET:
                return False
        return True

    def shut_down(self) -> None:
        """End the connection; a thread that waits on it is told, and may still close it."""
        # Not of the TLS connection alone: that would wait for the other end.
        with suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection, if that was not done, and give the socket up."""
        self.shut_down()
        self._socket.close()

    def _receive(self, pieces: list[memoryview]) -> int:
        while True:
            try:
                return self._receive_now(pieces)
            except _NOT_YET as err:
                self._wait(_awaited(err, select.POLLIN))

    def _receive_now(self, pieces: list[memoryview]) -> int:
        if self._is_plain:
            count = self._socket.recvmsg_into(pieces)[0]
        else:
            count = self._socket.recv_into(pieces[0])
        if count == 0:
            raise ConnectionResetError("the other end closed the connection")
        return count

    def _send_now(self, pieces: list[Piece]) -> int:
        """Send from the last of `pieces` on, as much as is taken, and return how many bytes."""
        if self._is_plain:
            return self._socket.sendmsg(reversed(pieces))
        return self._socket.send(pieces[-1])

    def _wait(self, event: int) -> int:
        """Wait until the socket can be read or written, and return which."""
        # Where nothing can be sent, no probe can; nor within what is being sent.
        is_probed = bool(event & select.POLLOUT) or self._is_sending
        while True:
            patience = self._keepalive_timeout_s if is_probed else self._keepalive_s
            left = self._ends - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._poll.register(self._socket, event)
            if ready := self._poll.poll(1000 * min(left, patience)):
                return ready[0][1]
            if left <= patience:
                continue
            if is_probed:
                raise ConnectionAbortedError("the other end is silent, also where it is probed")
            is_probed = True
            self.send(self._probe)


def _awaited(err: OSError, event: int) -> int:
    """Return what to wait for: TLS may have to read before it can write, and the reverse."""
    if isinstance(err, ssl.SSLWantReadError):
        return select.POLLIN
    return select.POLLOUT if isinstance(err, ssl.SSLWantWriteError) else event
