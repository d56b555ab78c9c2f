"""Slots and manifests of one partition on the bank's storage."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from threading import Lock

from membank.bank_service.shard.content import (
    BlockRecord,
    Content,
    initial_content,
    zero_state,
)
from membank.bank_service.shard.erasing import calls_deleted, slots_named, without_content
from membank.bank_service.shard.garbage import Item, Sorting
from membank.bank_service.shard.loading import LoadedManifests, bases_of
from membank.bank_service.shard.retention import Chain, Retention, StoredManifest
from membank.bank_service.shard.slot_sets import (
    SlotName,
    members,
    names_of,
    slots_of,
    tops,
    union,
    without,
)
from membank.bank_service.store.arrays import SlotArrays
from membank.bank_service.store.bank import Bank
from membank.wire.errors import (
    AlreadyExistsError,
    CorruptionError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format import EntryTable, Manifest, encode_manifest
from membank.wire.format.layout import manifest_key, number_of, revision_key
from membank.wire.records import GarbageKind
from membank.wire.spec import Array, BlockRef, BlockState, Role

_LISTINGS = 8
_MAX_WRITERS = 8
_IN_FLIGHT_BYTES = 64 << 20
"""Bytes of blocks that are written side by side, at most; one block may have more."""


class PartitionStore:
    """Slots and manifests of one partition.

    Used by one thread at a time, but for `load_content` and `require_sole_owner`.

    Slots are created, never overwritten, and their numbers are not used again: an owner that was
    replaced without knowing it can thus neither damage nor remove what its successor wrote.

    The next manifest has the number after the greatest that is stored, always. So an owner that was
    replaced and its successor meet on a number, and the one that comes late is fenced off. That is
    why the manifest with the greatest number is never removed, whatever it is.

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
        self._retention = retention or Retention()
        self._arrays = SlotArrays(bank.objects, bank.spec, partition)
        self._stored: dict[int, StoredManifest] = {}
        self._slot_lock = Lock()
        self._next_slot: dict[int, int] = {}
        self._next_number = 1
        self._first_own = 0
        # Prepared by this owner and there, although its caller was told that it could not be.
        self._given_up: set[int] = set()
        # Own manifests that a renewal of the lease came across before anybody noted them.
        self._own_seen: set[int] = set()
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
        loaded = self._read_stored()
        self._require_named(loaded.current)
        for level, slot in self._next_slot.items():
            # Checks the arrays' metadata, and makes it anew where it was lost.
            self._arrays.reserve(level, slot - 1)
        return loaded

    def _read_stored(self) -> LoadedManifests:
        for _ in range(_LISTINGS):
            with suppress(NotFoundError):  # retired since it was listed, as a newer one is there
                return self._read_listed(self._bank.manifest_numbers(self._partition))
        raise UnavailableError(
            f"the manifests of partition {self._partition} change faster than they can be read: "
            "its owner is at work; retry",
            reason=Reason.OVERLOADED,
            metadata={"partition": str(self._partition)},
        )

    def _read_listed(self, numbers: Iterable[int]) -> LoadedManifests:
        current: Manifest | None = None
        undecided: Manifest | None = None
        before: Manifest | None = None
        last_published: Manifest | None = None
        self._stored.clear()
        for number in numbers:
            manifest = self.manifest(number)
            self._note(manifest)
            match self._counts(manifest):
                case None:
                    undecided = manifest
                case True:
                    if current is None or _order(current) < _order(manifest):
                        current = manifest
                    before, last_published = last_published, manifest
        return LoadedManifests(current, undecided, last_published, bases_of(before, last_published))

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
            self._arrays.sync((ref.level, slot) for ref, slot in slots.items())
        except MembankError:
            with suppress(MembankError):
                self.release((ref.level, slot) for ref, slot in slots.items())
            raise
        return slots

    def _num_writers(self, records: Mapping[BlockRef, BlockRecord]) -> int:
        largest = max((r.content.num_bytes for r in records.values() if r.content), default=1)
        return max(1, min(_MAX_WRITERS, _IN_FLIGHT_BYTES // largest))

    def _write_block(self, ref: BlockRef, record: BlockRecord) -> int:
        assert record.content is not None
        while True:
            slot = self._take_slot(ref.level)
            written: list[Role] = []
            try:
                for role, crc in zip(self._bank.spec.roles, record.entry.crcs, strict=True):
                    self._arrays.write(ref.level, slot, role, record.content.arrays[role], crc)
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
        """Publish `manifest` under the next number, with a fresh nonce, and return it so.

        Raises
        ------
        UnavailableError
            If another owner published one of this number: this one is fenced off (FENCED).
        """
        floor = self._retention.floor(self._bank, manifest.revision)
        while True:
            numbered = replace(
                manifest,
                partition=self._partition,
                number=self._next_number,
                nonce=uuid.uuid4().hex,
                history_from=max(manifest.history_from, floor),
            )
            try:
                self._bank.publish_manifest(numbered)
            except AlreadyExistsError as err:
                # An earlier one of ours, whose publication was reported as failed?
                if not self._note_failed(manifest.owner):
                    raise self._fenced(numbered.number) from err
            else:
                self._first_own = self._first_own or numbered.number
                self._note(numbered)
                return numbered

    def is_unpublished(self, owner: str) -> bool:
        """Say whether a manifest whose publication failed is surely not there.

        A request that is repeated may fail for good after an earlier try succeeded unheard.
        """
        with suppress(MembankError):
            return not self._note_failed(owner)
        return False

    def _note_failed(self, owner: str) -> bool:
        """Take note of the manifest of the next number, if there is one by `owner`."""
        try:
            found = self.manifest(self._next_number)
        except NotFoundError:
            return False
        if found.owner != owner:
            return False
        if found.prepared:
            # Whoever asked for it was told that it failed, so nobody will commit it.
            self._given_up.add(found.number)
        self._note(found)
        return True

    def require_sole_owner(self, owner: str) -> None:
        """Return if nobody but `owner` has published a manifest since it took over.

        Raises
        ------
        UnavailableError
            If somebody has (FENCED), or the storage does not answer.
        """
        # Copied first: what is known then may be removed meanwhile, but was no stranger's.
        known = self._own_seen.union(self._stored)
        for number in self._bank.manifest_numbers(self._partition):
            # Owners come one after the other: what is older was there before this one.
            if number in known or number < self._first_own:
                continue
            try:
                manifest = self.manifest(number)
            except NotFoundError:
                continue  # our own, removed since it was listed
            if manifest.owner != owner:
                raise self._fenced(number)
            self._own_seen.add(number)

    def _fenced(self, number: int) -> UnavailableError:
        return UnavailableError(
            f"partition {self._partition} of bank {self._bank.spec.name} has another owner, "
            f"which published manifest {number}; this one stops",
            reason=Reason.FENCED,
            metadata={"partition": str(self._partition)},
        )

    def manifest(self, number: int) -> Manifest:
        """Return a stored manifest."""
        return self._bank.read_manifest(self._partition, number)

    def is_retained(self, number: int) -> bool:
        """Say whether a manifest counts and is needed."""
        stored = self._stored.get(number)
        return (
            stored is not None
            and self._counts(stored) is True
            and number in self._needed(self.history_from)
        )

    @property
    def history_from(self) -> int:
        """Oldest revision that can be returned to, snapshots aside."""
        # What is undecided may be in force soon, and its promise with it.
        undecided = [m for m in self._stored.values() if self._counts(m) is None]
        newest = self._chain().newest
        promises = [m.history_from for m in (newest, *undecided) if m is not None]
        return min(promises, default=0)

    def floor(self, revision: int) -> int:
        """Return the oldest revision that the settings ask to keep while `revision` is in force."""
        return max(self.history_from, self._retention.floor(self._bank, revision))

    @property
    def is_newest_alive(self) -> bool:
        """Whether the manifest with the greatest number counts, or may count yet."""
        return not self._stored or self._counts(self._stored[max(self._stored)]) is not False

    def would_free(self, history_from: int) -> bool:
        """Say whether giving up the ends before `history_from` leaves a manifest unneeded."""
        return self._needed(history_from) != self._needed(self.history_from)

    def ends(self) -> dict[int, int]:
        """Return the number of the manifest that ends each revision that has one of its own."""
        return self._chain().ends()

    def num_slots(self, refs: Collection[BlockRef]) -> int:
        """Return how many slots hold stored versions of `refs`."""
        self._forget_removed()
        return len(
            {slot for number in self._stored for slot in slots_named(self.manifest(number), refs)}
        )

    def retire(self) -> None:
        """Remove the manifests that nothing retained needs, and the slots that only they name."""
        for number in sorted(self._stored.keys() - self._needed(self.history_from)):
            self._drop(number)

    def _drop(self, number: int) -> None:
        others = [m.slots for m in self._stored.values() if m.number != number]
        # Slots first: a crash in between leaves the manifest, by which they are found again.
        self.release(names_of(without(self._stored[number].slots, others)))
        self._bank.objects.delete(manifest_key(self._partition, number))
        del self._stored[number]

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
        self._note_own(owner)
        self._forget_removed()
        needed = self._needed(history_from, coming)
        doomed = {
            number: GarbageKind.RETIRED_MANIFEST
            if self._counts(stored)
            else GarbageKind.ABANDONED_MANIFEST
            for number, stored in self._stored.items()
            if number not in needed
        }
        sorting = Sorting(
            kept=self._names((n for n in self._stored if n not in doomed), coming),
            retired=self._names(doomed),
            unpublished=frozenset(self._unpublished),
            next_slot=dict(self._next_slot),
        )
        items = [
            Item(kind, chunk.key, chunk.num_bytes)
            for chunk in chunks
            if (kind := sorting.kind_of(chunk)) is not None
        ]
        for number, kind in sorted(doomed.items()):
            key = manifest_key(self._partition, number)
            items.append(Item(kind, key, len(self._bank.objects.get(key))))
        return items

    def remove(self, items: Iterable[Item]) -> None:
        """Remove what `garbage` found, in that order: a manifest after the slots that it names."""
        for item in items:
            self._bank.objects.delete(item.key)
            if item.kind in {GarbageKind.RETIRED_MANIFEST, GarbageKind.ABANDONED_MANIFEST}:
                del self._stored[number_of(item.key)]

    def _names(
        self, numbers: Iterable[int], coming: StoredManifest | None = None
    ) -> frozenset[SlotName]:
        sets = [self._stored[number].slots for number in numbers]
        if coming is not None:
            sets.append(coming.slots)
        return frozenset(names_of(union(sets)))

    def _note_own(self, owner: str) -> None:
        """Take note of manifests whose publication only seemed to fail; raise for a stranger's."""
        for number in self._bank.manifest_numbers(self._partition):
            if number in self._stored:
                continue
            manifest = self.manifest(number)
            if manifest.owner != owner and number > self._first_own:
                raise self._fenced(number)
            self._note(manifest)

    def _forget_removed(self) -> None:
        """Forget manifests that are gone although their removal was reported as failed."""
        gone = self._stored.keys() - set(self._bank.manifest_numbers(self._partition))
        for number in gone - self._needed(self.history_from):
            del self._stored[number]

    def _chain(self, coming: StoredManifest | None = None) -> Chain:
        counting = [m for m in self._stored.values() if self._counts(m)]
        return Chain(counting if coming is None else [*counting, coming])

    def _needed(self, history_from: int, coming: StoredManifest | None = None) -> set[int]:
        """Return the numbers of the manifests that are needed; undecided ones are."""
        undecided = {n for n, m in self._stored.items() if self._counts(m) is None}
        newest = {max(self._stored)} if self._stored and coming is None else set()
        pinned = [snapshot.revision for snapshot in self._bank.snapshots()]
        return undecided | newest | self._chain(coming).needed(history_from, pinned)

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
        self._note_own(current.owner)
        self._forget_removed()
        stored = [self.manifest(number) for number in self._stored]
        # A prepared manifest is later than `current` and may create a deleted block anew.
        older = [manifest for manifest in stored if _order(manifest) < _order(current)]
        affected = [manifest for manifest in older if not calls_deleted(manifest, deleted)]
        doomed = {slot for manifest in affected for slot in slots_named(manifest, deleted)}
        for level, slot in doomed:
            self._arrays.delete(level, slot)
        # What a crashed writer left in slots that no manifest names may be of these blocks too.
        used = self._names(self._stored)
        for chunk in chunks:
            if (chunk.level, chunk.slot) not in used:
                self._bank.objects.delete(chunk.key)
                self._unpublished.discard((chunk.level, chunk.slot))
        # A successor may have removed some of them, which must not come back.
        self._note_own(current.owner)
        self._forget_removed()
        for manifest in affected:
            if manifest.number not in self._stored:
                continue
            scrubbed = replace(manifest, entries=without_content(manifest.entries, deleted))
            key = manifest_key(self._partition, manifest.number)
            self._bank.objects.put(key, encode_manifest(scrubbed), durable=True)
            self._note(scrubbed)

    def _counts(self, manifest: Manifest | StoredManifest) -> bool | None:
        """Say whether a manifest is in force (docs/format.md); None = undecided."""
        if not manifest.prepared:
            return True
        if manifest.number in self._given_up:
            return False
        record = self._bank.record(manifest.revision)
        if record is None:
            return None
        return record.committed and record.manifests.get(self._partition) == manifest.number

    def _require_named(self, current: Manifest | None) -> None:
        revision = self._bank.latest_commit().revision
        if current is not None and current.revision > revision:
            raise CorruptionError(
                f"{self._bank.url}/{revision_key(current.revision)} is missing, to which manifest "
                f"{current.number} of partition {self._partition} belongs; restore the file from "
                "a copy",
                reason=Reason.MANIFEST_CORRUPT,
                metadata={"key": revision_key(current.revision)},
            )
        named = self._bank.named_manifest(revision, self._partition)
        if named and (named not in self._stored or current is None):
            key = manifest_key(self._partition, named)
            raise CorruptionError(
                f"{self._bank.url}/{key} is missing, which revision {revision} names; "
                "restore the file from a copy",
                reason=Reason.MANIFEST_CORRUPT,
                metadata={"key": key},
            )

    def _note(self, manifest: Manifest) -> None:
        slots = slots_of(manifest)
        self._stored[manifest.number] = StoredManifest(
            number=manifest.number,
            revision=manifest.revision,
            prepared=manifest.prepared,
            history_from=manifest.history_from,
            slots=slots,
        )
        for level, slot in tops(slots).items():
            self._next_slot[level] = max(self._next_slot.get(level, 0), slot + 1)
        self._unpublished -= members(slots, self._unpublished)
        self._next_number = max(self._next_number, manifest.number + 1)


def _order(manifest: Manifest) -> tuple[int, int]:
    return (manifest.revision, manifest.number)
