"""Bytes that lie in pieces, cut where a frame ends."""

from __future__ import annotations

from collections.abc import Iterable

Piece = bytes | bytearray | memoryview
"""Bytes that are sent from where they lie."""

_MAX_PIECES = 256
"""Most pieces of one cut; a system takes no more than 1,024 at a time."""


class Pieces:
    """The concatenation of pieces, to be cut from the front; false once nothing is left.

    Parameters
    ----------
    pieces
        The pieces, flat; each is asked for only when its turn comes.
    """

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = iter(pieces)
        self._piece: Piece = b""
        self._start = 0  # within that piece

    def __bool__(self) -> bool:
        while self._start == len(self._piece):
            piece = next(self._pieces, None)
            if piece is None:
                return False
            self._piece, self._start = piece, 0
        return True

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
            Its bytes; at least 1, where `max_bytes` is and anything is left.
        """
        cut: list[Piece] = []
        room = max_bytes
        while room and len(cut) < _MAX_PIECES and self:
            whole = self._piece
            if not self._start and len(whole) <= room:
                part: Piece = whole
            else:
                part = memoryview(whole)[self._start : self._start + room]
            room -= len(part)
            self._start += len(part)
            cut.append(part)
        return cut, max_bytes - room
