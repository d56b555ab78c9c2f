"""A bank in memory: shards, transactions and a gateway in plain Python, to test clients against.

No network, no storage; blocks are dicts of arrays, and the optimizer is ``w -= lr * g``.
"""

from __future__ import annotations

import itertools
import json
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from membank.wire.crc import crc32c
from membank.wire.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format import initial_weight
from membank.wire.records import (
    AuditRecord,
    BankInfo,
    BankStats,
    Block,
    BlockChange,
    BlockDescription,
    BlockEvent,
    BlockHeader,
    PartitionOwner,
    Placement,
    ShardStats,
    Snapshot,
    Topic,
    TransactionReport,
    Update,
    UpdateResult,
)
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState, LevelSpec, dtype_of

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


@dataclass(slots=True)
class Held:
    """A block as a shard keeps it."""

    weight: Array
    version: int = 0
    state: BlockState = BlockState.ACTIVE
    step: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """Blocks of one revision."""

    revision: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of an update."""

    results: tuple[UpdateResult, ...]
    duplicate: bool


class FakeSubscription:
    """Changes that one watcher has not read yet."""

    def __init__(self, refs: Sequence[BlockRef], *, admin_only: bool) -> None:
        self._refs = frozenset(refs)
        self._admin_only = admin_only
        self._queue: queue.SimpleQueue[BlockEvent | None] = queue.SimpleQueue()
        self._read = threading.Event()
        self.is_closed = False

    def offer(self, event: BlockEvent) -> None:
        if self._refs and event.ref not in self._refs:
            return
        if not (self._admin_only and event.is_update):
            self._queue.put(event)

    def next_events(self, timeout_s: float) -> tuple[tuple[BlockEvent, ...], int]:
        try:
            event = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return (), 0
        self._read.set()
        return ((event,) if event is not None else ()), 0

    def wait_until_read(self) -> None:
        """Wait until the first event was read."""
        if not self._read.wait(timeout=10):
            raise TimeoutError("nobody reads")

    def close(self) -> None:
        self.is_closed = True
        self._queue.put(None)


class FakeShard:
    """A shard of `FakeBank`; its revision may be held back to play a laggard."""

    def __init__(self, bank: FakeBank, shard_id: str, partitions: Iterable[int]) -> None:
        self.bank = bank
        self.shard_id = shard_id
        self.partitions = frozenset(partitions)
        self.revision = 0
        self.blocks = {
            ref: Held(initial_weight(bank.spec, ref))
            for ref in bank.spec.blocks()
            if bank.spec.partition_of(ref) in self.partitions
        }
        self.answers: dict[str, Pushed] = {}
        self.subscriptions: list[FakeSubscription] = []
        self.held_back: list[Callable[[], None]] = []
        self.lags = False
        self.num_weights_sent = 0

    @property
    def spec(self) -> BankSpec:
        return self.bank.spec

    def install(self, revision: int, change: Callable[[], None]) -> None:
        """Take part in a transaction, at once or when `catch_up` is called."""

        def commit() -> None:
            change()
            self.revision = revision

        if self.lags:
            self.held_back.append(commit)
        else:
            commit()

    def catch_up(self) -> None:
        """Install what was held back."""
        for commit in self.held_back:
            commit()
        self.held_back = []
        self.lags = False

    def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held_versions: Sequence[int | None] | None = None,
        dtype: str | None = None,
        min_revision: int = 0,
    ) -> Fetched:
        if self.revision < min_revision:
            # The next attempt finds it up to date.
            self.catch_up()
            raise UnavailableError("behind", reason=Reason.BEHIND_REVISION)
        versions = held_versions or [None] * len(refs)
        blocks = tuple(
            self._fetch_one(ref, version, dtype or self.spec.dtype)
            for ref, version in zip(refs, versions, strict=True)
        )
        return Fetched(self.revision, blocks)

    def _fetch_one(self, ref: BlockRef, held_version: int | None, dtype: str) -> Block:
        kept = self._owned(ref)
        header = BlockHeader(ref=ref, version=kept.version, state=kept.state, dtype=dtype)
        if kept.state is not BlockState.ACTIVE:
            return Block(header=header, weight=None)
        if held_version == kept.version:
            return Block(header=replace(header, unchanged=True), weight=None)
        weight = kept.weight.astype(dtype_of(dtype))
        self.num_weights_sent += 1
        return Block(
            header=replace(
                header, shape=weight.shape, num_bytes=weight.nbytes, crc32c=crc32c(weight)
            ),
            weight=weight,
        )

    def push(self, update: Update) -> Pushed:
        if update.request_id in self.answers:
            return replace(self.answers[update.request_id], duplicate=True)
        for gradient in update.gradients:
            self._owned(gradient.ref)
        answer = Pushed(
            tuple(
                self._apply(
                    gradient.ref,
                    gradient.base_version,
                    gradient.values,
                    update.learning_rate_scale,
                )
                for gradient in update.gradients
            ),
            duplicate=False,
        )
        self.answers[update.request_id] = answer
        return answer

    def _apply(self, ref: BlockRef, base: int, gradient: Array, scale: float) -> UpdateResult:
        kept = self.blocks[ref]
        refusal = None
        if kept.state is BlockState.WITHHELD:
            refusal = Reason.BLOCK_WITHHELD
        elif kept.version - base > self.spec.max_staleness:
            refusal = Reason.STALE_VERSION
        if refusal is not None:
            return UpdateResult(ref=ref, accepted=False, version=kept.version, reason=refusal)
        rate = self.spec.levels[ref.level - 1].learning_rate * scale
        step = rate * gradient.astype(np.float32)
        kept.weight = (kept.weight.astype(np.float32) - step).astype(self.spec.numpy_dtype)
        kept.version += 1
        kept.step += 1
        self.tell(ref, is_update=True)
        return UpdateResult(ref=ref, accepted=True, version=kept.version)

    def subscribe(
        self, refs: Sequence[BlockRef] = (), *, admin_only: bool = False
    ) -> FakeSubscription:
        subscription = FakeSubscription(refs, admin_only=admin_only)
        self.subscriptions.append(subscription)
        return subscription

    def tell(self, ref: BlockRef, *, is_update: bool) -> None:
        kept = self.blocks[ref]
        for subscription in self.subscriptions:
            subscription.offer(
                BlockEvent(
                    ref=ref,
                    version=kept.version,
                    state=kept.state,
                    revision=self.revision,
                    is_update=is_update,
                )
            )

    def _owned(self, ref: BlockRef) -> Held:
        self.spec.check_ref(ref)
        if ref not in self.blocks:
            raise UnavailableError(f"{ref} is not mine", reason=Reason.NOT_OWNER)
        return self.blocks[ref]


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
        self.generation = 1
        self.endpoints: dict[str, str] = {}
        self.reports: dict[str, TransactionReport] = {}
        self.snapshots: dict[str, tuple[Snapshot, dict[BlockRef, Array]]] = {}
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
            removal_revision=0,
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
            label=f"topic {ref}",
            state=kept.state,
            version=kept.version,
            step=kept.step,
            num_bytes=kept.weight.nbytes,
            num_documents=0,
            partition=self.spec.partition_of(ref),
        )

    def swap(
        self,
        weights: Mapping[BlockRef, Array],
        expected: Mapping[BlockRef, int],
        *,
        request_id: str,
        dry_run: bool,
    ) -> TransactionReport:
        for ref, version in expected.items():
            if self.held(ref).version != version and request_id not in self.reports:
                raise ConflictError(f"{ref} is at {self.held(ref).version}")

        def change(ref: BlockRef, kept: Held) -> None:
            kept.weight, kept.state = weights[ref].astype(self.spec.numpy_dtype), BlockState.ACTIVE

        return self.transact("swap", weights, change, request_id=request_id, dry_run=dry_run)

    def set_state(
        self, operation: str, topic: BlockRef, state: BlockState, *, request_id: str, dry_run: bool
    ) -> TransactionReport:
        self.spec.check_ref(topic)

        def change(ref: BlockRef, kept: Held) -> None:
            kept.state = state

        refs = list(self.spec.subtree(topic))
        return self.transact(operation, refs, change, request_id=request_id, dry_run=dry_run)

    def export(self, topic: BlockRef) -> bytes:
        refs = [str(ref) for ref in self.spec.subtree(topic)]
        body = [self.held(BlockRef.parse(ref)).weight.tolist() for ref in refs]
        return json.dumps({"topic": str(topic), "refs": refs, "weights": body}).encode()

    def import_pack(
        self, pack: bytes, *, request_id: str, dry_run: bool
    ) -> tuple[TransactionReport, BlockRef]:
        try:
            body = json.loads(pack)
        except ValueError as err:
            raise InvalidArgumentError("no pack", reason=Reason.BAD_PACK) from err
        weights = {
            BlockRef.parse(ref): np.array(weight, np.float32)
            for ref, weight in zip(body["refs"], body["weights"], strict=True)
        }
        report = self.swap(weights, {}, request_id=request_id, dry_run=dry_run)
        return report, BlockRef.parse(body["topic"])

    def create_snapshot(self, name: str) -> Snapshot:
        if name in self.snapshots:
            raise AlreadyExistsError(name, reason=Reason.SNAPSHOT_EXISTS)
        snapshot = Snapshot(name=name, revision=self.revision, create_time_s=1.5)
        weights = {ref: self.held(ref).weight.copy() for ref in self.spec.blocks()}
        self.snapshots[name] = (snapshot, weights)
        return snapshot

    def rollback(
        self, name: str, topic: BlockRef | None, *, request_id: str, dry_run: bool
    ) -> TransactionReport:
        if name not in self.snapshots:
            raise NotFoundError(name, reason=Reason.UNKNOWN_SNAPSHOT)
        weights = self.snapshots[name][1]
        refs = list(self.spec.blocks() if topic is None else self.spec.subtree(topic))

        def change(ref: BlockRef, kept: Held) -> None:
            kept.weight = weights[ref]

        return self.transact("rollback", refs, change, request_id=request_id, dry_run=dry_run)

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
        if dry_run:
            return TransactionReport(revision=self.revision, changes=tuple(changes), dry_run=True)
        self.revision += 1
        for shard in self.shards:
            shard.install(self.revision, self._commit(shard, by_shard[shard.shard_id], change))
        report = TransactionReport(revision=self.revision, changes=tuple(changes))
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
