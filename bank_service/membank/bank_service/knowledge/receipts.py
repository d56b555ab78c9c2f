"""Receipts of deletions: what is written down before one, and signed after it.

The life of a deletion, beside that of any transaction (see `transactions`):

1. the shards take down what they will destroy; it goes into the record, hence into the chain;
2. the record is created, every shard destroys, and says so;
3. where somebody can do that, the process of the coordinator ends, as content came through it, and
   another one goes on from here; and the processes of those shards end, and others take their place;
4. every shard says again that nothing is left;
5. the receipt is signed and stored, create-only. Only now is the deletion acknowledged.

Whoever dies in between: the next coordinator finds a deletion without a receipt, and begins at 2.
Nothing else is committed before there is one, so only the newest deletion can lack it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

from membank.bank_service.knowledge.revisions import RevisionDraft, RevisionLog
from membank.bank_service.knowledge.shards import ShardGroup, ShardMember, raise_first
from membank.bank_service.shard.contract import Prepared
from membank.bank_service.shard.process import this_process
from membank.bank_service.store import Bank, probe_create_only
from membank.bank_service.store.objects import publish
from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format import RevisionRecord
from membank.wire.format.layout import public_key_key, receipt_key, revision_key, tree_key
from membank.wire.format.receipt import (
    DELETION,
    KEY_OPERATION,
    SIGNING_KEY,
    Acknowledgement,
    Deletion,
    DeletionOwner,
    ProcessLife,
    Receipt,
    Recycling,
    encode_public_key,
    sign_receipt,
)
from membank.wire.format.revision import record_sha256
from membank.wire.signing import PublicKey, Signer
from membank.wire.spec import BankSpec, BlockRef


class Recycler(Protocol):
    """Ends processes of shards and starts them again, so that no memory of them is left."""

    @property
    def outcome(self) -> Recycling:
        """What `recycle` comes to."""

    def recycle(self, shard_ids: Sequence[str]) -> None:
        """Let other processes take the place of those of these shards; return once they serve.

        Raises
        ------
        UnavailableError
            If one does not come back in time; it may be repeated.
        """


class NoRecycler:
    """A `Recycler` for shards that live on.

    Parameters
    ----------
    outcome
        Why they do, as receipts say it.
    """

    def __init__(self, outcome: Recycling = Recycling.NONE) -> None:
        self._outcome = outcome

    @property
    def outcome(self) -> Recycling:
        # docstring inherited
        return self._outcome

    def recycle(self, shard_ids: Sequence[str]) -> None:
        """Do nothing."""


class ReceiptDesk:
    """Makes and keeps the receipts of one bank. Used by its coordinator, under the lock of that.

    Parameters
    ----------
    bank
        The bank.
    shards
        All shards.
    log
        The bank's records.
    signer
        Signs.
    recycler
        Ends the processes that held what was deleted; None = they live on.
    end_process
        Ends this process for good, where another one is started for it then; None = it lives on.
    process
        Returns which process this is.
    clock
        Seconds since 1970-01-01 UTC.
    """

    def __init__(
        self,
        bank: Bank,
        shards: ShardGroup,
        *,
        log: RevisionLog,
        signer: Signer,
        recycler: Recycler | None = None,
        end_process: Callable[[], None] | None = None,
        process: Callable[[], ProcessLife] = this_process,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._bank = bank
        self._shards = shards
        self._log = log
        self._signer = signer
        self._recycler = recycler or NoRecycler()
        self._end_process = end_process
        self._process = process
        self._clock = clock

    def check_storage(self) -> None:
        """Raise unless the storage forgets what is deleted; it may have been set otherwise since.

        Raises
        ------
        FailedPreconditionError
            If it keeps versions of what is deleted (STORE_UNSUPPORTED).
        """
        try:
            probe_create_only(self._bank.objects)
        except FailedPreconditionError as err:
            raise FailedPreconditionError(
                f"{err.message}; until then nothing can be deleted for good: copy the bank to a "
                "bucket that never had versioning, and serve it from there",
                reason=err.reason,
                metadata=err.metadata,
            ) from err

    def introduce(self, prepared: Sequence[Prepared]) -> None:
        """Put the key into the bank, before a record names it; nothing for what deletes nothing."""
        if any(part.destruction is not None for part in prepared):
            key = self._signer.public_key
            publish(self._bank.objects, public_key_key(key.key_id), encode_public_key(key))

    def detail_of(
        self, prepared: Sequence[Prepared], *, packs: Sequence[str], changes_tree: bool
    ) -> Mapping[str, object]:
        """Return what the record is to say of what it destroys; empty where that is nothing.

        Parameters
        ----------
        prepared
            What the shards prepared.
        packs
            Names of the packs in the bank's own store that go with it.
        changes_tree
            Whether a tree document replaces the one in force.
        """
        found = [part.destruction for part in prepared if part.destruction is not None]
        if not found:
            return {}
        blocks = sorted((b for part in found for b in part.blocks), key=lambda block: block.ref)
        deletion = Deletion(
            topics=_topmost(self._bank.spec, [block.ref for block in blocks]),
            blocks=tuple(blocks),
            owners=tuple(
                DeletionOwner(
                    shard_id=self._shard_of(part.partitions[0]),
                    partitions=part.partitions,
                    num_slots=sum(block.num_slots for block in part.blocks),
                    num_manifests=part.num_manifests,
                    journal_bytes=part.journal_bytes,
                    process=part.process,
                )
                for part in found
            ),
            coordinator=self._process(),
            trees=(tree_key(self._log.committed.tree_revision),) if changes_tree else (),
            packs=tuple(packs),
            public_key=self._signer.public_key.text,
        )
        return {DELETION: deletion.to_json()}

    def owed(self) -> RevisionRecord | None:
        """Return the deletion that has no receipt yet; None = there is none."""
        record = self._log.committed
        # A key may have been made known since, in order to sign the receipt. Revision 0 is the
        # creation.
        while not record.committed or record.operation == KEY_OPERATION:
            record = self._log.read(record.revision - 1)
        if DELETION not in record.detail or find_receipt(self._bank, record.revision) is not None:
            return None
        return record

    def issue(self, record: RevisionRecord, confirm: Callable[[RevisionRecord], None]) -> None:
        """Make the receipt of a deletion that every shard has confirmed.

        Parameters
        ----------
        record
            Its record.
        confirm
            Has every shard confirm the newest commit.

        Raises
        ------
        UnavailableError
            If a process does not end, or does not come back; to be tried again.
        FailedPreconditionError
            If the storage keeps versions of what is deleted.
        """
        deletion = Deletion.from_json(record.detail[DELETION], what=revision_key(record.revision))
        self.check_storage()
        if self._end_process is not None and self._process() == deletion.coordinator:
            # Whoever asked asks again; the next coordinator finds this deletion without a receipt.
            self._end_process()
        self._make_known(deletion, confirm)
        owners = self._owners(deletion)
        before = self._processes(owners)
        outcome = self._outcome(deletion)
        self._recycler.recycle([owner.shard_id for owner in owners])
        confirm(self._log.committed)
        after = self._processes(owners)
        if self._recycler.outcome is Recycling.DONE:
            _require_ended(deletion, before, after)
        self._publish(record, deletion, outcome, owners, before, after)

    def _outcome(self, deletion: Deletion) -> Recycling:
        """Return what the receipt is to say: content of swaps and imports came through here, too."""
        outcome = self._recycler.outcome
        lives_on = self._process() == deletion.coordinator
        return Recycling.NONE if outcome is Recycling.DONE and lives_on else outcome

    def _make_known(self, deletion: Deletion, confirm: Callable[[RevisionRecord], None]) -> None:
        """Have the chain vouch for the key, where another one was there for the commit."""
        key = self._signer.public_key
        if key.text in {deletion.public_key, self._log.committed.detail.get(SIGNING_KEY)}:
            return
        publish(self._bank.objects, public_key_key(key.key_id), encode_public_key(key))
        confirm(self._log.append(_key_draft(key)))

    def _owners(self, deletion: Deletion) -> list[ShardMember]:
        touched = deletion.partitions
        return [m for m in self._shards.members() if touched.intersection(m.partitions)]

    def _processes(self, owners: Sequence[ShardMember]) -> list[ProcessLife]:
        return raise_first(self._shards.call(owners, lambda member: member.handle.process))

    def _shard_of(self, partition: int) -> str:
        return next(
            member.shard_id for member in self._shards.members() if partition in member.partitions
        )

    def _publish(
        self,
        record: RevisionRecord,
        deletion: Deletion,
        outcome: Recycling,
        owners: Sequence[ShardMember],
        before: Sequence[ProcessLife],
        after: Sequence[ProcessLife],
    ) -> None:
        key, now = receipt_key(record.revision), self._clock()
        receipt = Receipt(
            bank_id=self._bank.spec.bank_id,
            revision=record.revision,
            record_sha256=record_sha256(self._bank.objects.get(revision_key(record.revision))),
            operation=record.operation,
            principal=record.principal,
            request_id=record.request_id,
            time_s=record.time_s,
            deletion=deletion,
            recycling=outcome,
            acknowledgements=tuple(
                Acknowledgement(
                    shard_id=owner.shard_id,
                    partitions=tuple(sorted(deletion.partitions.intersection(owner.partitions))),
                    confirmed_by=ended,
                    now=lives,
                    time_s=now,
                )
                for owner, ended, lives in zip(owners, before, after, strict=True)
            ),
            issuer=self._process(),
            issue_time_s=now,
        )
        try:
            publish(self._bank.objects, key, sign_receipt(receipt, self._signer))
        except AlreadyExistsError:
            # Another coordinator of the bank was as quick. One receipt is as good as the other.
            return


def read_receipt(bank: Bank, revision: int) -> bytes:
    """Return the receipt of `revision`.

    Raises
    ------
    NotFoundError
        If there is none (UNKNOWN_RECEIPT).
    """
    data = find_receipt(bank, revision)
    if data is None:
        raise NotFoundError(
            f"revision {revision} has no receipt; `membank audit` says which revisions deleted "
            "something",
            reason=Reason.UNKNOWN_RECEIPT,
            metadata={"revision": str(revision)},
        )
    return data


def find_receipt(bank: Bank, revision: int) -> bytes | None:
    """Return the receipt of `revision`, or None."""
    try:
        return bank.objects.get(receipt_key(revision))
    except NotFoundError:
        return None


def held_up(
    error: UnavailableError, own: RevisionRecord | None, owed: RevisionRecord | None
) -> UnavailableError:
    """Return the error for a request that waits for what is to be finished before it.

    Parameters
    ----------
    error
        What keeps that from being finished.
    own
        Record that the request has already; None = it has none, so it changed nothing.
    owed
        Deletion that has no receipt yet; None = there is none.
    """
    revision = owed or own
    if owed is not None:
        what = f"the deletion at revision {owed.revision} is not finished"
    elif own is not None:
        what = "it is not finished"
    else:
        what = "what was begun before is not finished"
    begun = "nothing was changed" if own is None else f"revision {own.revision} is committed"
    return UnavailableError(
        f"{begun}, but {what}, and nothing else is committed before: {error.message}. `membank "
        "status` says which shard does not serve, and why; mend that (or end the service and start "
        "it again), then ask again with the same request id",
        reason=error.reason,
        metadata={
            **error.metadata,
            **({} if revision is None else {"revision": str(revision.revision)}),
        },
    )


def _key_draft(key: PublicKey) -> RevisionDraft:
    return RevisionDraft(
        operation=KEY_OPERATION,
        principal="service",
        request_id="",
        detail={SIGNING_KEY: key.text},
    )


def _require_ended(
    deletion: Deletion, before: Iterable[ProcessLife], after: Iterable[ProcessLife]
) -> None:
    held = {*before, *(owner.process for owner in deletion.owners)}
    if still := held.intersection(after):
        raise UnavailableError(
            f"{len(still)} processes that held what was deleted have not ended yet; ask again with "
            "the same request id",
            reason=Reason.SHARD_UNAVAILABLE,
        )


def _topmost(spec: BankSpec, refs: Sequence[BlockRef]) -> tuple[BlockRef, ...]:
    known = set(refs)
    return tuple(
        ref
        for ref in refs
        if not any(spec.ancestor(ref, level) in known for level in range(1, ref.level))
    )
