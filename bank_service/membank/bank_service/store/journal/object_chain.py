"""How the objects of a journal continue each other; reads and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from membank.bank_service.store.journal.frames import (
    SegmentHead,
    SegmentScan,
    check_chain,
    corrupt,
)
from membank.wire.format.layout import number_of


def check_object_chain(scans: Sequence[SegmentScan], identity: str) -> int:
    """Check that objects form a journal; return the index of the one where the log starts.

    Parameters
    ----------
    scans
        All objects of a partition's log, by ascending number; each is named by its key.
    identity
        Whose journal it should be.

    Returns
    -------
    int
        Objects before it are fences, or were given up by the owner that wrote it, which may have
        died before it could remove them.

    Raises
    ------
    CorruptionError
        If an object is cut short or not in its place, or one is missing (JOURNAL_CORRUPT; metadata
        `file` and `offset`).
    FailedPreconditionError
        If an object belongs to another bank or partition (BAD_CONFIG).
    """
    for found in scans:
        require_object(found)
    runs = list(_runs(scans))
    for run, after in pairwise(runs):
        check_chain(run, identity)
        # Fences stay where the rest was trimmed; anything else before a gap was lost.
        if not _is_bare_fence(run[-1]):
            raise _missing(run[-1], after[0])
    if not runs:
        return 0
    return len(scans) - len(runs[-1]) + check_chain(runs[-1], identity)


def require_object(found: SegmentScan) -> SegmentHead:
    """Return the head of an object.

    Raises
    ------
    CorruptionError
        If the object is cut short, or was written under another name.
    """
    # An object is there whole or not at all, so nothing in it was left by a writer that died.
    if found.head is None or found.torn is not None or found.last != found.head.last:
        raise corrupt(found.name, found.num_bytes, "the object is cut short")
    if found.is_continued or found.head.number != number_of(found.name):
        raise corrupt(found.name, 0, f"it was written as object {found.head.number}")
    return found.head


def _runs(scans: Sequence[SegmentScan]) -> Iterator[list[SegmentScan]]:
    """Yield the parts of `scans` between which something was trimmed."""
    run: list[SegmentScan] = []
    for found in scans:
        if run and (_number(found) != _number(run[-1]) + 1 or _is_stray(run[-1], found)):
            yield run
            run = []
        run.append(found)
    if run:
        yield run


def _is_bare_fence(found: SegmentScan) -> bool:
    assert found.head is not None
    return found.head.is_fence and found.last == found.head.base


def _is_stray(found: SegmentScan, after: SegmentScan) -> bool:
    # An owner that was in doubt of a batch, and slept until another had trimmed that, fills the gap
    # with a fence before it meets that other's fence.
    assert after.head is not None
    return _is_bare_fence(found) and found.last != after.head.follows


def _number(found: SegmentScan) -> int:
    return number_of(found.name)


def _missing(before: SegmentScan, after: SegmentScan) -> Exception:
    folder = before.name.rsplit("/", 1)[0]
    name = f"{folder}/{_number(before) + 1:010d}"
    return corrupt(name, 0, f"missing between objects {_number(before)} and {_number(after)}")
