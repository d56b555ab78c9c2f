"""Objects of a partition that nothing needs: found, counted and removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from membank.bank_service.store.arrays import Chunk
from membank.wire.records import Garbage, GarbageKind

MAX_KEYS = 10_000
"""Keys of each kind that are told; an answer is one message."""

MAX_REMOVED = 2_000
"""Objects that one call removes. It bounds how long a partition can fold nothing, and how long the
caller waits: removing an object of a bucket takes some 10 ms."""


class Item(NamedTuple):
    """An object that nothing needs."""

    kind: GarbageKind
    """Why."""
    key: str
    """Its key in the bank's storage."""
    num_bytes: int
    """Its size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sorting:
    """Where the slots of a partition belong."""

    kept: frozenset[tuple[int, int]]
    """Level and slot of those that a needed manifest names."""
    retired: frozenset[tuple[int, int]]
    """Those that other manifests name."""
    unpublished: frozenset[tuple[int, int]]
    """Those that this owner wrote and may have published, or be about to."""
    next_slot: dict[int, int]
    """Per level, the slot that this owner would take next; from there on, slots are others'."""

    def kind_of(self, chunk: Chunk) -> GarbageKind | None:
        """Return why a chunk is not needed; None = it may be."""
        name = (chunk.level, chunk.slot)
        if name in self.kept or name in self.unpublished:
            return None
        if name in self.retired:
            return GarbageKind.RETIRED_SLOT
        if chunk.slot < self.next_slot.get(chunk.level, 0):
            return GarbageKind.UNNAMED_SLOT
        return None


def summed(items: Iterable[Item]) -> tuple[Garbage, ...]:
    """Return how much there is of each kind."""
    by_kind: dict[GarbageKind, list[Item]] = {}
    for item in items:
        by_kind.setdefault(item.kind, []).append(item)
    return tuple(
        Garbage(
            kind=kind,
            num_objects=len(found),
            num_bytes=sum(item.num_bytes for item in found),
            keys=tuple(item.key for item in found[:MAX_KEYS]),
        )
        for kind, found in sorted(by_kind.items())
    )


def merged(parts: Iterable[Garbage]) -> tuple[Garbage, ...]:
    """Return the sum of `parts`, by kind."""
    by_kind: dict[GarbageKind, list[Garbage]] = {}
    for part in parts:
        by_kind.setdefault(part.kind, []).append(part)
    return tuple(
        Garbage(
            kind=kind,
            num_objects=sum(part.num_objects for part in found),
            num_bytes=sum(part.num_bytes for part in found),
            keys=tuple(islice(_keys(found), MAX_KEYS)),
        )
        for kind, found in sorted(by_kind.items())
    )


def _keys(parts: Iterable[Garbage]) -> Iterator[str]:
    for part in parts:
        yield from part.keys
