"""Bytes that lie in pieces, cut where a frame ends."""

from __future__ import annotations

from collections.abc import Sequence

Piece = bytes | bytearray | memoryview
"""Bytes that are sent from where they lie."""

_MAX_PIECES = 256
"""Most pieces of one cut; a system takes no more than 1,024 at a time."""


class Pieces:
    """The concatenation of pieces, to be cut from the front.

    Parameters
    ----------
    pieces
        The pieces, flat.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.num_bytes = sum(map(len, pieces))
        """Bytes that are left."""
        self._pieces = pieces
        self._next = 0
        self._start = 0  # within that piece

    def cut(self, max_bytes: int) -> tuple[list[Piece], int]:
        """Cut the next bytes off.

        Parameters
        ----------
        max_bytes
            Most bytes.

        Returns
        -------
        list of Piece
            What was cut off, without a copy.
        int
            Its bytes; at least 1, where `max_bytes` and `num_bytes` are.
        """
        cut: list[Piece] = []
        room = max_bytes
        while room and self._next < len(self._pieces) and len(cut) < _MAX_PIECES:
            piece = self._pieces[self._next]
            if not self._start and len(piece) <= room:
                part: Piece = piece
            else:
                part = memoryview(piece)[self._start : self._start + room]
            room -= len(part)
            self._start += len(part)
            if self._start == len(piece):
                self._next, self._start = self._next + 1, 0
            if part:
                cut.append(part)
        count = max_bytes - room
        self.num_bytes -= count
        return cut, count
