"""The documents of a bank: its spec, its chain of revisions, trees, manifests and snapshots."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial

from membank.bank_service.store.creation import bank_exists, exists, no_records, publish_first
from membank.bank_service.store.objects import ObjectStore, probe_create_only, publish
from membank.bank_service.store.open_objects import open_objects
from membank.bank_service.store.records import RevisionRecords, missing_record
from membank.bank_service.store.sealed_objects import SealedObjects
from membank.wire.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from membank.wire.format import (
    BankDocument,
    Manifest,
    RevisionRecord,
    TreeDocument,
    decode_bank,
    decode_manifest,
    decode_snapshot,
    decode_tree,
    encode_bank,
    encode_manifest,
    encode_revision,
    encode_snapshot,
    encode_tree,
)
from membank.wire.format.layout import (
    REVISIONS,
    SNAPSHOTS,
    SPEC_KEY,
    manifest_key,
    manifest_prefix,
    numbers_in,
    revision_key,
    snapshot_key,
    snapshot_name,
    tree_key,
)
from membank.wire.format.revision import REQUEST_SHA256
from membank.wire.format.sealed import Keyed, require_keyring
from membank.wire.records import Snapshot
from membank.wire.spec import NAME_PATTERN, BankSpec

SNAPSHOT_OPERATION = "snapshot"
"""Operation of the record that makes a snapshot, whose name is in its detail."""
UNPIN_OPERATION = "delete-snapshot"
"""Operation of the record that gives a snapshot up, whose name is in its detail."""


class Bank:
    """A bank on storage: everything but the content of its blocks.

    Make one with `Bank.create` or `Bank.open`. Safe to use from threads.
    """

    def __init__(self, objects: ObjectStore, spec: BankSpec) -> None:
        self.objects = objects
        """The bank's storage."""
        self.spec = spec
        """The bank's spec."""
        self._records = RevisionRecords(objects)

    @classmethod
    def create(
        cls,
        where: str | ObjectStore,
        spec: BankSpec,
        *,
        keyring: str = "",
        tree: TreeDocument | None = None,
        principal: str = "",
        request_id: str = "",
        request_sha256: str = "",
    ) -> Bank:
        """Create an empty bank; it exists once its `bank.json` does.

        Parameters
        ----------
        where
            URL of a directory or bucket prefix, or a store that serves one.
        spec
            What to create; a random `bank_id` is given to it where it has none.
        keyring
            URL of the keyring of a bank that is to be sealed, where `where` is a URL; a store seals by
            itself, or not.
        tree
            Labels and retriever, if they are known already.
        principal, request_id
            Who asks, for the record of revision 0.
        request_sha256
            Digest of what is asked, likewise; empty = none.

        Raises
        ------
        AlreadyExistsError
            If there is a bank (BANK_EXISTS); it is untouched.
        FailedPreconditionError
            If the storage cannot hold a bank safely (STORE_UNSUPPORTED) or refuses to be written, or
            the keyring is of another bank (KEYRING_MISMATCH).
        """
        objects = _opened(where, keyring)
        if exists(objects, SPEC_KEY):
            raise bank_exists(objects)
        probe_create_only(objects)
        bank = cls(objects, dataclasses.replace(spec, bank_id=spec.bank_id or uuid.uuid4().hex))
        record = RevisionRecord(
            revision=0,
            committed=True,
            nonce=uuid.uuid4().hex,
            previous_sha256="",
            operation="create",
            principal=principal,
            request_id=request_id,
            time_s=time.time(),
            detail={REQUEST_SHA256: request_sha256} if request_sha256 else {},
        )
        documents = {revision_key(0): encode_revision(record)}
        if tree is not None:
            documents[tree_key(0)] = encode_tree(tree)
        if isinstance(objects, SealedObjects):
            # Before anything is sealed: another creation that runs now is refused here.
            objects.begin_keyring(bank.spec.bank_id)
        document = BankDocument(spec=bank.spec, is_sealed=bank.is_sealed)
        publish_first(objects, documents, encode_bank(document))
        return bank

    @classmethod
    def open(cls, where: str | ObjectStore, *, keyring: str = "") -> Bank:
        """Open the bank at `where` (as for `create`), with its keyring where it is sealed.

        Raises
        ------
        NotFoundError
            If there is none (NOT_A_BANK).
        FailedPreconditionError
            If a newer membank wrote it (FORMAT_TOO_NEW), the storage refuses to be read, or the keyring
            is not the one that it needs (KEYRING_NEEDED, KEYRING_MISMATCH, BANK_NOT_SEALED).
        CorruptionError
            If its spec is damaged (SPEC_CORRUPT) or revision 0 is missing.
        """
        objects = _opened(where, keyring)
        try:
            data = objects.get(SPEC_KEY)
        except NotFoundError as err:
            raise NotFoundError(
                f"{objects.url} is not a bank: it has no {SPEC_KEY}; create one, or check the URL",
                reason=Reason.NOT_A_BANK,
                metadata={"bank": objects.url},
            ) from err
        document = decode_bank(data, where=objects.url)
        require_keyring(objects, document, where=objects.url)
        bank = cls(objects, document.spec)
        if not exists(objects, revision_key(0)):
            raise no_records(objects)
        return bank

    @property
    def url(self) -> str:
        """Where the bank is."""
        return self.objects.url

    @property
    def is_sealed(self) -> bool:
        """Whether content is sealed, each object with a key of its own."""
        return isinstance(self.objects, Keyed)

    def latest_number(self) -> int:
        """Return the number of the newest revision record, committed or aborted."""
        numbers = numbers_in(self.objects.list(REVISIONS), revision_key)
        if not numbers:
            raise no_records(self.objects)
        return numbers[-1]

    def record(self, revision: int) -> RevisionRecord | None:
        """Return the record of `revision`, or None while nobody has decided it.

        Raises
        ------
        CorruptionError
            If the record is damaged.
        """
        found = self._records.find(revision)
        return None if found is None else found.record

    def outline(self, revision: int) -> RevisionRecord | None:
        """Return the record of `revision` without its `detail`, or None as `record` does.

        Of these many more are remembered, so it is what a walk along the chain should ask for.
        """
        return self._records.outline(revision)

    def outlines(self, revisions: Sequence[int]) -> Iterator[RevisionRecord]:
        """Yield the records of `revisions` without their `detail`, reading ahead.

        Raises
        ------
        CorruptionError
            If one is damaged, or gone.
        """
        return self._records.outlines(revisions)

    def require_record(self, revision: int) -> RevisionRecord:
        """Return the record of a revision that was decided.

        Raises
        ------
        CorruptionError
            If it is damaged, or gone.
        """
        record = self.record(revision)
        if record is None:
            raise missing_record(revision)
        return record

    def latest_commit(self) -> RevisionRecord:
        """Return the newest record that is a commit."""
        for outline in self.outlines(range(self.latest_number(), -1, -1)):
            if outline.committed:
                return self.require_record(outline.revision)
        raise missing_record(0)

    def decide(self, record: RevisionRecord) -> RevisionRecord:
        """Create the record of a revision, linked to the one before, and return what stands.

        Parameters
        ----------
        record
            The commit, or abort, that the caller wants; its `previous_sha256` is filled in, and
            its `nonce` where it is empty.

        Returns
        -------
        RevisionRecord
            The caller's own record.

        Raises
        ------
        ConflictError
            If the revision has been decided by somebody else (TRANSACTION_CONFLICT).
        FailedPreconditionError
            If the revision before is still undecided.
        """
        previous = self._records.find(record.revision - 1)
        if previous is None:
            raise FailedPreconditionError(
                f"revision {record.revision - 1} is undecided, so {record.revision} cannot be",
                reason=Reason.TRANSACTION_CONFLICT,
            )
        linked = dataclasses.replace(
            record, previous_sha256=previous.sha256, nonce=record.nonce or uuid.uuid4().hex
        )
        try:
            publish(self.objects, revision_key(record.revision), encode_revision(linked))
        except AlreadyExistsError as err:
            raise ConflictError(
                f"revision {record.revision} has been decided by another transaction; "
                "read the bank again and repeat",
                reason=Reason.TRANSACTION_CONFLICT,
                metadata={"revision": str(record.revision)},
            ) from err
        return linked

    def named_manifest(self, revision: int, partition: int, *, since: int = 0) -> int:
        """Return the manifest of `partition` that is in force at `revision`; 0 = as initialised.

        That is the one named by the newest commit up to `revision` that names any; updates that
        came after that commit are not part of the revision.

        Parameters
        ----------
        revision
            The revision.
        partition
            The partition.
        since
            Oldest commit to look at; 0 is the answer where none from there on names a manifest.
        """
        for record in self.outlines(range(revision, since - 1, -1)):
            if record.committed and partition in record.manifests:
                return record.manifests[partition]
        return 0

    def read_tree(self, revision: int) -> TreeDocument | None:
        """Return the tree document that was written at `revision`; None if a bank has none yet.

        Raises
        ------
        CorruptionError
            If it is damaged, or missing although only revision 0 may be without.
        """
        key = tree_key(revision)
        try:
            data = self.objects.get(key)
        except NotFoundError as err:
            if revision == 0:
                return None
            raise CorruptionError(
                f"tree document {self.url}/{key} is missing; restore the file from a copy",
                reason=Reason.SPEC_CORRUPT,
                metadata={"key": key},
            ) from err
        return decode_tree(data, key=f"{self.url}/{key}")

    def write_tree(self, revision: int, tree: TreeDocument) -> None:
        """Write the tree document of `revision`; it counts once a commit names it."""
        self.objects.put(tree_key(revision), encode_tree(tree), durable=True)

    def manifest_numbers(self, partition: int) -> list[int]:
        """Return the numbers of the manifests of `partition` that are stored, ascending."""
        keys = self.objects.list(manifest_prefix(partition))
        return numbers_in(keys, partial(manifest_key, partition))

    def read_manifest(self, partition: int, number: int) -> Manifest:
        """Return a manifest.

        Raises
        ------
        NotFoundError
            If there is none (OBJECT_MISSING).
        CorruptionError
            If it is damaged, or not the one that its name says.
        """
        key = manifest_key(partition, number)
        where = f"{self.url}/{key}"
        manifest = decode_manifest(self.objects.get(key), num_roles=len(self.spec.roles), key=where)
        if (manifest.partition, manifest.number) != (partition, number):
            raise CorruptionError(
                f"{where} holds manifest {manifest.number} of partition {manifest.partition}; "
                "restore the file from a copy",
                reason=Reason.MANIFEST_CORRUPT,
                metadata={"key": key},
            )
        return manifest

    def publish_manifest(self, manifest: Manifest) -> None:
        """Create a manifest, durably.

        Raises
        ------
        AlreadyExistsError
            If another owner of the partition created one of this number.
        """
        publish(
            self.objects,
            manifest_key(manifest.partition, manifest.number),
            encode_manifest(manifest),
        )

    def snapshots(self) -> list[Snapshot]:
        """Return the snapshots, by name."""
        found = []
        for key in self.objects.list(SNAPSHOTS):
            if snapshot_name(key) is None:
                continue
            try:
                found.append(decode_snapshot(self.objects.get(key), key=f"{self.url}/{key}"))
            except NotFoundError:
                continue  # removed since it was listed
        return found

    def snapshot(self, name: str) -> Snapshot:
        """Return the snapshot called `name`.

        Raises
        ------
        NotFoundError
            If there is none (UNKNOWN_SNAPSHOT).
        """
        if not NAME_PATTERN.fullmatch(name):
            # It came from outside, and would become a part of a key.
            raise self._no_snapshot(name)
        key = snapshot_key(name)
        try:
            return decode_snapshot(self.objects.get(key), key=f"{self.url}/{key}")
        except NotFoundError as err:
            raise self._no_snapshot(name) from err

    def pinned(self, name: str, in_force: RevisionRecord) -> Snapshot:
        """Return the snapshot called `name` if it is one while `in_force` is the newest commit.

        Raises
        ------
        NotFoundError
            If it is none: not there, never committed, or given up (UNKNOWN_SNAPSHOT).
        """
        snapshot = self.snapshot(name)
        if not self.is_snapshot(snapshot, in_force):
            raise self._no_snapshot(name)
        return snapshot

    def is_snapshot(self, snapshot: Snapshot, in_force: RevisionRecord) -> bool:
        """Say whether a name that is stored is a snapshot while `in_force` is the newest commit.

        A name is written before the revision that makes it a snapshot, and removed after the one
        that ends that. Nothing is committed before it is gone, so only the newest commit can have
        ended one that is stored.
        """
        if snapshot.revision > in_force.revision:
            return False
        record = self.require_record(snapshot.revision)
        is_made = record.committed and record.operation == SNAPSHOT_OPERATION
        is_ended = in_force.operation == UNPIN_OPERATION and in_force.revision > snapshot.revision
        return (
            is_made
            and record.detail.get("snapshot") == snapshot.name
            and not (is_ended and in_force.detail.get("snapshot") == snapshot.name)
        )

    def create_snapshot(self, snapshot: Snapshot) -> None:
        """Pin a revision under a name.

        Raises
        ------
        AlreadyExistsError
            If the name is taken, unless by the very same snapshot (SNAPSHOT_EXISTS).
        """
        try:
            publish(self.objects, snapshot_key(snapshot.name), encode_snapshot(snapshot))
        except AlreadyExistsError as err:
            raise AlreadyExistsError(
                f"bank {self.spec.name} has a snapshot {snapshot.name!r} already; "
                "choose another name, or delete it",
                reason=Reason.SNAPSHOT_EXISTS,
                metadata={"snapshot": snapshot.name},
            ) from err

    def delete_snapshot(self, name: str) -> None:
        """Give up a name; what only it kept goes at the next consolidation."""
        self.snapshot(name)
        self.objects.delete(snapshot_key(name))

    def remove_ended_snapshot(self, in_force: RevisionRecord) -> None:
        """Remove the name of the snapshot that `in_force`, the newest commit, gave up, if any."""
        if in_force.operation != UNPIN_OPERATION:
            return
        name = str(in_force.detail["snapshot"])
        try:
            snapshot = self.snapshot(name)
        except NotFoundError:
            return
        # One that is pinned for the next revision has the name again.
        if snapshot.revision < in_force.revision:
            self.objects.delete(snapshot_key(name))

    def _no_snapshot(self, name: str) -> NotFoundError:
        return NotFoundError(
            f"bank {self.spec.name} has no snapshot {name!r}",
            reason=Reason.UNKNOWN_SNAPSHOT,
            metadata={"snapshot": name},
        )


def _opened(where: str | ObjectStore, keyring: str) -> ObjectStore:
    if isinstance(where, str):
        return open_objects(where, keyring=keyring)
    if keyring:
        # Nothing would be sealed, and nobody would notice.
        raise InvalidArgumentError(
            f"{where.url} is a store already; give its URL together with the keyring, or `SealedObjects`",
            reason=Reason.BAD_CONFIG,
        )
    return where
