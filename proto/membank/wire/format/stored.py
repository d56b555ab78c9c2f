"""Reading a bank from its objects alone, without an owner: which manifests make up its state.

The rules are those of docs/format.md: "Which manifest counts", "What a revision stands for" and
"Snapshots and trees". Journals are not read: what is only there belongs to an owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

from membank.wire.errors import CorruptionError, NotFoundError, Reason, UnavailableError
from membank.wire.format.document import decode_bank
from membank.wire.format.entries import NO_SLOT, Entry
from membank.wire.format.initial import initial_weight
from membank.wire.format.layout import (
    REVISIONS,
    SPEC_KEY,
    manifest_key,
    manifest_prefix,
    numbers_in,
    revision_key,
    slot_key,
    snapshot_key,
    tree_key,
)
from membank.wire.format.manifest import Manifest, decode_manifest
from membank.wire.format.revision import RevisionRecord, decode_revision
from membank.wire.format.sealed import require_keyring
from membank.wire.format.slot import decode_slot
from membank.wire.format.snapshot import decode_snapshot
from membank.wire.format.tree import TreeDocument, decode_tree
from membank.wire.records import Snapshot
from membank.wire.spec import NAME_PATTERN, Array, BankSpec, BlockRef, BlockState, Role

_INITIAL = Entry(slot=NO_SLOT, version=0)
_ATTEMPTS = 8
_THREADS = 16

T = TypeVar("T")
V = TypeVar("V")


class BankObjects(Protocol):
    """The objects of a bank, to be read. Keys are relative; safe to use from threads."""

    @property
    def url(self) -> str:
        """Where they are; holds no credentials."""

    def get(self, key: str) -> bytes:
        """Return an object; `NotFoundError` where there is none."""

    def list(self, prefix: str) -> list[str]:
        """Return the keys of the objects directly under `prefix`, in any order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredState:
    """One state of a bank: a manifest per partition."""

    revision: int
    """Revision whose end, or with `snapshot` whose beginning, it is."""
    snapshot: str
    """Name of the snapshot; empty = what was stored of the present when it was read."""
    manifests: Mapping[int, Manifest | None]
    """By partition; None = as initialised."""
    present: Mapping[int, Manifest | None]
    """The same for the present, which says whether a block may be used."""


class Numbered(Protocol):
    """What decides whether a manifest counts."""

    @property
    def number(self) -> int:
        """Its number."""

    @property
    def prepared(self) -> bool:
        """True where it counts only if its revision was committed with it."""


def counts(partition: int, manifest: Numbered, record: RevisionRecord | None) -> bool | None:
    """Say whether a stored manifest counts; None = undecided.

    Parameters
    ----------
    partition
        Its partition.
    manifest
        The manifest.
    record
        Record of its revision, as far as there is one.

    Notes
    -----
    An owner knows more: see `ManifestLog.counts` in the service.
    """
    if not manifest.prepared:
        return True
    if record is None:
        return None
    return record.committed and record.manifests.get(partition) == manifest.number


class StoredBank:
    """A bank as its objects say.

    Parameters
    ----------
    objects
        The objects.

    Raises
    ------
    NotFoundError
        If there is no bank (NOT_A_BANK).
    FailedPreconditionError
        If a newer membank wrote it (FORMAT_TOO_NEW), or it is sealed and its keyring is not there.
    CorruptionError
        If its spec is damaged.
    """

    # Threads: `_records` is only ever added to, by equal values.

    def __init__(self, objects: BankObjects) -> None:
        self._objects = objects
        try:
            data = objects.get(SPEC_KEY)
        except NotFoundError as err:
            raise NotFoundError(
                f"{objects.url} is not a bank: it has no {SPEC_KEY}; check the URL",
                reason=Reason.NOT_A_BANK,
                metadata={"bank": objects.url},
            ) from err
        document = decode_bank(data, where=objects.url)
        require_keyring(objects, document, where=objects.url)
        self.spec: BankSpec = document.spec
        self._records: dict[int, RevisionRecord] = {}

    @property
    def url(self) -> str:
        """Where it is."""
        return self._objects.url

    def latest_commit(self) -> RevisionRecord:
        """Return the newest record that is a commit.

        Raises
        ------
        CorruptionError
            If a record is damaged or missing.
        """
        numbers = numbers_in(self._objects.list(REVISIONS), revision_key)
        for number in range(max(numbers, default=0), -1, -1):
            record = self._require_record(number)
            if record.committed:
                return record
        raise self._missing(revision_key(0), "which every bank begins with")

    def present(self) -> StoredState:
        """Return the end of the newest revision, as far as it is in manifests.

        The partitions of a bank that is being served are read one after the other. What was
        committed before is seen in all of them, what is committed meanwhile in none.

        Raises
        ------
        CorruptionError
            If a manifest is damaged, or one that a commit names is missing.
        UnavailableError
            If the bank changes faster than its manifests can be read.
        """
        revision = self.latest_commit().revision
        ends = self._of_partitions(partial(self._end_of, revision))
        return StoredState(revision=revision, snapshot="", manifests=ends, present=ends)

    def pinned(self, name: str) -> StoredState:
        """Return what a snapshot pins; errors as for `present`.

        Raises
        ------
        NotFoundError
            If there is none of this name (UNKNOWN_SNAPSHOT).
        """
        present = self.present()
        snapshot = self._snapshot(name, self._require_record(present.revision))
        pinned = self._of_partitions(partial(self._beginning_of, snapshot.revision))
        return StoredState(
            revision=snapshot.revision, snapshot=name, manifests=pinned, present=present.present
        )

    def entry(self, state: StoredState, ref: BlockRef) -> Entry:
        """Return what readers of `state` are told of a block: whether it may be used says the present."""
        partition = self.spec.partition_of(ref)
        now = _entry_in(state.present[partition], ref)
        if now.state is not BlockState.ACTIVE:
            return now
        return _entry_in(state.manifests[partition], ref)

    def weight(self, ref: BlockRef, entry: Entry) -> Array:
        """Return the content that an entry names, (L, P, R, D) in the bank's dtype, checked.

        Raises
        ------
        CorruptionError
            If the slot is damaged or missing; the error names it.
        """
        if entry.slot == NO_SLOT:
            return initial_weight(self.spec, ref)
        key = slot_key(self.spec.partition_of(ref), ref.level, Role.WEIGHT, entry.slot)
        try:
            chunk = self._objects.get(key)
        except NotFoundError as err:
            raise self._missing(
                key,
                f"which holds block {ref}; where the bank is being served, it has gone on: open it "
                "again, or a snapshot. Otherwise",
                reason=Reason.SLOT_CORRUPT,
            ) from err
        return decode_slot(
            chunk,
            dtype=self.spec.numpy_dtype,
            shape=self.spec.block_shape(ref.level),
            crc=entry.crcs[0],
            key=f"{self.url}/{key}",
        )

    def tree(self) -> TreeDocument:
        """Return the tree document in force.

        Raises
        ------
        NotFoundError
            If the bank has none (NO_TREE).
        CorruptionError
            If it is damaged, or missing although a commit names it.
        """
        for _ in range(_ATTEMPTS):
            revision = self.latest_commit().tree_revision
            key = tree_key(revision)
            try:
                return decode_tree(self._objects.get(key), key=f"{self.url}/{key}")
            except NotFoundError as err:
                if revision == 0:
                    raise NotFoundError(
                        f"bank {self.spec.name} has no tree; name paths yourself",
                        reason=Reason.NO_TREE,
                        metadata={"bank": self.spec.name},
                    ) from err
                # Another came into force and this one was removed, unless nothing has changed.
                if self.latest_commit().tree_revision == revision:
                    raise self._missing(key, f"which revision {revision} names;") from err
        raise self._too_fast("tree documents")

    # ---- manifests

    def _of_partitions(self, read: Callable[[int], Manifest | None]) -> dict[int, Manifest | None]:
        partitions = range(self.spec.num_partitions)
        return dict(zip(partitions, _side_by_side(read, partitions), strict=True))

    def _end_of(self, revision: int, partition: int) -> Manifest | None:
        """Return the greatest manifest that counts and is of `revision` or an earlier one."""
        for _ in range(_ATTEMPTS):
            keys = self._objects.list(manifest_prefix(partition))
            try:
                found = [
                    self._manifest(partition, number)
                    for number in numbers_in(keys, partial(manifest_key, partition))
                ]
            except NotFoundError:
                continue  # retired since it was listed, as a newer one is there
            counting = [
                manifest
                for manifest in found
                if manifest.revision <= revision
                and counts(partition, manifest, self._record_of(manifest))
            ]
            end = max(counting, key=lambda each: (each.revision, each.number), default=None)
            self._require_named(revision, partition, end)
            return end
        raise self._too_fast(f"the manifests of partition {partition}")

    def _record_of(self, manifest: Manifest) -> RevisionRecord | None:
        # Up to the newest commit no record is missing; it is asked for only where it decides.
        return self._require_record(manifest.revision) if manifest.prepared else None

    def _require_named(self, revision: int, partition: int, end: Manifest | None) -> None:
        """Raise where the newest commit that names a manifest is not contained in `end`."""
        for number in range(revision, -1 if end is None else end.revision, -1):
            record = self._require_record(number)
            if record.committed and partition in record.manifests:
                key = manifest_key(partition, record.manifests[partition])
                raise self._missing(key, f"which revision {number} names;")

    def _beginning_of(self, revision: int, partition: int) -> Manifest | None:
        for number in range(revision, -1, -1):
            record = self._require_record(number)
            if record.committed and partition in record.manifests:
                named = record.manifests[partition]
                try:
                    return self._manifest(partition, named)
                except NotFoundError as err:
                    key = manifest_key(partition, named)
                    raise self._missing(key, f"which revision {number} names;") from err
        return None

    def _manifest(self, partition: int, number: int) -> Manifest:
        key = manifest_key(partition, number)
        where = f"{self.url}/{key}"
        manifest = decode_manifest(
            self._objects.get(key), num_roles=len(self.spec.roles), key=where
        )
        if (manifest.partition, manifest.number) != (partition, number):
            raise CorruptionError(
                f"{where} holds manifest {manifest.number} of partition {manifest.partition}; "
                "restore the file from a copy",
                reason=Reason.MANIFEST_CORRUPT,
                metadata={"key": key},
            )
        return manifest

    # ---- records and snapshots

    def _require_record(self, revision: int) -> RevisionRecord:
        if revision not in self._records:
            key = revision_key(revision)
            try:
                data = self._objects.get(key)
            except NotFoundError as err:
                raise self._missing(key, "a record that others follow;") from err
            self._records[revision] = decode_revision(data, key=f"{self.url}/{key}")
        return self._records[revision]

    def _snapshot(self, name: str, in_force: RevisionRecord) -> Snapshot:
        """Return a snapshot; `Bank.is_snapshot` in the service is the same rule."""
        # A name comes from outside, and would become a part of a key.
        if NAME_PATTERN.fullmatch(name):
            key = snapshot_key(name)
            try:
                snapshot = decode_snapshot(self._objects.get(key), key=f"{self.url}/{key}")
            except NotFoundError:
                snapshot = None
            if snapshot is not None and self._is_snapshot(snapshot, in_force):
                return snapshot
        raise NotFoundError(
            f"bank {self.spec.name} has no snapshot {name!r}",
            reason=Reason.UNKNOWN_SNAPSHOT,
            metadata={"snapshot": name},
        )

    def _is_snapshot(self, snapshot: Snapshot, in_force: RevisionRecord) -> bool:
        if snapshot.revision > in_force.revision:
            return False
        record = self._require_record(snapshot.revision)
        is_made = record.committed and record.operation == "snapshot"
        is_ended = (
            in_force.operation == "delete-snapshot"
            and in_force.revision > snapshot.revision
            and in_force.detail.get("snapshot") == snapshot.name
        )
        return is_made and record.detail.get("snapshot") == snapshot.name and not is_ended

    def _missing(
        self, key: str, why: str, *, reason: Reason = Reason.MANIFEST_CORRUPT
    ) -> CorruptionError:
        return CorruptionError(
            f"{self.url}/{key} is missing, {why} restore the file from a copy",
            reason=reason,
            metadata={"key": key},
        )

    def _too_fast(self, what: str) -> UnavailableError:
        return UnavailableError(
            f"{what} of {self.url} change faster than they can be read; retry",
            reason=Reason.OVERLOADED,
        )


def _entry_in(manifest: Manifest | None, ref: BlockRef) -> Entry:
    return _INITIAL if manifest is None else manifest.entries.get(ref, _INITIAL)


def _side_by_side(read: Callable[[V], T], items: Iterable[V]) -> list[T]:
    # Most of the time of one read from a bucket is waiting.
    with ThreadPoolExecutor(_THREADS, "membank-read") as threads:
        return list(threads.map(read, items))
