"""Removing what nothing retained needs, from shards and from the documents of the bank."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from membank.bank_service.knowledge.contract import AdminRequest
from membank.bank_service.knowledge.revisions import RevisionLog
from membank.bank_service.knowledge.shards import ShardGroup
from membank.bank_service.knowledge.snapshots import SnapshotCatalog
from membank.bank_service.knowledge.transactions import Coordinator, Plan
from membank.bank_service.shard.contract import PartitionGarbage, PartitionHistory
from membank.bank_service.shard.garbage import Item, merged, summed
from membank.bank_service.shard.retention import Retention
from membank.bank_service.store import Bank
from membank.bank_service.store.objects import PROBES
from membank.bank_service.store.sealed_objects import halves_of
from membank.wire.errors import CorruptionError, NotFoundError
from membank.wire.format.layout import TREES, log_prefix, number_in, snapshot_key, tree_key
from membank.wire.records import Garbage, GarbageKind, GarbageReport

_LOG = logging.getLogger(__name__)


class GarbageCollector:
    """Collects the garbage of one bank.

    Whatever moment it dies at, the bank is as it was, and another collection removes the rest.

    Parameters
    ----------
    bank
        The bank.
    shards
        All its shards.
    coordinator
        Runs the transactions.
    log
        The bank's records.
    snapshots
        The bank's snapshots.
    """

    def __init__(
        self,
        bank: Bank,
        shards: ShardGroup,
        coordinator: Coordinator,
        *,
        log: RevisionLog,
        snapshots: SnapshotCatalog,
    ) -> None:
        self._bank = bank
        self._shards = shards
        self._coordinator = coordinator
        self._log = log
        self._snapshots = snapshots

    def collect(self, request: AdminRequest, *, keep_revisions: int | None) -> GarbageReport:
        """See `BankAdmin.collect_garbage`."""
        probes = self._bank.objects.list(PROBES)
        history_from = 0
        if keep_revisions is not None:
            history_from = self._give_up_history(request, keep_revisions)
        found = list(self._collect_documents(dry_run=request.dry_run))
        promises = []
        for partition in range(self._bank.spec.num_partitions):
            for part in self._collect_partition(partition, history_from, request.dry_run):
                found += part.garbage
                promises.append(part.history_from)
        # A test of the storage that is under way now lasts for three requests; what was there
        # before all of this and still is was left by one that was cut off.
        found += self._remove(self._still_there(probes), dry_run=request.dry_run)
        report = GarbageReport(
            garbage=merged(found), history_from=max(promises), dry_run=request.dry_run
        )
        _LOG.info("%s collected garbage: %d bytes", request.principal, report.num_bytes)
        return report

    def _give_up_history(self, request: AdminRequest, keep_revisions: int) -> int:
        """Return where history is to begin, and put that on record where it gives something up."""
        retention = Retention(num_revisions=keep_revisions)
        floor = retention.floor(self._bank, self._log.committed.revision)
        is_repeated = self._log.find(request.request_id) is not None
        if not (is_repeated or self._gives_up(floor)):
            return floor
        if request.dry_run:
            # The revision that the collection itself makes will be one of those that are kept.
            return retention.floor(self._bank, self._log.last + 1)

        def plan() -> Plan:
            begin = retention.floor(self._bank, self._log.last + 1)
            return Plan(
                detail={"history_from": begin, "keep_revisions": keep_revisions},
                # Every partition begins anew, so that what only its old beginning needs can go.
                all_partitions=True,
            )

        # On record before it happens, so that nothing is ever missing without an account of it.
        asked = {"keep_revisions": keep_revisions}
        record = self._coordinator.run(request, "gc", asked, plan).record
        assert record is not None  # it is no dry run
        return int(str(record.detail["history_from"]))

    def _gives_up(self, floor: int) -> bool:
        def ends(history: PartitionHistory, oldest: int) -> set[int]:
            later = {number for revision, number in history.ends.items() if revision > oldest}
            return {history.end_of(oldest)} | later

        return any(
            history.history_from < floor
            and ends(history, history.history_from) != ends(history, floor)
            for history in self._shards.history()
        )

    def _collect_partition(
        self, partition: int, history_from: int, dry_run: bool
    ) -> Iterator[PartitionGarbage]:
        while True:
            part = self._shards.collect(partition, history_from=history_from, dry_run=dry_run)
            yield part
            if part.is_complete:
                return

    def _collect_documents(self, *, dry_run: bool) -> tuple[Garbage, ...]:
        # While no transaction is under way: a name is pinned, and a tree written, before the commit
        # that makes them count.
        with self._coordinator.settled():
            in_force = self._log.committed.tree_revision
            keys = [
                (GarbageKind.SNAPSHOT, snapshot_key(s.name)) for s in self._snapshots.leftovers()
            ]
            keys += [
                (GarbageKind.TREE, key)
                for key in self._bank.objects.list(TREES)
                if number_in(key, tree_key) not in {None, in_force}
            ]
            # Of a sealed bank's journals, what trimming left that was cut off: nobody lists it, and
            # no number of a journal is used again.
            keys += [
                (GarbageKind.UNNAMED_SLOT, key)
                for partition in range(self._bank.spec.num_partitions)
                for key in sorted(halves_of(self._bank.objects, log_prefix(partition)).without_key)
            ]
            items = [Item(kind, key, self._size(key)) for kind, key in keys]
            return self._remove(items, dry_run=dry_run)

    def _size(self, key: str) -> int:
        try:
            return len(self._bank.objects.get(key))
        except (NotFoundError, CorruptionError):
            return 0  # half of a sealed object, or one that nobody can open

    def _still_there(self, probes: list[str]) -> list[Item]:
        items = []
        for key in probes:
            try:
                items.append(Item(GarbageKind.PROBE, key, len(self._bank.objects.get(key))))
            except NotFoundError:
                continue  # that test has ended
        return items

    def _remove(self, items: list[Item], *, dry_run: bool) -> tuple[Garbage, ...]:
        if not dry_run:
            for item in items:
                self._bank.objects.delete(item.key)
        return summed(items)
