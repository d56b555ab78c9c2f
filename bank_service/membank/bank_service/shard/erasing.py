"""What a manifest says of blocks that are to be forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from membank.bank_service.shard.slot_sets import SlotName
from membank.wire.format import NO_SLOT, Entry, Manifest
from membank.wire.spec import BlockRef, BlockState


def slots_named(manifest: Manifest, refs: Iterable[BlockRef]) -> Iterator[SlotName]:
    """Yield the slots that a manifest names for any of `refs`."""
    for ref in refs:
        entry = manifest.entries.get(ref)
        if entry is not None and entry.slot != NO_SLOT:
            yield ref.level, entry.slot


def names_content(manifest: Manifest, refs: set[BlockRef]) -> bool:
    """Say whether a manifest knows any of `refs` as something else than deleted."""
    return any(
        ref in refs and entry.state is not BlockState.DELETED
        for ref, entry in manifest.entries.items()
    )


def without_content(
    entries: Mapping[BlockRef, Entry], refs: set[BlockRef]
) -> dict[BlockRef, Entry]:
    """Return `entries` with `refs` deleted, their versions kept."""
    return {
        ref: Entry(slot=NO_SLOT, version=entry.version, state=BlockState.DELETED)
        if ref in refs
        else entry
        for ref, entry in entries.items()
    }
