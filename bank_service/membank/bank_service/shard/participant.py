"""A shard's part in transactions: prepare, then commit or abort, or find out after a failure."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock

from membank.bank_service.shard.content import BlockRecord
from membank.bank_service.shard.context import ShardContext
from membank.bank_service.shard.contract import BlockOperation, Destruction, Prepared
from membank.bank_service.shard.draft import Draft, check_operations, draft_changes
from membank.bank_service.shard.partition import Partition
from membank.bank_service.shard.process import this_process
from membank.bank_service.shard.state import Hold
from membank.wire.errors import (
    ConflictError,
    CorruptionError,
    FailedPreconditionError,
    MembankError,
    Reason,
    UnavailableError,
)
from membank.wire.format import NO_SLOT, Manifest, RevisionRecord
from membank.wire.records import BlockEvent
from membank.wire.spec import Array, BlockRef, Role

_LOG = logging.getLogger(__name__)


class Participant:
    """Runs transactions on the partitions of one shard (see `contract` for the protocol).

    Parameters
    ----------
    context
        What the partitions share.
    partitions
        The partitions, by number.
    revision
        Newest committed revision that is in force in all of them.
    last_record
        Newest revision that has been decided, committed or aborted, and taken account of.
    """

    # Lock order: `_admin`, then partitions' writers, then the state lock. `_admin` is held for
    # the whole of one call, so that a shard runs one step of one transaction at a time.
    # `revision` is written under the state lock.

    def __init__(
        self,
        context: ShardContext,
        partitions: Mapping[int, Partition],
        *,
        revision: int,
        last_record: int,
    ) -> None:
        self._context = context
        self._bank = context.bank
        self._partitions = partitions
        self._admin = RLock()
        self._last_record = last_record
        self.revision = revision
        """Newest revision in force here."""

    def prepare(
        self,
        revision: int,
        operations: Sequence[BlockOperation],
        *,
        all_partitions: bool = False,
        dry_run: bool = False,
    ) -> Prepared:
        """See `ShardApi.prepare`."""
        check_operations(self._bank.spec, operations)
        by_partition: dict[int, list[BlockOperation]] = {}
        for operation in operations:
            by_partition.setdefault(self._owner(operation.ref).number, []).append(operation)
        if all_partitions:
            by_partition |= {n: [] for n in self._partitions if n not in by_partition}
        with self._admin:
            if dry_run:
                return self._dry_run(by_partition)
            self._require_next(revision, by_partition)
            journal_bytes = {n: self._partitions[n].journal_bytes for n in by_partition}
            with self._held(revision, sorted(by_partition)):
                drafts = {
                    number: self._draft(self._partitions[number], by_partition[number])
                    for number in sorted(by_partition)
                }
                destruction = self._destruction(drafts, journal_bytes)
                manifests = {
                    number: self._partitions[number]
                    .prepare({draft.ref: draft.after for draft in found})
                    .number
                    for number, found in drafts.items()
                }
                return self._prepared(manifests, drafts, destruction)

    def commit(self, record: RevisionRecord) -> None:
        """See `ShardApi.commit`."""
        with self._admin:
            if record.revision > self._last_record:
                self.catch_up(record.revision)
            if self._last_record < record.revision:
                raise FailedPreconditionError(
                    f"revision {record.revision} has no record yet; create it before the commit",
                    reason=Reason.TRANSACTION_CONFLICT,
                    metadata={"revision": str(record.revision)},
                )
            # A removal that failed half-way is finished by the repetition of the commit.
            for partition in self._partitions.values():
                partition.finish_removal()

    def abort(self, revision: int) -> None:
        """See `ShardApi.abort`."""
        with self._admin:
            # What an earlier coordinator prepared may have been decided while nobody told us.
            self.catch_up()
            if any(hold.revision == revision for hold in self._holds()):
                self._record_abort(revision)

    def settle(self, now: float) -> tuple[int, ...]:
        """Decide transactions that were prepared long ago and whose coordinator is silent.

        Parameters
        ----------
        now
            The present time by the shard's clock, in seconds.

        Returns
        -------
        tuple[int, ...]
            The revisions that are decided now: aborted by this call, or by anybody before it.
        """
        settled = []
        with self._admin:
            self.catch_up()
            limit = now - self._context.config.settle_after_s
            for revision in sorted({h.revision for h in self._holds() if h.since <= limit}):
                self._record_abort(revision)
                settled.append(revision)
            self._finish_removals()
        return tuple(settled)

    def _finish_removals(self) -> None:
        """Go on with the destruction of deleted content that failed when nobody was there to repeat it."""
        for partition in self._partitions.values():
            if partition.held is not None:
                continue
            try:
                partition.finish_removal()
            except MembankError as err:
                _LOG.warning("deleted blocks of partition %d are there: %s", partition.number, err)

    def _record_abort(self, revision: int) -> None:
        """Decide against `revision`, unless somebody has decided, and follow the decision.

        Without a record, whoever prepared it could still commit it after what was prepared is gone.
        """
        try:
            self._bank.decide(self._abort_record(revision))
        except ConflictError:
            # Creating the record decides, and somebody else was first.
            _LOG.info("revision %d was decided while it was being given up", revision)
        self.catch_up(revision)

    def _abort_record(self, revision: int) -> RevisionRecord:
        before = self._bank.latest_commit()
        return RevisionRecord(
            revision=revision,
            committed=False,
            nonce="",
            previous_sha256="",
            operation="abort",
            principal="shard",
            request_id="",
            time_s=self._context.wall_clock(),
            tree_revision=before.tree_revision,
            removal_revision=before.removal_revision,
        )

    def catch_up(self, until: int | None = None) -> None:
        """Take account of every revision decided since, at most up to `until`."""
        with self._admin:
            while until is None or self._last_record < until:
                record = self._bank.record(self._last_record + 1)
                if record is None:
                    return
                self._apply(record)

    def _apply(self, record: RevisionRecord) -> None:
        held = [p for p in self._partitions.values() if p.held is not None]
        named = [p for p in held if _is_named(p, record)]
        self._require_prepared(record, named)
        events: list[BlockEvent] = []
        with self._context.state_lock:
            # All partitions under one lock: no reader sees some before and some after.
            for partition in named:
                events += partition.install()
            if record.committed:
                self.revision = record.revision
                for partition in self._partitions.values():
                    partition.enter(record.revision)
        self._last_record = record.revision
        self._context.hub.publish(events)
        with ExitStack() as stack:
            # Every partition is released, whatever goes wrong in one of them.
            for partition in held:
                if partition in named:
                    stack.callback(partition.finish)
                else:
                    stack.callback(partition.release, drop_prepared=True)

    def _require_prepared(self, record: RevisionRecord, named: Sequence[Partition]) -> None:
        if not record.committed:
            return
        for number, manifest in record.manifests.items():
            partition = self._partitions.get(number)
            if partition is None or partition in named:
                continue
            if manifest > partition.manifest.number:
                raise CorruptionError(
                    f"revision {record.revision} names manifest {manifest} of partition "
                    f"{number}, which was not prepared here; restart the shard",
                    reason=Reason.MANIFEST_CORRUPT,
                    metadata={"partition": str(number), "manifest": str(manifest)},
                )

    def _require_next(self, revision: int, numbers: Iterable[int]) -> None:
        self.catch_up()
        if revision != self._last_record + 1:
            raise ConflictError(
                f"the next revision is {self._last_record + 1}, not {revision}; "
                "read the bank again and repeat",
                reason=Reason.TRANSACTION_CONFLICT,
                metadata={"revision": str(revision)},
            )
        for number in numbers:
            # Even one that prepared the same revision: its coordinator may commit it yet.
            if (hold := self._partitions[number].held) is not None:
                raise UnavailableError(
                    f"partition {number} waits for the decision on revision {hold.revision}; "
                    "abort it, settle it, or retry later",
                    reason=Reason.TRANSACTION_IN_PROGRESS,
                    metadata={"partition": str(number), "revision": str(hold.revision)},
                )

    @contextmanager
    def _held(self, revision: int, numbers: Sequence[int]) -> Iterator[None]:
        with ExitStack() as undo:
            for number in numbers:
                partition = self._partitions[number]
                partition.hold(revision)
                undo.callback(partition.release, drop_prepared=True)
                partition.fold_held()
            yield
            undo.pop_all()

    def _draft(self, partition: Partition, operations: Iterable[BlockOperation]) -> list[Draft]:
        spec = self._bank.spec
        drafts = draft_changes(spec, operations, _Blocks(self._context, partition))
        for draft in drafts:
            if draft.after.entry.slot not in {NO_SLOT, draft.before.slot}:
                # Better to learn here that an old slot is damaged than after giving up the new.
                partition.store.load_content(draft.ref, draft.after, spec.roles)
        return drafts

    def _dry_run(self, by_partition: Mapping[int, Sequence[BlockOperation]]) -> Prepared:
        drafts = {
            number: self._draft(self._partitions[number], operations)
            for number, operations in by_partition.items()
        }
        return self._prepared({}, drafts)

    def _destruction(
        self, drafts: Mapping[int, Sequence[Draft]], journal_bytes: Mapping[int, int]
    ) -> Destruction | None:
        """Take down what is to be destroyed: afterwards nobody can."""
        found = {
            number: self._partitions[number].take_inventory(erased)
            for number, erased in _erased(drafts).items()
        }
        if not found:
            return None
        return Destruction(
            partitions=tuple(sorted(found)),
            blocks=tuple(block for inventory in found.values() for block in inventory.blocks),
            num_manifests=sum(inventory.num_manifests for inventory in found.values()),
            journal_bytes=sum(journal_bytes[number] for number in found),
            process=this_process(),
        )

    def _prepared(
        self,
        manifests: Mapping[int, int],
        drafts: Mapping[int, Sequence[Draft]],
        destruction: Destruction | None = None,
    ) -> Prepared:
        if destruction is None:
            num_slots = sum(
                self._partitions[number].count_slots(erased)
                for number, erased in _erased(drafts).items()
            )
        else:
            num_slots = sum(block.num_slots for block in destruction.blocks)
        return Prepared(
            manifests=dict(manifests),
            changes=tuple(
                draft.change(self._bank.spec) for found in drafts.values() for draft in found
            ),
            num_slots_destroyed=num_slots,
            destruction=destruction,
        )

    def _owner(self, ref: BlockRef) -> Partition:
        return owned(self._partitions, self._bank.spec.partition_of(ref))

    def _holds(self) -> list[Hold]:
        return [p.held for p in self._partitions.values() if p.held is not None]


class _Blocks:
    """The `PresentBlocks` of one partition, for one draft."""

    def __init__(self, context: ShardContext, partition: Partition) -> None:
        self._context = context
        self._partition = partition
        self._manifests: dict[int, Manifest] = {}

    def record(self, ref: BlockRef) -> BlockRecord:
        with self._context.state_lock:
            return self._partition.record(ref)

    def weight(self, ref: BlockRef, record: BlockRecord) -> Array:
        try:
            return self._partition.store.load_content(ref, record, (Role.WEIGHT,)).weight
        except CorruptionError:
            # A dry run holds nothing back, so that the slot may be gone because the block moved on.
            if self.record(ref).entry == record.entry:
                raise
            raise UnavailableError(
                f"block {ref} changed while it was read; retry", reason=Reason.OVERLOADED
            ) from None

    def manifest(self, ref: BlockRef, number: int) -> Manifest:
        if number not in self._manifests:
            self._manifests[number] = self._partition.retained_manifest(number)
        return self._manifests[number]


def owned(partitions: Mapping[int, Partition], number: int) -> Partition:
    """Return partition `number`.

    Raises
    ------
    UnavailableError
        If this shard does not own it (NOT_OWNER): the caller's placement is out of date.
    """
    try:
        return partitions[number]
    except KeyError:
        raise UnavailableError(
            f"partition {number} is not served here; refresh the placement and retry",
            reason=Reason.NOT_OWNER,
            metadata={"partition": str(number)},
        ) from None


def _erased(drafts: Mapping[int, Sequence[Draft]]) -> dict[int, list[BlockRef]]:
    """Return the blocks that are deleted, by partition, where there are any."""
    erased = {
        number: [draft.ref for draft in found if draft.erases] for number, found in drafts.items()
    }
    return {number: refs for number, refs in erased.items() if refs}


def _is_named(partition: Partition, record: RevisionRecord) -> bool:
    hold = partition.held
    if hold is None or not record.committed or hold.revision != record.revision:
        return False
    return hold.manifest is not None and (
        record.manifests.get(partition.number) == hold.manifest.number
    )
