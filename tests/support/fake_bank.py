"""A bank in memory: shards, transactions and a gateway in plain Python, to test clients against.

No network, no storage; blocks are dicts of arrays, and the optimizer is ``w -= lr * g``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fake_shard import FakeShard, Held, Pinned
from membank.wire.crc import crc32c
from membank.wire.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from membank.wire.records import (
    Applied,
    AuditRecord,
    BankInfo,
    BankStats,
    BlockChange,
    BlockDescription,
    CentroidChange,
    Garbage,
    GarbageReport,
    PartitionOwner,
    Placement,
    ShardStats,
    Snapshot,
    StoredPack,
    Topic,
    TransactionReport,
    TreeChange,
)
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState, LevelSpec
from membank.wire.steps import Combine, Delete, Place, Step, Swap

SPEC = BankSpec(
    name="fake",
    num_layers=2,
    width=8,
    levels=(
        LevelSpec(fan_out=4, block_width=3, learning_rate=0.5),
        LevelSpec(fan_out=2, block_width=2, learning_rate=0.25),
    ),
    num_partitions=4,
    bank_id="fake-1",
)
"""4 + 8 blocks in 4 partitions."""

_STATES = {
    "withhold": BlockState.WITHHELD,
    "restore": BlockState.ACTIVE,
    "delete": BlockState.DELETED,
}


class FakeBank:
    """Shards, and the gateway in front of them.

    Parameters
    ----------
    num_shards
        Shards that the partitions are dealt to.
    spec
        Spec; None = a service without a bank.
    tree
        The tree document.
    """

    def __init__(
        self, *, num_shards: int = 2, spec: BankSpec | None = SPEC, tree: bytes = b""
    ) -> None:
        self._spec = spec
        self.tree_bytes = tree
        self.tree_revision = 0
        self.revision = 0
        self.receipts: dict[int, bytes] = {}
        self.removal_revision = 0
        self.generation = 1
        self.endpoints: dict[str, str] = {}
        self.labels: dict[BlockRef, str] = {}
        self.reports: dict[str, TransactionReport] = {}
        self.snapshots: dict[str, Pinned] = {}
        self.packs: dict[str, bytes] = {}
        self.deleted_packs: dict[str, StoredPack] = {}
        self.given_up: dict[str, tuple[Snapshot, int]] = {}
        self.ends: dict[int, dict[BlockRef, Held]] = {}
        self.garbage: tuple[Garbage, ...] = ()
        self.keep_revisions: int | None = None
        self.audit: list[AuditRecord] = []
        self.shards = [
            FakeShard(self, f"shard-{index}", range(index, SPEC.num_partitions, num_shards))
            for index in range(num_shards if spec is not None else 0)
        ]
        self._counter = itertools.count(1)

    @property
    def spec(self) -> BankSpec:
        if self._spec is None:
            raise NotFoundError("no bank here", reason=Reason.UNKNOWN_BANK)
        return self._spec

    def become(self, bank_id: str) -> None:
        """Be another bank from now on."""
        self._spec = replace(self.spec, bank_id=bank_id)

    def shard_of(self, ref: BlockRef) -> FakeShard:
        partition = self.spec.partition_of(ref)
        return next(shard for shard in self.shards if partition in shard.partitions)

    def held(self, ref: BlockRef) -> Held:
        """Return a block behind everybody's back."""
        return self.shard_of(ref).blocks[ref]

    def move(self, shard: FakeShard, endpoint: str) -> None:
        """Say that a shard is found elsewhere from now on."""
        self.endpoints[shard.shard_id] = endpoint
        self.generation += 1

    def info(self) -> BankInfo:
        owners = tuple(
            PartitionOwner(
                partition=partition,
                shard_id=shard.shard_id,
                endpoint=self.endpoints.get(shard.shard_id, ""),
            )
            for shard in self.shards
            for partition in sorted(shard.partitions)
        )
        return BankInfo(
            spec=self.spec,
            revision=self.revision,
            placement=Placement(generation=self.generation, owners=owners),
            tree_revision=self.tree_revision,
            removal_revision=self.removal_revision,
            server_version="fake",
        )

    def tree(self) -> bytes:
        if not self.tree_bytes:
            raise NotFoundError("no tree", reason=Reason.NO_TREE)
        return self.tree_bytes

    def create_bank(self, spec: BankSpec, tree: bytes, *, request_id: str) -> BankSpec:
        if self._spec is not None:
            raise AlreadyExistsError("there is a bank", reason=Reason.BANK_EXISTS)
        self._spec = replace(spec, bank_id=f"fake-{request_id}")
        self.tree_bytes = tree
        self.shards = [FakeShard(self, "shard-0", range(spec.num_partitions))]
        return self._spec

    def topics(self, parent: BlockRef | None, depth: int) -> tuple[Topic, ...]:
        refs = list(self.spec.blocks() if parent is None else self.spec.subtree(parent))
        top = 0 if parent is None else parent.level
        return tuple(self._topic(ref) for ref in refs if not depth or ref.level <= top + depth)

    def describe(self, refs: Sequence[BlockRef]) -> tuple[BlockDescription, ...]:
        for ref in refs:
            self.spec.check_ref(ref)
        return tuple(
            BlockDescription(
                topic=self._topic(ref),
                crc32c=crc32c(self.held(ref).weight),
                shape=self.held(ref).weight.shape,
                optimizer_bytes=0,
                shard_id=self.shard_of(ref).shard_id,
            )
            for ref in refs
        )

    def _topic(self, ref: BlockRef) -> Topic:
        kept = self.held(ref)
        return Topic(
            ref=ref,
            label=self.labels.get(ref, f"topic {ref}"),
            state=kept.state,
            version=kept.version,
            step=kept.step,
            num_bytes=kept.weight.nbytes,
            num_documents=0,
            partition=self.spec.partition_of(ref),
        )

    def apply(self, steps: Sequence[Step], *, request_id: str, dry_run: bool) -> Applied:
        if request_id in self.reports:
            return Applied(report=self.reports[request_id], receipt=_receipt(steps))
        new = {ref: kept for step in steps for ref, kept in self._after(step)}

        def change(ref: BlockRef, kept: Held) -> None:
            kept.weight, kept.state = new[ref].weight, new[ref].state

        places = [step for step in steps if isinstance(step, Place)]
        kinds = {step.kind for step in steps}
        report = self.transact(
            kinds.pop() if len(kinds) == 1 else "transaction",
            list(new),
            change,
            request_id=request_id,
            dry_run=dry_run,
            tree_changes=tuple(map(_tree_change, places)),
        )
        if dry_run:
            return Applied(report=report)
        if any(kept.state is not BlockState.ACTIVE for kept in new.values()):
            self.removal_revision = report.revision
        self.labels |= {step.topic: step.label for step in places if step.label is not None}
        receipt = _receipt(steps)
        if receipt:
            self.receipts[report.revision] = receipt
        return Applied(report=report, receipt=receipt)

    def _after(self, step: Step) -> Iterator[tuple[BlockRef, Held]]:
        match step:
            case Swap(ref=ref, weight=weight):
                self._expect(ref, step.expected_version)
                yield ref, Held(weight.astype(self.spec.numpy_dtype))
            case Combine(ref=ref, other=other):
                self._expect(ref, step.expected_version)
                kept = self.held(ref)
                weight = step.keep * kept.weight.astype(np.float32)
                if other is not None:
                    self._expect(other, step.expected_other_version)
                    weight = weight + step.add * self.held(other).weight.astype(np.float32)
                yield ref, Held(weight.astype(self.spec.numpy_dtype), state=kept.state)
            case Place(topic=topic):
                self.spec.check_ref(topic)
            case _:
                self.spec.check_ref(step.topic)
                refs = [step.topic] if step.only_block else self.spec.subtree(step.topic)
                for ref in refs:
                    yield ref, Held(self.held(ref).weight, state=_STATES[step.kind])

    def _expect(self, ref: BlockRef, version: int | None) -> None:
        self.spec.check_ref(ref)
        if version is not None and self.held(ref).version != version:
            raise ConflictError(f"{ref} is at {self.held(ref).version}")

    def swap(
        self,
        weights: Mapping[BlockRef, Array],
        expected: Mapping[BlockRef, int],
        *,
        request_id: str,
        dry_run: bool,
    ) -> TransactionReport:
        """Swap blocks behind everybody's back."""
        steps = [
            Swap(ref=ref, weight=weight, expected_version=expected.get(ref))
            for ref, weight in weights.items()
        ]
        return self.apply(steps, request_id=request_id, dry_run=dry_run).report

    def receipt(self, revision: int) -> bytes:
        if revision not in self.receipts:
            raise NotFoundError("no receipt", reason=Reason.UNKNOWN_RECEIPT)
        return self.receipts[revision]

    def export(self, topic: BlockRef) -> bytes:
        refs = [str(ref) for ref in self.spec.subtree(topic)]
        body = [self.held(BlockRef.parse(ref)).weight.tolist() for ref in refs]
        return json.dumps({"topic": str(topic), "refs": refs, "weights": body}).encode()

    def store_pack(self, topic: BlockRef, name: str) -> bytes:
        pack = self.export(topic)
        if self.packs.setdefault(name, pack) != pack:
            raise AlreadyExistsError(name, reason=Reason.PACK_EXISTS)
        return pack

    def list_packs(self) -> tuple[StoredPack, ...]:
        return tuple(self._stored(name) for name in sorted(self.packs))

    def delete_pack(self, name: str, *, request_id: str) -> StoredPack:
        if request_id not in self.deleted_packs:
            self.deleted_packs[request_id] = self._stored(name)
            del self.packs[name]
        return self.deleted_packs[request_id]

    def _stored(self, name: str) -> StoredPack:
        if name not in self.packs:
            raise NotFoundError(name, reason=Reason.UNKNOWN_PACK)
        data = self.packs[name]
        topic = BlockRef.parse(json.loads(data)["topic"])
        return StoredPack(
            name=name, topic=topic, revision=0, num_bytes=len(data), create_time_s=2.5
        )

    def import_pack(
        self,
        pack: bytes | str,
        *,
        topic: BlockRef | None = None,
        request_id: str,
        dry_run: bool,
    ) -> tuple[TransactionReport, BlockRef]:
        if isinstance(pack, str):
            self._stored(pack)
            pack = self.packs[pack]
        try:
            body = json.loads(pack)
        except ValueError as err:
            raise InvalidArgumentError("no pack", reason=Reason.BAD_PACK) from err
        target = topic or BlockRef.parse(body["topic"])
        weights = {
            ref: np.array(weight, np.float32)
            for ref, weight in zip(self.spec.subtree(target), body["weights"], strict=True)
        }
        report = self.swap(weights, {}, request_id=request_id, dry_run=dry_run)
        return report, target

    def create_snapshot(self, name: str) -> Snapshot:
        if name in self.snapshots:
            raise AlreadyExistsError(name, reason=Reason.SNAPSHOT_EXISTS)
        self.snapshots[name] = Pinned(name, self.revision, self._copy())
        return self.list_snapshots()[-1]

    def list_snapshots(self) -> tuple[Snapshot, ...]:
        return tuple(
            Snapshot(name=pinned.name, revision=pinned.revision, create_time_s=1.5)
            for pinned in self.snapshots.values()
        )

    def pinned(self, name: str) -> Pinned:
        if name not in self.snapshots:
            raise NotFoundError(name, reason=Reason.UNKNOWN_SNAPSHOT)
        return self.snapshots[name]

    def delete_snapshot(self, name: str, *, request_id: str) -> tuple[Snapshot, int]:
        if request_id not in self.given_up:
            self.pinned(name)
            snapshot = next(s for s in self.list_snapshots() if s.name == name)
            self.transact("delete-snapshot", (), lambda ref, kept: None, request_id=request_id)
            del self.snapshots[name]
            self.given_up[request_id] = (snapshot, self.revision)
        return self.given_up[request_id]

    def rollback(
        self,
        target: str | int,
        topic: BlockRef | None,
        *,
        only_block: bool,
        request_id: str,
        dry_run: bool,
    ) -> TransactionReport:
        if isinstance(target, int) and target not in self.ends:
            raise NotFoundError(str(target), reason=Reason.UNKNOWN_REVISION)
        then = self.pinned(target).blocks if isinstance(target, str) else self.ends[target]
        refs = list(self.spec.blocks() if topic is None else self.spec.subtree(topic))
        if only_block:
            refs = refs[:1]

        def change(ref: BlockRef, kept: Held) -> None:
            kept.weight = then[ref].weight

        return self.transact("rollback", refs, change, request_id=request_id, dry_run=dry_run)

    def collect_garbage(self, *, keep_revisions: int | None, dry_run: bool) -> GarbageReport:
        self.keep_revisions = keep_revisions
        report = GarbageReport(
            garbage=self.garbage, history_from=min(self.ends, default=0), dry_run=dry_run
        )
        if not dry_run:
            self.garbage = ()
        return report

    def audit_records(self, limit: int, *, retained_only: bool) -> tuple[AuditRecord, ...]:
        found = (r for r in self.audit if not retained_only or r.revision in self.ends)
        return tuple(itertools.islice(found, limit))

    def _copy(self) -> dict[BlockRef, Held]:
        return {ref: replace(self.held(ref)) for ref in self.spec.blocks()}

    def stats(self) -> BankStats:
        shards = tuple(
            ShardStats(
                shard_id=shard.shard_id,
                endpoint=self.endpoints.get(shard.shard_id, ""),
                pid=1,
                partitions=tuple(sorted(shard.partitions)),
            )
            for shard in self.shards
        )
        return BankStats(
            shards=shards,
            revision=self.revision,
            num_blocks=self.spec.num_blocks,
            num_blocks_written=0,
        )

    def transact(
        self,
        operation: str,
        refs: Iterable[BlockRef],
        change: Callable[[BlockRef, Held], None],
        *,
        request_id: str = "",
        dry_run: bool = False,
        tree_changes: tuple[TreeChange, ...] = (),
    ) -> TransactionReport:
        """Change blocks on all shards at one revision, once per request id."""
        if request_id in self.reports:
            return self.reports[request_id]
        by_shard: dict[str, list[BlockRef]] = {shard.shard_id: [] for shard in self.shards}
        for ref in refs:
            by_shard[self.shard_of(ref).shard_id].append(ref)
        changes = []
        for ref in itertools.chain.from_iterable(by_shard.values()):
            before = self.held(ref)
            after = Held(before.weight, before.version + 1, before.state)
            change(ref, after)
            changes.append(
                BlockChange(
                    ref=ref,
                    version_before=before.version,
                    version_after=after.version,
                    state_before=before.state,
                    state_after=after.state,
                    num_bytes=before.weight.nbytes,
                )
            )
        deleted = {c.ref for c in changes if c.state_after is BlockState.DELETED}
        packs = tuple(pack.name for pack in self.list_packs() if pack.topic in deleted)
        if dry_run:
            return TransactionReport(
                revision=self.revision,
                changes=tuple(changes),
                dry_run=True,
                tree_changes=tree_changes,
                packs=packs,
            )
        for name in packs:
            del self.packs[name]
        self.ends[self.revision] = self._copy()
        self.revision += 1
        for shard in self.shards:
            shard.install(self.revision, self._commit(shard, by_shard[shard.shard_id], change))
        report = TransactionReport(
            revision=self.revision,
            changes=tuple(changes),
            tree_changes=tree_changes,
            packs=packs,
        )
        self.reports[request_id or f"anonymous-{next(self._counter)}"] = report
        self.audit.insert(
            0,
            AuditRecord(
                revision=self.revision,
                time_s=2.5,
                principal="tester",
                operation=operation,
                request_id=request_id,
                detail={"blocks": len(changes)},
            ),
        )
        return report

    @staticmethod
    def _commit(
        shard: FakeShard, refs: list[BlockRef], change: Callable[[BlockRef, Held], None]
    ) -> Callable[[], None]:
        def commit() -> None:
            for ref in refs:
                kept = shard.blocks[ref]
                change(ref, kept)
                kept.version += 1
                shard.tell(ref, is_update=False)

        return commit


def _receipt(steps: Sequence[Step]) -> bytes:
    deleted = [str(step.topic) for step in steps if isinstance(step, Delete)]
    return json.dumps({"deleted": deleted}).encode() if deleted else b""


def _tree_change(step: Place) -> TreeChange:
    change = CentroidChange.KEPT if step.centroid is None else CentroidChange.SET
    return TreeChange(
        topic=step.topic,
        changes_label=step.label is not None,
        changes_num_documents=step.num_documents is not None,
        centroid_change=CentroidChange.REMOVED if step.remove_centroid else change,
    )
