"""Segments in files: their names, and what the owner of a journal remembers of each."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from membank.bank_service.store.journal.contract import Ownership
from membank.bank_service.store.journal.frames import Life, SegmentHead, SegmentScan, corrupt
from membank.bank_service.store.journal.spares import Spare
from membank.bank_service.store.objects import storage_error

SEGMENT_SUFFIX = ".log"
"""Ends the names of segments."""

_MARK_BYTES = 1 << 20
_MAX_SALT = (1 << 32) - 1


@dataclass(slots=True)
class Segment:
    """A segment, as its owner knows it; changed by the holder of the journal's lock alone."""

    path: Path
    """The file."""
    base: int
    """LSN before its first frame."""
    last: int
    """LSN of its last frame; `base` where it has none."""
    ownership: Ownership
    """Who wrote it."""
    num_bytes: int
    """Bytes of its frames, without the note that there is a next one."""
    marks: list[tuple[int, int]]
    """(LSN, offset after its frame), ascending: from where a later frame may be looked for."""
    life: Life | None = None
    """Set where it was written over an earlier one."""
    note_bytes: int = 0
    """Bytes after its frames that say that there is a next one."""
    is_cut: bool = False
    """True once nothing of an earlier one is left behind all that."""

    @property
    def rank(self) -> tuple[int, int]:
        """What orders segments: an owner may start anew, before segments of earlier ones."""
        return self.ownership.epoch, self.base

    def add(self, last: int, num_bytes: int) -> None:
        """Take note of frames up to `last` that were written."""
        self.num_bytes += num_bytes
        self.last = last
        if self.num_bytes - self.marks[-1][1] >= _MARK_BYTES:
            self.marks.append((last, self.num_bytes))

    def offset_before(self, lsn: int) -> int:
        """Return an offset behind which every frame later than `lsn` is."""
        return max((offset for known, offset in self.marks if known <= lsn), default=0)


def new_life(spare: Spare) -> Life:
    """Return what sets the frames of a segment apart that is written over `spare`."""
    return Life(secrets.randbelow(_MAX_SALT) + 1, spare.num_bytes)


def segment_of(path: Path, head: SegmentHead, found: SegmentScan) -> Segment:
    """Return a segment of an owner before, of which nothing but its frames is left."""
    marks = [(head.base, 0)]
    return Segment(
        path, head.base, found.last, head.ownership, found.num_bytes, marks, head.life, is_cut=True
    )


def read_part(path: Path, start: int, end: int) -> bytes:
    """Return the bytes from `start` to `end` of a segment.

    Raises
    ------
    CorruptionError
        If it is shorter (JOURNAL_CORRUPT).
    NotFoundError
        If it was removed (OBJECT_MISSING).
    """
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), end - start, start)
    except OSError as err:
        raise storage_error(err, str(path)) from err
    if len(data) < end - start:
        raise corrupt(str(path), start + len(data), "the file became shorter")
    return data


def require_name(path: Path, found: SegmentScan) -> None:
    """Raise `CorruptionError` unless a segment has the name that its head says."""
    head = found.head
    if head is not None and path.name != segment_name(head.base, head.ownership.epoch):
        raise corrupt(str(path), 0, f"it holds {segment_name(head.base, head.ownership.epoch)}")


def rank_of(path: Path) -> tuple[int, int]:
    """Return the rank of a segment by its name."""
    base, _, epoch = path.name.removesuffix(SEGMENT_SUFFIX).partition("-")
    try:
        return int(epoch), int(base)
    except ValueError as err:
        raise corrupt(str(path), 0, "its name is not that of a segment") from err


def segment_name(base: int, epoch: int) -> str:
    """Return the name of the segment after LSN `base` of the owner `epoch`."""
    return f"{base:020d}-{epoch:010d}{SEGMENT_SUFFIX}"
