"""The operations of a bank: each is a plan for the coordinator, or a read."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from membank.bank_service.knowledge.contract import AdminRequest, ExportedPack
from membank.bank_service.knowledge.garbage import GarbageCollector
from membank.bank_service.knowledge.history import History
from membank.bank_service.knowledge.pack_operations import PackOperations
from membank.bank_service.knowledge.receipts import read_receipt
from membank.bank_service.knowledge.requests import asked_of
from membank.bank_service.knowledge.revisions import RevisionLog
from membank.bank_service.knowledge.shards import ShardGroup
from membank.bank_service.knowledge.snapshots import SnapshotCatalog
from membank.bank_service.knowledge.steps import StepPlanner, operation_of
from membank.bank_service.knowledge.topics import TopicCatalog
from membank.bank_service.knowledge.transactions import Coordinator, Plan
from membank.bank_service.knowledge.trees import TreeStore
from membank.bank_service.store import Bank
from membank.wire.crc import Buffer
from membank.wire.errors import InvalidArgumentError
from membank.wire.format import RevisionRecord
from membank.wire.format.receipt import DELETION
from membank.wire.format.revision import REQUEST_SHA256
from membank.wire.records import (
    Applied,
    AuditRecord,
    BankStats,
    BlockDescription,
    GarbageReport,
    Snapshot,
    StoredPack,
    Topic,
    TransactionReport,
)
from membank.wire.signing import Signer, TrustedKeys
from membank.wire.spec import BankSpec, BlockRef
from membank.wire.steps import Step

_AUDIT_HIDES = frozenset({"changes", "tree_changes", DELETION, REQUEST_SHA256})
"""Parts of a record's detail that are there for retries and too long for an account."""


class BankOperations:
    """A `BankAdmin` over a bank's storage and its shards.

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
    trees
        The bank's tree documents.
    clock
        Seconds since 1970-01-01 UTC.
    signer
        Signs the packs that are exported; None = nobody does.
    trusted_keys
        Keys of which one must have signed a pack that is imported; None = anything is taken.
    """

    def __init__(
        self,
        bank: Bank,
        shards: ShardGroup,
        coordinator: Coordinator,
        *,
        log: RevisionLog,
        trees: TreeStore,
        clock: Callable[[], float] = time.time,
        signer: Signer | None = None,
        trusted_keys: TrustedKeys | None = None,
    ) -> None:
        self._bank = bank
        self._shards = shards
        self._coordinator = coordinator
        self._log = log
        self._trees = trees
        self._planner = StepPlanner(bank.spec, shards, log, trees)
        self._catalog = TopicCatalog(bank.spec, shards, log, trees)
        self._snapshots = SnapshotCatalog(bank, coordinator, log, clock)
        self._history = History(bank, shards, log, self._snapshots)
        self._packs = PackOperations(
            bank,
            shards,
            coordinator,
            log=log,
            trees=trees,
            history=self._history,
            signer=signer,
            trusted_keys=trusted_keys,
            clock=clock,
        )
        self._garbage = GarbageCollector(
            bank, shards, coordinator, log=log, snapshots=self._snapshots
        )

    @property
    def spec(self) -> BankSpec:
        # docstring inherited
        return self._bank.spec

    # ---- reads

    def list_topics(
        self, parent: BlockRef | None = None, *, depth: int = 0
    ) -> tuple[tuple[Topic, ...], int]:
        # docstring inherited
        return self._catalog.list(parent, depth=depth)

    def describe_blocks(self, refs: Sequence[BlockRef]) -> tuple[BlockDescription, ...]:
        # docstring inherited
        return self._catalog.describe(refs)

    def export_topic(
        self, topic: BlockRef, *, weights_only: bool = False, since: str | int | None = None
    ) -> ExportedPack:
        # docstring inherited
        return self._packs.export(topic, weights_only=weights_only, since=since)

    def store_pack(
        self,
        topic: BlockRef,
        name: str,
        *,
        weights_only: bool = False,
        since: str | int | None = None,
    ) -> ExportedPack:
        # docstring inherited
        return self._packs.store(topic, name, weights_only=weights_only, since=since)

    def list_packs(self) -> tuple[StoredPack, ...]:
        # docstring inherited
        return self._packs.list()

    def delete_pack(self, request: AdminRequest, name: str) -> StoredPack:
        # docstring inherited
        return self._packs.delete(request, name)

    def list_snapshots(self) -> tuple[Snapshot, ...]:
        # docstring inherited
        return self._snapshots.list()

    def stats(self) -> BankStats:
        # docstring inherited
        statuses = self._shards.describe(list(self.spec.blocks()))
        return BankStats(
            shards=self._shards.stats(),
            revision=self._log.committed.revision,
            num_blocks=self.spec.num_blocks,
            num_blocks_written=sum(status.version > 0 for status in statuses.values()),
        )

    def receipt(self, revision: int) -> bytes:
        # docstring inherited
        return read_receipt(self._bank, revision)

    def audit(self, limit: int, *, retained_only: bool = False) -> tuple[AuditRecord, ...]:
        # docstring inherited
        records = self._history.retained() if retained_only else self._log.newest(limit)
        return tuple(_audit_record(record) for record in records[:limit])

    # ---- transactions

    def apply(self, request: AdminRequest, steps: Sequence[Step]) -> Applied:
        # docstring inherited
        outcome = self._coordinator.run(
            request, operation_of(steps), asked_of(steps), lambda: self._planner.plan(steps)
        )
        return Applied(report=outcome.report, receipt=outcome.receipt)

    def import_topic(
        self,
        request: AdminRequest,
        pack: Buffer,
        *,
        topic: BlockRef | None = None,
        force: bool = False,
    ) -> tuple[TransactionReport, BlockRef]:
        # docstring inherited
        return self._packs.import_pack(request, pack, topic=topic, force=force)

    def import_stored(
        self,
        request: AdminRequest,
        name: str,
        *,
        topic: BlockRef | None = None,
        force: bool = False,
    ) -> tuple[TransactionReport, BlockRef]:
        # docstring inherited
        return self._packs.import_stored(request, name, topic=topic, force=force)

    def create_snapshot(self, request: AdminRequest, name: str) -> Snapshot:
        # docstring inherited
        return self._snapshots.create(request, name)

    def delete_snapshot(self, request: AdminRequest, name: str) -> tuple[Snapshot, int]:
        # docstring inherited
        return self._snapshots.delete(request, name)

    def rollback(
        self,
        request: AdminRequest,
        target: str | int,
        topic: BlockRef | None = None,
        *,
        only_block: bool = False,
    ) -> TransactionReport:
        # docstring inherited
        if topic is not None:
            self.spec.check_ref(topic)
        elif only_block:
            raise InvalidArgumentError("a rollback of one block alone must name the block")

        def plan() -> Plan:
            return self._history.plan_rollback(target, topic, only_block=only_block)

        asked = {
            "target": target,
            "topic": None if topic is None else str(topic),
            "only_block": only_block,
        }
        return self._coordinator.run(request, "rollback", asked, plan).report

    def collect_garbage(
        self, request: AdminRequest, *, keep_revisions: int | None = None
    ) -> GarbageReport:
        # docstring inherited
        return self._garbage.collect(request, keep_revisions=keep_revisions)


def _audit_record(record: RevisionRecord) -> AuditRecord:
    detail = {key: value for key, value in record.detail.items() if key not in _AUDIT_HIDES}
    changes = record.detail.get("changes")
    if isinstance(changes, list):
        detail["num_blocks"] = len(changes)
    return AuditRecord(
        revision=record.revision,
        time_s=record.time_s,
        principal=record.principal,
        operation=record.operation if record.committed else "aborted",
        request_id=record.request_id,
        detail=detail,
    )
