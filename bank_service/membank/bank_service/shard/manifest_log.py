"""The manifests of one partition on the bank's storage: which count, which are needed, who is next."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from membank.bank_service.shard.retention import Chain, Retention, StoredManifest
from membank.bank_service.shard.slot_sets import SlotSet, slots_of, union
from membank.bank_service.store.bank import Bank
from membank.wire.errors import (
    AlreadyExistsError,
    CorruptionError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format import Manifest, encode_manifest
from membank.wire.format.layout import manifest_key, revision_key
from membank.wire.format.stored import counts

_LISTINGS = 8


@dataclass(frozen=True, slots=True)
class LoadedManifests:
    """What a partition's storage says when its owner starts."""

    current: Manifest | None
    """The newest manifest that counts; None = nothing was ever changed."""
    undecided: Manifest | None
    """A prepared manifest whose revision nobody has decided."""
    last_published: Manifest | None
    """Of those that count, the one with the greatest number: by the last owner. It is another than
    `current` where that owner came between the preparation of `current` and its commit."""
    bases: frozenset[str]
    """Nonces of what an owner may have started from that published nothing."""


def bases_of(before: Manifest | None, last: Manifest | None) -> frozenset[str]:
    """Return what an owner may have started from that died before it published.

    While `last` was undecided that was the manifest before it, which its owner wrote as well.
    """
    found = {"" if last is None else last.nonce}
    if last is not None and last.prepared and before is not None and before.owner == last.owner:
        found.add(before.nonce)
    return frozenset(found)


class ManifestLog:
    """The manifests of one partition.

    Used by one thread at a time, but for `require_sole_owner`.

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
        How much history to keep.
    """

    def __init__(self, bank: Bank, partition: int, retention: Retention) -> None:
        self._bank = bank
        self._partition = partition
        self._retention = retention
        self._stored: dict[int, StoredManifest] = {}
        self._next_number = 1
        self._first_own = 0
        # Prepared by this owner, whose caller was told that it could not be.
        self._given_up: set[int] = set()
        # Own manifests that a renewal of the lease came across before anybody noted them.
        self._own_seen: set[int] = set()

    # ---- opening

    def load(self) -> LoadedManifests:
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
            manifest = self.read(number)
            self._note(manifest)
            match self.counts(manifest):
                case None:
                    undecided = manifest
                case True:
                    if current is None or order_of(current) < order_of(manifest):
                        current = manifest
                    before, last_published = last_published, manifest
        return LoadedManifests(current, undecided, last_published, bases_of(before, last_published))

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
        # What an older commit names cannot be the present state, and may have been retired.
        since = 0 if current is None else current.revision
        named = self._bank.named_manifest(revision, self._partition, since=since)
        if named and (named not in self._stored or current is None):
            key = manifest_key(self._partition, named)
            raise CorruptionError(
                f"{self._bank.url}/{key} is missing, which revision {revision} names; "
                "restore the file from a copy",
                reason=Reason.MANIFEST_CORRUPT,
                metadata={"key": key},
            )

    # ---- publishing

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
            found = self.read(self._next_number)
        except NotFoundError:
            return False
        if found.owner != owner:
            return False
        if found.prepared:
            # Whoever asked for it was told that it failed, so nobody will commit it.
            self.give_up(found.number)
        self._note(found)
        return True

    def give_up(self, number: int) -> None:
        """Take note that nobody will commit a prepared manifest, whether or not a record says so.

        It goes once a later one is there; an owner that found it would wait for a decision.
        """
        self._given_up.add(number)

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
                manifest = self.read(number)
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

    # ---- what is stored

    def read(self, number: int) -> Manifest:
        """Return a stored manifest."""
        return self._bank.read_manifest(self._partition, number)

    @property
    def next_number(self) -> int:
        """Number of the manifest to be published next."""
        return self._next_number

    @property
    def numbers(self) -> list[int]:
        """Numbers of the stored manifests, ascending."""
        return sorted(self._stored)

    def slots(self, numbers: Iterable[int] | None = None) -> SlotSet:
        """Return the slots that any of these stored manifests names; None = any at all."""
        chosen = self._stored if numbers is None else numbers
        return union(self._stored[number].slots for number in chosen)

    def look_again(self, owner: str) -> None:
        """Take note of manifests whose publication, or removal, only seemed to fail.

        Raises
        ------
        UnavailableError
            If one of another owner is there (FENCED).
        """
        stored = self._bank.manifest_numbers(self._partition)
        for number in stored:
            if number in self._stored:
                continue
            manifest = self.read(number)
            if manifest.owner != owner and number > self._first_own:
                raise self._fenced(number)
            self._note(manifest)
        for number in self._stored.keys() - set(stored) - self.needed(self.history_from):
            del self._stored[number]

    def put_in_place(self, manifest: Manifest) -> None:
        """Store `manifest` in the place of the one of its number."""
        key = manifest_key(self._partition, manifest.number)
        self._bank.objects.put(key, encode_manifest(manifest), durable=True)
        self._note(manifest)

    def remove(self, number: int) -> None:
        """Remove a manifest; the slots that only it names must be gone."""
        self._bank.objects.delete(manifest_key(self._partition, number))
        self.forget(number)

    def forget(self, number: int) -> None:
        """Take note that a manifest was removed."""
        del self._stored[number]

    def _note(self, manifest: Manifest) -> None:
        self._stored[manifest.number] = StoredManifest(
            number=manifest.number,
            revision=manifest.revision,
            prepared=manifest.prepared,
            history_from=manifest.history_from,
            slots=slots_of(manifest),
        )
        self._next_number = max(self._next_number, manifest.number + 1)

    # ---- what is needed

    def is_retained(self, number: int) -> bool:
        """Say whether a manifest counts and is needed."""
        stored = self._stored.get(number)
        return (
            stored is not None
            and self.counts(stored) is True
            and number in self.needed(self.history_from)
        )

    @property
    def history_from(self) -> int:
        """Oldest revision that can be returned to, snapshots aside."""
        # What is undecided may be in force soon, and its promise with it.
        undecided = [m for m in self._stored.values() if self.counts(m) is None]
        newest = self._chain().newest
        promises = [m.history_from for m in (newest, *undecided) if m is not None]
        return min(promises, default=0)

    def floor(self, revision: int) -> int:
        """Return the oldest revision that the settings ask to keep while `revision` is in force."""
        return max(self.history_from, self._retention.floor(self._bank, revision))

    @property
    def is_newest_alive(self) -> bool:
        """Whether the manifest with the greatest number counts, or may count yet."""
        return not self._stored or self.counts(self._stored[max(self._stored)]) is not False

    def would_free(self, history_from: int) -> bool:
        """Say whether giving up the ends before `history_from` leaves a manifest unneeded."""
        return self.needed(history_from) != self.needed(self.history_from)

    def ends(self) -> dict[int, int]:
        """Return the number of the manifest that ends each revision that has one of its own."""
        return self._chain().ends()

    def needed(self, history_from: int, coming: StoredManifest | None = None) -> set[int]:
        """Return the numbers of the manifests that are needed; undecided ones are.

        Parameters
        ----------
        history_from
            Oldest revision that can be returned to.
        coming
            A manifest that is yet to be published: what is needed once it is in force is asked.
        """
        undecided = {n for n, m in self._stored.items() if self.counts(m) is None}
        newest = {max(self._stored)} if self._stored and coming is None else set()
        pinned = [snapshot.revision for snapshot in self._bank.snapshots()]
        return undecided | newest | self._chain(coming).needed(history_from, pinned)

    def unneeded(
        self, history_from: int, coming: StoredManifest | None = None
    ) -> dict[int, bool | None]:
        """Return the other manifests, ascending, and of each whether it counts."""
        others = self._stored.keys() - self.needed(history_from, coming)
        return {number: self.counts(self._stored[number]) for number in sorted(others)}

    def _chain(self, coming: StoredManifest | None = None) -> Chain:
        counting = [m for m in self._stored.values() if self.counts(m)]
        return Chain(counting if coming is None else [*counting, coming])

    def counts(self, manifest: Manifest | StoredManifest) -> bool | None:
        """Say whether a manifest is in force (docs/format.md); None = undecided."""
        if manifest.number in self._given_up:
            return False
        record = self._bank.outline(manifest.revision) if manifest.prepared else None
        return counts(self._partition, manifest, record)


def order_of(manifest: Manifest) -> tuple[int, int]:
    """Return the place of a manifest among those that count; the greatest is in force."""
    return (manifest.revision, manifest.number)
