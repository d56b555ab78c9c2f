"""What a manifest says of blocks that are to be forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from membank.bank_service.shard.content import INITIAL_ENTRY
from membank.bank_service.shard.slot_sets import SlotName
from membank.wire.format import NO_SLOT, Entry, EntryTable, Manifest
from membank.wire.spec import BlockRef, BlockState


def slots_named(manifest: Manifest, refs: Iterable[BlockRef]) -> Iterator[SlotName]:
    """Yield the slots that a manifest names for any of `refs`."""
    for ref in refs:
        entry = manifest.entries.get(ref)
        if entry is not None and entry.slot != NO_SLOT:
            yield ref.level, entry.slot


def calls_deleted(manifest: Manifest, refs: set[BlockRef]) -> bool:
    """Say whether a manifest calls all of `refs` deleted."""
    return refs.issubset(EntryTable.of(manifest.entries).in_state(BlockState.DELETED))


def without_content(entries: Mapping[BlockRef, Entry], refs: Iterable[BlockRef]) -> EntryTable:
    """Return `entries` with `refs` deleted, their versions kept.

    Blocks that `entries` does not know, as they had never been changed by then, are named as well:
    a later reader must see that what they are now is not what they were.
    """
    return EntryTable.of(entries).updated(
        {
            ref: Entry(
                slot=NO_SLOT,
                version=entries.get(ref, INITIAL_ENTRY).version,
                state=BlockState.DELETED,
            )
            for ref in refs
        }
    )
