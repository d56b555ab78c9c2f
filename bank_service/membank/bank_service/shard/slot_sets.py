"""Sets of slots as sorted arrays: a partition remembers one for every manifest that it keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from membank.wire.format import NO_SLOT, Manifest
from membank.wire.format.entries import EntryTable

SlotName = tuple[int, int]
"""Level and slot."""

SlotSet = npt.NDArray[np.uint64]
"""Slots, each as ``level << 32 | slot``, sorted, none twice: 8 bytes each, where a set of tuples
takes some 150."""

_SHIFT = 32


def slot_set(names: Iterable[SlotName]) -> SlotSet:
    """Return the set of `names`."""
    return np.unique(_packed(names))


def slots_of(manifest: Manifest) -> SlotSet:
    """Return the slots that a manifest names."""
    return EntryTable.of(manifest.entries).slots()


def names_of(slots: SlotSet) -> Iterator[SlotName]:
    """Yield the members, by level, then by slot."""
    for packed in slots.tolist():
        yield packed >> _SHIFT, packed & NO_SLOT


def union(sets: Iterable[SlotSet]) -> SlotSet:
    """Return what is in any of `sets`."""
    return np.unique(np.concatenate([np.empty(0, np.uint64), *sets]))


def without(slots: SlotSet, others: Iterable[SlotSet]) -> SlotSet:
    """Return the members of `slots` that are in none of `others`."""
    for other in others:
        slots = np.setdiff1d(slots, other, assume_unique=True)
    return slots


def members(slots: SlotSet, names: Iterable[SlotName]) -> set[SlotName]:
    """Return those of `names` that are in `slots`."""
    asked = list(names)
    return {
        name for name, is_in in zip(asked, np.isin(_packed(asked), slots), strict=True) if is_in
    }


def tops(slots: SlotSet) -> dict[int, int]:
    """Return the greatest slot of each level."""
    levels = slots >> np.uint64(_SHIFT)
    last = np.flatnonzero(np.append(levels[1:] != levels[:-1], True)) if len(slots) else ()
    return dict(names_of(slots[np.array(last, np.intp)]))


def _packed(names: Iterable[SlotName]) -> SlotSet:
    return np.array([level << _SHIFT | slot for level, slot in names], np.uint64)
