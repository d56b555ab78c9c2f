"""A bank with two shards and a coordinator in one process, and faults at every step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from membank.bank_service.knowledge import (
    AdminRequest,
    BankOperations,
    Coordinator,
    CoordinatorConfig,
    NoRecycler,
    ReceiptDesk,
    Recycler,
    RevisionLog,
    ShardGroup,
    ShardMember,
    TreeStore,
)
from membank.bank_service.shard import Shard
from membank.bank_service.shard.contract import (
    BlockContent,
    BlockOperation,
    BlockStatus,
    PartitionGarbage,
    PartitionHistory,
    Prepared,
    PushResult,
)
from membank.bank_service.shard.process import this_process
from membank.bank_service.store import Bank, Data, LocalObjects, ObjectStore
from membank.wire.errors import UnavailableError
from membank.wire.format import RevisionRecord, TreeDocument
from membank.wire.format.receipt import ProcessLife, Recycling
from membank.wire.records import Gradient, ShardStats, Update
from membank.wire.signing import Signer, TrustedKeys
from membank.wire.spec import Array, BankSpec, BlockRef, LevelSpec

T = TypeVar("T")

RIG_SPEC = BankSpec(
    name="rig",
    num_layers=2,
    width=4,
    levels=(LevelSpec(fan_out=4, block_width=2), LevelSpec(fan_out=2, block_width=2)),
    num_partitions=4,
    fingerprint="anchor",
)
"""Four topics of one block and two leaves; topic t lies in partition t, on shard t % 2."""


class Crash(BaseException):
    """The coordinator dies here: no handler of errors runs."""


class When(StrEnum):
    """Where a step fails."""

    BEFORE = "before"
    AFTER = "after"


class Faults:
    """Counts steps by name and fails one of them, once."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self._armed: tuple[str, When, type[BaseException]] | None = None

    @property
    def is_armed(self) -> bool:
        """Whether the fault is still to come."""
        return self._armed is not None

    def arm(self, step: str, when: When, error: type[BaseException]) -> None:
        """Fail the next step whose name begins with `step`."""
        self._armed = (step, when, error)

    def disarm(self) -> None:
        """Let everything pass."""
        self._armed = None

    def run(self, step: str, action: Callable[[], T]) -> T:
        """Run one step, or fail before or after it."""
        self.steps.append(step)
        armed = self._armed
        if armed is None or not step.startswith(armed[0]):
            return action()
        self._armed = None
        _, when, error = armed
        if when is When.BEFORE:
            raise error(f"before {step}")
        action()
        raise error(f"after {step}")


class FaultyObjects:
    """An `ObjectStore` whose writes are steps, such as "put_if_absent revisions"."""

    def __init__(self, objects: ObjectStore, faults: Faults) -> None:
        self._objects = objects
        self._faults = faults

    @property
    def url(self) -> str:
        # docstring inherited
        return self._objects.url

    def get(self, key: str) -> bytes:
        # docstring inherited
        return self._objects.get(key)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        # docstring inherited
        return self._objects.get_range(key, start, end)

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        # docstring inherited
        self._faults.run(f"put {key}", lambda: self._objects.put(key, data, durable=durable))

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        # docstring inherited
        self._faults.run(
            f"put_if_absent {key}", lambda: self._objects.put_if_absent(key, data, durable=durable)
        )

    def sync(self, keys: Sequence[str]) -> None:
        # docstring inherited
        self._objects.sync(keys)

    def list(self, prefix: str) -> list[str]:
        # docstring inherited
        return self._objects.list(prefix)

    def delete(self, key: str) -> None:
        # docstring inherited
        self._faults.run(f"delete {key}", lambda: self._objects.delete(key))


class FaultyHandle:
    """A `ShardHandle` whose mutating calls are steps, such as "commit shard-1"."""

    def __init__(
        self,
        shard_id: str,
        shard: Callable[[], Shard],
        faults: Faults,
        lives: Mapping[Shard, int],
    ) -> None:
        self._shard_id = shard_id
        self._shard = shard
        self._faults = faults
        self._lives = lives

    @property
    def revision(self) -> int:
        # docstring inherited
        return self._shard().revision

    def prepare(
        self,
        revision: int,
        operations: Sequence[BlockOperation],
        *,
        all_partitions: bool = False,
        dry_run: bool = False,
    ) -> Prepared:
        # docstring inherited
        shard = self._shard()
        prepared = self._faults.run(
            f"prepare {self._shard_id}",
            lambda: shard.prepare(
                revision, operations, all_partitions=all_partitions, dry_run=dry_run
            ),
        )
        if prepared.destruction is None:
            return prepared
        destruction = replace(prepared.destruction, process=self._life(shard))
        return replace(prepared, destruction=destruction)

    @property
    def process(self) -> ProcessLife:
        # docstring inherited
        return self._life(self._shard())

    def commit(self, record: RevisionRecord) -> None:
        # docstring inherited
        self._faults.run(f"commit {self._shard_id}", lambda: self._shard().commit(record))

    def abort(self, revision: int) -> None:
        # docstring inherited
        self._faults.run(f"abort {self._shard_id}", lambda: self._shard().abort(revision))

    def describe(self, refs: Sequence[BlockRef]) -> tuple[BlockStatus, ...]:
        # docstring inherited
        return self._shard().describe(refs)

    def read(self, refs: Sequence[BlockRef]) -> Iterator[BlockContent]:
        # docstring inherited
        return self._shard().read(refs)

    def history(self) -> tuple[PartitionHistory, ...]:
        # docstring inherited
        return self._shard().history()

    def collect(
        self, partition: int, *, history_from: int = 0, dry_run: bool = False
    ) -> PartitionGarbage:
        # docstring inherited
        return self._faults.run(
            f"collect {partition}",
            lambda: self._shard().collect(partition, history_from=history_from, dry_run=dry_run),
        )

    def stats(self) -> ShardStats:
        # docstring inherited
        return self._shard().stats()

    def _life(self, shard: Shard) -> ProcessLife:
        # All live in one process here; each opening stands for a process of its own.
        return replace(shard.process, pid=self._lives[shard])


class ShardRig:
    """A new bank, its shards, and a coordinator that can be made to die.

    Parameters
    ----------
    folder
        Where the bank is made.
    spec
        What it is.
    tree
        Its tree document; None = labels and centroids for every block.
    num_shards
        Shards, which share the partitions in turn.
    recycles
        Whether shards that held what was deleted are started anew.
    """

    def __init__(
        self,
        folder: Path,
        *,
        spec: BankSpec = RIG_SPEC,
        tree: TreeDocument | None = None,
        num_shards: int = 2,
        recycles: bool = False,
    ) -> None:
        self.faults = Faults()
        self.receipt_signer = Signer.generate()
        self.recycler: Recycler = RigRecycler(self) if recycles else NoRecycler()
        self.end_coordinator: Callable[[], None] | None = (
            self._replace_coordinator if recycles else None
        )
        self._num_coordinators = 0
        self._lives: dict[Shard, int] = {}
        self.objects = LocalObjects(folder)
        self.bank = Bank.create(self.objects, spec, tree=tree or full_tree(spec))
        self.spec = self.bank.spec
        self._num_shards = num_shards
        self.shards: dict[str, Shard] = {}
        self.signer: Signer | None = None
        """Signs packs, from the next start of the coordinator on."""
        self.trusted_keys: TrustedKeys | None = None
        """Keys that must have signed packs, likewise."""
        self.open_shards()
        self.start_coordinator()

    def open_shards(self) -> None:
        """Open every shard that is not open, from what is on disk."""
        for index in range(self._num_shards):
            shard_id = f"shard-{index}"
            if shard_id not in self.shards:
                partitions = range(index, self.spec.num_partitions, self._num_shards)
                shard = self.shards[shard_id] = Shard.open(
                    LocalObjects(self.objects.root), shard_id=shard_id, partitions=partitions
                )
                self._lives[shard] = len(self._lives) + 1

    def kill_shards(self) -> None:
        """Drop every shard as kill -9 would: what is not on disk is gone."""
        for shard in self.shards.values():
            shard.close(consolidate=False)
        self.shards.clear()

    def start_coordinator(self) -> None:
        """Start a coordinator; the one before is forgotten as it stands."""
        self.faults.disarm()
        self.bank = Bank.open(FaultyObjects(self.objects, self.faults))
        self.log = RevisionLog(self.bank)
        trees = TreeStore(self.bank)
        group = ShardGroup(self.spec, self)
        self._num_coordinators += 1
        receipts = ReceiptDesk(
            self.bank,
            group,
            log=self.log,
            signer=self.receipt_signer,
            recycler=self.recycler,
            end_process=self.end_coordinator,
            process=self._process_of_coordinator,
        )
        self.coordinator = Coordinator(
            self.bank,
            group,
            log=self.log,
            trees=trees,
            receipts=receipts,
            config=CoordinatorConfig(lock_wait_s=0.0, commit_patience_s=0.0, commit_pause_s=0.0),
        )
        self.coordinator.recover()
        self.operations = BankOperations(
            self.bank,
            group,
            self.coordinator,
            log=self.log,
            trees=trees,
            signer=self.signer,
            trusted_keys=self.trusted_keys,
        )

    def _replace_coordinator(self) -> None:
        """Go on as the next process of the coordinator would."""
        self._num_coordinators += 1

    def _process_of_coordinator(self) -> ProcessLife:
        return replace(this_process(), pid=-self._num_coordinators)

    def members(self) -> tuple[ShardMember, ...]:
        """Return the shards, behind handles that can fail."""
        return tuple(
            ShardMember(
                shard_id=shard_id,
                partitions=tuple(range(index, self.spec.num_partitions, self._num_shards)),
                handle=FaultyHandle(
                    shard_id, partial(self._shard, shard_id), self.faults, self._lives
                ),
            )
            for index, shard_id in enumerate(f"shard-{i}" for i in range(self._num_shards))
        )

    def owner(self, ref: BlockRef) -> Shard:
        """Return the shard that owns `ref`."""
        return self.shards[f"shard-{self.spec.partition_of(ref) % self._num_shards}"]

    def export(
        self, topic: BlockRef, *, weights_only: bool = False, since: str | int | None = None
    ) -> bytes:
        """Return a topic as a pack."""
        with self.operations.export_topic(topic, weights_only=weights_only, since=since) as pack:
            return pack.data

    def weight(self, ref: BlockRef) -> Array | None:
        """Return the content that readers get."""
        return self.owner(ref).fetch([ref]).blocks[0].weight

    def status(self, ref: BlockRef) -> BlockStatus:
        """Return version and state of a block."""
        return self.owner(ref).describe([ref])[0]

    def push(self, ref: BlockRef, request_id: str, *, value: float = 1.0) -> PushResult:
        """Apply a gradient of `value` everywhere to a block."""
        values = np.full(self.spec.block_shape(ref.level), value, np.float32)
        gradient = Gradient(ref=ref, base_version=self.status(ref).version, values=values)
        return self.owner(ref).push(Update(request_id=request_id, step=1, gradients=(gradient,)))

    def state(self) -> dict[BlockRef, tuple[int, int, int]]:
        """Return version, state and CRC of every block."""
        found = {}
        for ref in self.spec.blocks():
            status = self.status(ref)
            found[ref] = (status.version, int(status.state), status.crc32c)
        return found

    def tree_keys(self) -> list[str]:
        """Return the tree documents in the store."""
        return self.objects.list("trees")

    def close(self) -> None:
        """Close the shards."""
        for shard in self.shards.values():
            shard.close()

    def _shard(self, shard_id: str) -> Shard:
        try:
            return self.shards[shard_id]
        except KeyError:
            raise UnavailableError(f"{shard_id} is down") from None


class RigRecycler:
    """A `Recycler` for the shards of a rig, by steps such as "recycle shard-1"."""

    outcome = Recycling.DONE

    def __init__(self, rig: ShardRig) -> None:
        self._rig = rig

    def recycle(self, shard_ids: Sequence[str]) -> None:
        # docstring inherited
        for shard_id in shard_ids:
            self._rig.faults.run(f"recycle {shard_id}", partial(self._restart, shard_id))

    def _restart(self, shard_id: str) -> None:
        self._rig.shards.pop(shard_id).close()
        self._rig.open_shards()


def full_tree(spec: BankSpec) -> TreeDocument:
    """Return a tree with a label, a count and a centroid for every block."""
    rng = np.random.default_rng(0)
    centroids: list[Array] = []
    for level in range(1, spec.num_levels + 1):
        rows = rng.standard_normal((spec.num_clusters(level), 3)).astype(np.float32)
        centroids.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return TreeDocument(
        labels={ref: f"label of {ref.level}-{ref.cluster}" for ref in spec.blocks()},
        num_documents={ref: 10 + ref.cluster for ref in spec.blocks()},
        centroids=tuple(centroids),
        embedder={"kind": "test", "dims": 3},
        # The same for every shape of bank: it is one retriever.
        arrays={"projection": np.eye(3, dtype=np.float32)},
    )


def asked(request_id: str, *, principal: str = "alice", dry_run: bool = False) -> AdminRequest:
    """Return a request of `principal`."""
    return AdminRequest(request_id=request_id, principal=principal, dry_run=dry_run)
