"""Files of segments that are no longer needed, kept to be written over by the next ones.

To write over pages that the system has in memory already takes a fifth of the time, or less, of what
it takes to find fresh ones. A spare is of use to the process that made it only: whoever opens a
journal removes what one that was killed left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from membank.bank_service.store.local_objects import sync_folder

SPARE_SUFFIX = ".spare"
"""Ends the names of spares; what is before it counts them."""


@dataclass(frozen=True, slots=True)
class Spare:
    """A file that may be written over."""

    path: Path
    """The file."""
    num_bytes: int
    """Its length."""


class Spares:
    """The spares of one journal. `take`, `add` and `drop` are for the holder of the journal's lock.

    Parameters
    ----------
    folder
        Directory of the journal.
    max_bytes
        Most bytes that are kept; 0 = none.
    sync
        True to make a file's new name survive a loss of power before it is written over: under
        its old one it would be taken for a segment, and for a damaged one.
    remove_file
        Removes a file.
    """

    def __init__(
        self, folder: Path, max_bytes: int, *, sync: bool, remove_file: Callable[[Path], None]
    ) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._sync = sync
        self._remove_file = remove_file
        self._numbers = itertools.count(1)
        self._spares: list[Spare] = []

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return sum(spare.num_bytes for spare in self._spares)

    def sweep(self) -> None:
        """Remove what a process that was killed left."""
        for path in self._folder.glob(f"*{SPARE_SUFFIX}"):
            self._remove(path)

    def retire(self, path: Path) -> Spare | None:
        """Take its name from a segment; return the spare, to be added, or None if it is removed.

        One thread at a time may do that; it needs no lock.
        """
        if self.num_bytes + path.stat().st_size > self._max_bytes:
            self._remove(path)
            return None
        place = self._folder / f"{next(self._numbers):010d}{SPARE_SUFFIX}"
        path.rename(place)
        if self._sync:
            sync_folder(self._folder)
        # Not before: until then the journal may cut what is behind the frames. Where a file is
        # shorter than its head says, what is left in it of an earlier segment looks like damage.
        return Spare(place, place.stat().st_size)

    def add(self, spare: Spare) -> None:
        """Offer a spare to the next segment."""
        self._spares.append(spare)

    def take(self) -> Spare | None:
        """Hand the largest spare over; None = there is none."""
        if not self._spares:
            return None
        spare = max(self._spares, key=lambda spare: spare.num_bytes)
        self._spares.remove(spare)
        return spare

    def drop(self) -> None:
        """Remove them all."""
        while self._spares:
            self._remove(self._spares[-1].path)
            self._spares.pop()

    def _remove(self, path: Path) -> None:
        with suppress(FileNotFoundError):
            self._remove_file(path)
