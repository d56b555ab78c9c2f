"""Slots and manifests of one partition on the bank's storage."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from threading import Lock

from membank.bank_service.shard.content import (
    BlockRecord,
    Content,
    initial_content,
    zero_state,
)
from membank.bank_service.shard.erasing import calls_deleted, slots_named, without_content
from membank.bank_service.shard.garbage import Item, Sorting
from membank.bank_service.shard.manifest_log import LoadedManifests, ManifestLog, order_of
from membank.bank_service.shard.retention import Retention, StoredManifest
from membank.bank_service.shard.slot_sets import (
    SlotName,
    members,
    names_of,
    tops,
    union,
    without,
)
from membank.bank_service.store.arrays import SlotArrays
from membank.bank_service.store.bank import Bank
from membank.wire.errors import AlreadyExistsError, MembankError
from membank.wire.format import EntryTable, Manifest
from membank.wire.format.layout import manifest_key, number_of
from membank.wire.records import GarbageKind
from membank.wire.spec import Array, BlockRef, BlockState, Role

_MAX_WRITERS = 8
_IN_FLIGHT_BYTES = 64 << 20
"""Bytes of blocks that are written side by side, at most; one block may have more."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a partition's storage holds of some blocks."""

    slots: Mapping[BlockRef, Collection[SlotName]]
    """Slots with stored versions of each block."""
    num_manifests: int
    """Stored manifests that do not call all of the blocks deleted."""


class PartitionStore:
    """Slots and manifests of one partition.

    Used by one thread at a time, but for `load_content`.

    Slots are created, never overwritten, and their numbers are not used again: an owner that was
    replaced without knowing it can thus neither damage nor remove what its successor wrote.

    Parameters
    ----------
    bank
        The bank.
    partition
        The partition.
    retention
        How much history to keep; None = the defaults.
    """

    def __init__(self, bank: Bank, partition: int, *, retention: Retention | None = None) -> None:
        self._bank = bank
        self._partition = partition
        self._arrays = SlotArrays(bank.objects, bank.spec, partition)
        self.manifests = ManifestLog(bank, partition, retention or Retention())
        """Its manifests."""
        self._slot_lock = Lock()
        self._next_slot: dict[int, int] = {}
        # Written by this owner and named by no manifest that it knows: about to be published, or
        # by one whose publication may have succeeded although it was reported as failed.
        self._unpublished: set[SlotName] = set()

    def load_manifests(self) -> LoadedManifests:
        """Find the manifest in force.

        Raises
        ------
        CorruptionError
            If a manifest is damaged, or one that a revision names is missing.
        UnavailableError
            If the owner publishes faster than its manifests can be read (OVERLOADED).
        """
        loaded = self.manifests.load()
        for level, slot in tops(self.manifests.slots()).items():
            self._next_slot[level] = slot + 1
            # Checks the arrays' metadata, and makes it anew where it was lost.
            self._arrays.reserve(level, slot)
        return loaded

    def load_content(self, ref: BlockRef, record: BlockRecord, roles: Sequence[Role]) -> Content:
        """Return the content of `record` with at least `roles`, from memory, slot or seed.

        Raises
        ------
        CorruptionError
            If the slot is missing or damaged; also if it was removed since `record` was current.
        """
        spec = self._bank.spec
        content = record.content or Content({}, 0)
        # A copy: a removal may wipe the content at any moment.
        arrays: dict[Role, Array] = dict(content.arrays)
        if record.is_initial and Role.WEIGHT not in arrays:
            content = initial_content(spec, ref)
            arrays = dict(content.arrays)
        missing = [role for role in roles if role not in arrays]
        if not missing:
            return Content(arrays, content.weight_crc)
        if record.is_initial:
            return Content(arrays | zero_state(spec, ref), content.weight_crc)
        crcs = dict(zip(spec.roles, record.entry.crcs, strict=True))
        for role in missing:
            arrays[role] = self._arrays.read(ref.level, record.entry.slot, role, crcs[role])
        return Content(arrays, crcs[Role.WEIGHT])

    def write_blocks(self, records: Mapping[BlockRef, BlockRecord]) -> dict[BlockRef, int]:
        """Write blocks with their optimizer state to fresh slots, durably, and return the slots.

        If it fails, what was written is removed again, as far as that is possible.
        """
        slots: dict[BlockRef, int] = {}
        errors = []
        with ThreadPoolExecutor(self._num_writers(records)) as pool:
            futures = {
                ref: pool.submit(self._write_block, ref, record) for ref, record in records.items()
            }
        for ref, future in futures.items():
            try:
                slots[ref] = future.result()
            except MembankError as err:
                errors.append(err)
        try:
            if errors:
                raise errors[0]
            self._arrays.sync(
                (ref.level, slot, _stored(records[ref])) for ref, slot in slots.items()
            )
        except MembankError:
            with suppress(MembankError):
                self.release((ref.level, slot) for ref, slot in slots.items())
            raise
        return slots

    def _num_writers(self, records: Mapping[BlockRef, BlockRecord]) -> int:
        largest = max((r.content.num_bytes for r in records.values() if r.content), default=1)
        return max(1, min(_MAX_WRITERS, _IN_FLIGHT_BYTES // largest))

    def _write_block(self, ref: BlockRef, record: BlockRecord) -> int:
        arrays = _stored(record)
        while True:
            slot = self._take_slot(ref.level)
            written: list[Role] = []
            try:
                # The weight first: a slot that has any role has that, so that it is seen as taken.
                for role, crc in zip(self._bank.spec.roles, record.entry.crcs, strict=True):
                    if role in arrays:
                        self._arrays.write(ref.level, slot, role, arrays[role], crc)
                        written.append(role)
            except MembankError as err:
                self._arrays.delete(ref.level, slot, written)
                self._unpublished.discard((ref.level, slot))
                # Left by a writer that died before it published: take the next one.
                if not isinstance(err, AlreadyExistsError):
                    raise
            else:
                return slot

    def _take_slot(self, level: int) -> int:
        with self._slot_lock:
            slot = self._next_slot.get(level, 0)
            self._next_slot[level] = slot + 1
            self._unpublished.add((level, slot))
        self._arrays.reserve(level, slot)
        return slot

    def publish(self, manifest: Manifest) -> Manifest:
        """Publish `manifest` (see `ManifestLog.publish`), whose slots count from then on."""
        published = self.manifests.publish(manifest)
        named = self.manifests.slots([published.number])
        self._unpublished -= members(named, self._unpublished)
        return published

    def holdings(self, refs: Collection[BlockRef], owner: str) -> Holdings:
        """Return what is stored of `refs`."""
        self.manifests.look_again(owner)
        slots: dict[BlockRef, set[SlotName]] = {ref: set() for ref in refs}
        num_manifests = 0
        for manifest in map(self.manifests.read, self.manifests.numbers):
            num_manifests += not calls_deleted(manifest, set(refs))
            for ref in refs:
                slots[ref].update(slots_named(manifest, [ref]))
        return Holdings(slots, num_manifests)

    def retire(self) -> None:
        """Remove the manifests that nothing retained needs, and the slots that only they name."""
        for number in self.manifests.unneeded(self.manifests.history_from):
            others = [other for other in self.manifests.numbers if other != number]
            only = without(self.manifests.slots([number]), [self.manifests.slots(others)])
            # Slots first: a crash in between leaves the manifest, by which they are found again.
            self.release(names_of(only))
            self.manifests.remove(number)

    def release(self, slots: Iterable[SlotName]) -> None:
        """Remove slots that no manifest names."""
        doomed = list(slots)
        if not doomed:
            return
        # Side by side: each is a request in a bucket, and on a disk the freeing of its pages.
        with ThreadPoolExecutor(min(_MAX_WRITERS, len(doomed))) as pool:
            removals = [pool.submit(self._arrays.delete, level, slot) for level, slot in doomed]
        for name, removal in zip(doomed, removals, strict=True):
            removal.result()
            self._unpublished.discard(name)

    def garbage(
        self, history_from: int, owner: str, coming: StoredManifest | None = None
    ) -> list[Item]:
        """Return what nothing needs if history begins at `history_from`; manifests come last.

        Parameters
        ----------
        history_from
            Oldest revision that can be returned to.
        owner
            This owner.
        coming
            A manifest that is yet to be published; what is garbage once it is in force is asked.

        Raises
        ------
        UnavailableError
            If another owner took the partition over (FENCED).
        """
        # Slots are listed before manifests are: had another owner written one of them, its first
        # manifest would have been there by then. What it writes from now on it creates, so it
        # takes no slot of which an object is left, and each object is removed once.
        levels = range(1, self._bank.spec.num_levels + 1)
        chunks = [chunk for level in levels for chunk in self._arrays.stored_chunks(level)]
        self.manifests.look_again(owner)
        doomed = {
            number: GarbageKind.RETIRED_MANIFEST if counts else GarbageKind.ABANDONED_MANIFEST
            for number, counts in self.manifests.unneeded(history_from, coming).items()
        }
        kept = self.manifests.slots(n for n in self.manifests.numbers if n not in doomed)
        if coming is not None:
            kept = union([kept, coming.slots])
        sorting = Sorting(
            kept=frozenset(names_of(kept)),
            retired=frozenset(names_of(self.manifests.slots(doomed))),
            unpublished=frozenset(self._unpublished),
            next_slot=dict(self._next_slot),
        )
        items = [
            Item(kind, chunk.key, chunk.num_bytes)
            for chunk in chunks
            if (kind := sorting.kind_of(chunk)) is not None
        ]
        for number, kind in doomed.items():
            key = manifest_key(self._partition, number)
            items.append(Item(kind, key, len(self._bank.objects.get(key))))
        return items

    def remove(self, items: Iterable[Item]) -> None:
        """Remove what `garbage` found, in that order: a manifest after the slots that it names."""
        for item in items:
            self._bank.objects.delete(item.key)
            if item.kind in {GarbageKind.RETIRED_MANIFEST, GarbageKind.ABANDONED_MANIFEST}:
                self.manifests.forget(number_of(item.key))

    def purge(self, current: Manifest) -> None:
        """Destroy what storage holds of the blocks that `current` says are deleted.

        Raises
        ------
        UnavailableError
            If another owner took the partition over (FENCED).

        Notes
        -----
        May be repeated at any point after a crash. Older manifests are replaced by ones that call
        the blocks deleted; it is the one case in which an object of a number changes.
        """
        deleted = set(EntryTable.of(current.entries).in_state(BlockState.DELETED))
        if not deleted:
            return
        # Listed before the manifests are, for the reason that `garbage` gives.
        levels = {ref.level for ref in deleted}
        chunks = [chunk for level in levels for chunk in self._arrays.stored_chunks(level)]
        self.manifests.look_again(current.owner)
        stored = [self.manifests.read(number) for number in self.manifests.numbers]
        # A prepared manifest is later than `current` and may create a deleted block anew.
        older = [manifest for manifest in stored if order_of(manifest) < order_of(current)]
        affected = [manifest for manifest in older if not calls_deleted(manifest, deleted)]
        doomed = {slot for manifest in affected for slot in slots_named(manifest, deleted)}
        for level, slot in doomed:
            self._arrays.delete(level, slot)
        # What a crashed writer left in slots that no manifest names may be of these blocks too.
        used = set(names_of(self.manifests.slots()))
        for chunk in chunks:
            if (chunk.level, chunk.slot) not in used:
                self._bank.objects.delete(chunk.key)
                self._unpublished.discard((chunk.level, chunk.slot))
        # A successor may have removed some of them, which must not come back.
        self.manifests.look_again(current.owner)
        for manifest in affected:
            if manifest.number in self.manifests.numbers:
                entries = without_content(manifest.entries, deleted)
                self.manifests.put_in_place(replace(manifest, entries=entries))


def _stored(record: BlockRecord) -> Mapping[Role, Array]:
    """Return what of a block is written: all roles but a state of zeros that was never made."""
    assert record.content is not None
    return record.content.arrays
