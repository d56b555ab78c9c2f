"""What a bank can be rolled back to, and what that changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from membank.bank_service.knowledge.diffs import BaseState
from membank.bank_service.knowledge.revisions import RevisionLog
from membank.bank_service.knowledge.shards import ShardGroup
from membank.bank_service.knowledge.snapshots import SnapshotCatalog
from membank.bank_service.knowledge.transactions import Plan
from membank.bank_service.shard.contract import BlockOperation, RestoreEntry
from membank.bank_service.store import Bank
from membank.wire.errors import InvalidArgumentError, NotFoundError, Reason
from membank.wire.format import NO_SLOT, Entry, Manifest, RevisionRecord
from membank.wire.spec import BlockRef, BlockState

_INITIAL = Entry(slot=NO_SLOT, version=0)


class History:
    """The revisions of one bank that are kept.

    Parameters
    ----------
    bank
        The bank.
    shards
        All its shards.
    log
        The bank's records.
    snapshots
        The bank's snapshots.
    """

    def __init__(
        self, bank: Bank, shards: ShardGroup, log: RevisionLog, snapshots: SnapshotCatalog
    ) -> None:
        self._bank = bank
        self._shards = shards
        self._log = log
        self._snapshots = snapshots

    def retained(self) -> list[RevisionRecord]:
        """Return the revisions that the whole bank can be rolled back to, newest first."""
        present = self._log.committed.revision
        oldest = max(history.history_from for history in self._shards.history())
        kept = set(range(oldest, present))
        kept |= {s.revision for s in self._snapshots.list() if s.revision < present}
        records = (self._log.read(revision) for revision in sorted(kept, reverse=True))
        return [record for record in records if record.committed]

    def plan_rollback(self, target: str | int, topic: BlockRef | None, *, only_block: bool) -> Plan:
        """Return the plan that brings blocks back to `target`; under the coordinator's lock.

        Parameters
        ----------
        target
            Name of a snapshot, or number of a revision.
        topic
            Only this topic; None = the whole bank.
        only_block
            True leaves what lies under the topic as it is.

        Raises
        ------
        NotFoundError
            If there is no such snapshot (UNKNOWN_SNAPSHOT), or the revision does not exist or is
            not retained any more (UNKNOWN_REVISION).
        InvalidArgumentError
            If the revision is the one in force.
        """
        spec = self._bank.spec
        if topic is None:
            refs = list(spec.blocks())
        else:
            refs = [topic] if only_block else list(spec.subtree(topic))
        revision, number_of = self._locate(target, refs)
        return Plan(
            operations=self._restore_entries(refs, revision, number_of),
            detail={
                "snapshot": target if isinstance(target, str) else "",
                "to_revision": revision,
                "topic": "" if topic is None else str(topic),
                "only_block": only_block,
            },
        )

    def state_of(self, target: str | int, refs: Sequence[BlockRef]) -> BaseState:
        """Return what an earlier state says of `refs`; under the coordinator's lock.

        Parameters
        ----------
        target
            Name of a snapshot, for its beginning; or number of a revision, for its end.
        refs
            The blocks.

        Raises
        ------
        NotFoundError, InvalidArgumentError
            As of `plan_rollback`.
        """
        revision, number_of = self._locate(target, refs)
        entry_of = self._entries(number_of)
        return BaseState(
            revision=revision,
            snapshot=target if isinstance(target, str) else "",
            entries={ref: entry_of(ref)[1] or _INITIAL for ref in refs},
        )

    def _locate(
        self, target: str | int, refs: Sequence[BlockRef]
    ) -> tuple[int, Callable[[int], int]]:
        """Return the revision of an earlier state, and the manifest of each partition in it."""
        if isinstance(target, str):
            snapshot = self._snapshots.get(target)
            return snapshot.revision, self._beginnings(snapshot.revision)
        revision = self._checked(target)
        partitions = {self._bank.spec.partition_of(ref) for ref in refs}
        return revision, self._ends(revision, partitions)

    def _beginnings(self, revision: int) -> Callable[[int], int]:
        return lambda partition: self._bank.named_manifest(revision, partition)

    def _ends(self, revision: int, partitions: Collection[int]) -> Callable[[int], int]:
        histories = {h.partition: h for h in self._shards.history() if h.partition in partitions}
        oldest = max(history.history_from for history in histories.values())
        snapshots = self._snapshots.list()
        if revision < oldest and revision not in {s.revision for s in snapshots}:
            names = ", ".join(f"{s.name} ({s.revision})" for s in snapshots)
            raise NotFoundError(
                f"revision {revision} of bank {self._bank.spec.name} is not retained any more; the "
                f"oldest that is: {oldest}" + (f"; snapshots: {names}" if names else ""),
                reason=Reason.UNKNOWN_REVISION,
                metadata={"revision": str(revision), "oldest": str(oldest)},
            )
        return lambda partition: histories[partition].end_of(revision)

    def _checked(self, revision: int) -> int:
        present = self._log.committed.revision
        if revision == present:
            raise InvalidArgumentError(
                f"revision {revision} is in force: choose an earlier one, or a snapshot"
            )
        if not 0 <= revision < present or not self._log.read(revision).committed:
            raise NotFoundError(
                f"bank {self._bank.spec.name} has no revision {revision}; its newest is {present}",
                reason=Reason.UNKNOWN_REVISION,
                metadata={"revision": str(revision), "newest": str(present)},
            )
        return revision

    def _restore_entries(
        self, refs: Sequence[BlockRef], revision: int, number_of: Callable[[int], int]
    ) -> list[BlockOperation]:
        entry_of = self._entries(number_of)
        operations: list[BlockOperation] = []
        for ref, status in sorted(self._shards.describe(refs).items()):
            if status.state is BlockState.DELETED:
                continue
            number, entry = entry_of(ref)
            # A version is given once, so an equal one means that nothing has changed since.
            if status.version != (0 if entry is None else entry.version):
                operations.append(RestoreEntry(ref=ref, manifest=number))
        return operations

    def _entries(
        self, number_of: Callable[[int], int]
    ) -> Callable[[BlockRef], tuple[int, Entry | None]]:
        """Return what tells a block's manifest (0 = as initialised), and what that says of it."""
        pinned: dict[int, Manifest | None] = {}

        def entry_of(ref: BlockRef) -> tuple[int, Entry | None]:
            partition = self._bank.spec.partition_of(ref)
            if partition not in pinned:
                number = number_of(partition)
                pinned[partition] = self._bank.read_manifest(partition, number) if number else None
            manifest = pinned[partition]
            return (0, None) if manifest is None else (manifest.number, manifest.entries.get(ref))

        return entry_of
