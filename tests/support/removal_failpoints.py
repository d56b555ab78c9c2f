"""A small bank whose coordinator and shards are killed, all at once, at a chosen step of a transaction.

Steps are what may leave a trace: calls of a shard, and changes of a file. Each has a name, and a process
kills itself right before the one that it is told to. Run in a process of its own, by `play`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from membank.bank_service.knowledge import (
    BankOperations,
    Coordinator,
    CoordinatorConfig,
    RevisionLog,
    ShardGroup,
    ShardMember,
    TreeStore,
)
from membank.bank_service.knowledge.shards import ShardHandle
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import BlockOperation, Prepared
from membank.bank_service.store import Bank, Data
from membank.bank_service.store.journal import PosixLogFile
from membank.wire.format import RevisionRecord
from membank.wire.records import Gradient, Update
from membank.wire.spec import BlockRef, Role
from membank.wire.steps import Delete, Swap
from raw_scan import marked, needles
from shard_rig import RIG_SPEC, asked, full_tree
from tiny_bank import UnsyncedObjects

TOPIC = BlockRef(1, 1)
TOPICS = [BlockRef(1, cluster) for cluster in range(4)]
DOOMED = list(RIG_SPEC.subtree(TOPIC))
OPERATIONS = ("swap", "delete")


class Step(NamedTuple):
    """A step of a transaction."""

    name: str
    """What comes next; numbers in it are left out."""
    turn: int
    """How many of that name there were by then, itself included."""


class Failpoints:
    """Steps, in the order in which they come; at one of them the process dies.

    Parameters
    ----------
    at
        The step that is not taken any more; None = none. By name, since two shards take theirs side
        by side, in an order that differs from run to run.
    told
        File that says which steps there were, that one last.
    """

    # `_lock` makes the steps of two shards one sequence.

    def __init__(self, at: Step | None, told: Path) -> None:
        self._at = at
        self._told = told
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._steps: list[Step] = []
        self.is_armed = False
        """Whether steps count; set once the bank is open."""

    def reach(self, what: str) -> None:
        """Come to a step."""
        if not self.is_armed:
            return
        name = re.sub(r"\d+", "N", what)
        with self._lock:
            self._counts[name] += 1
            self._steps.append(Step(name, self._counts[name]))
            if self._steps[-1] == self._at:
                self.tell()
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()  # never returns: the signal may take a moment

    def tell(self) -> None:
        """Write down which steps there were."""
        self._told.write_text(json.dumps(self._steps))


def steps_told(told: Path) -> list[Step]:
    """Return the steps that a process wrote down."""
    return [Step(*step) for step in json.loads(told.read_text())]


class _Objects(UnsyncedObjects):
    """A directory that comes to a step before each change."""

    def __init__(self, root: Path, failpoints: Failpoints) -> None:
        super().__init__(root)
        self._failpoints = failpoints

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._failpoints.reach(f"write {key}")
        super().put(key, data, durable=durable)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._failpoints.reach(f"create {key}")
        super().put_if_absent(key, data, durable=durable)

    def sync(self, keys: Sequence[str]) -> None:
        self._failpoints.reach("sync slots")
        super().sync(keys)

    def delete(self, key: str) -> None:
        self._failpoints.reach(f"remove {key}")
        super().delete(key)


class _LogFile(PosixLogFile):
    """A file of a journal that comes to a step before each write, and in its midst."""

    def __init__(self, path: Path, failpoints: Failpoints) -> None:
        failpoints.reach("open a segment")
        super().__init__(path)
        self._failpoints = failpoints

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        data = b"".join(buffers)
        self._failpoints.reach("write to a segment")
        super().append([data[: len(data) // 2]])
        self._failpoints.reach("write the rest to a segment")
        super().append([data[len(data) // 2 :]])

    def truncate(self, num_bytes: int) -> None:
        self._failpoints.reach("cut a segment")
        super().truncate(num_bytes)


class _Handle:
    """A shard whose mutating calls begin and end with a step."""

    def __init__(self, shard_id: str, shard: Shard, failpoints: Failpoints) -> None:
        self._shard_id = shard_id
        self._shard = shard
        self._failpoints = failpoints

    def __getattr__(self, name: str) -> object:
        return getattr(self._shard, name)

    def prepare(
        self,
        revision: int,
        operations: Sequence[BlockOperation],
        *,
        all_partitions: bool = False,
        dry_run: bool = False,
    ) -> Prepared:
        self._failpoints.reach(f"tell {self._shard_id} to prepare")
        prepared = self._shard.prepare(
            revision, operations, all_partitions=all_partitions, dry_run=dry_run
        )
        self._failpoints.reach(f"hear that {self._shard_id} has prepared")
        return prepared

    def commit(self, record: RevisionRecord) -> None:
        self._failpoints.reach(f"tell {self._shard_id} to commit")
        self._shard.commit(record)
        self._failpoints.reach(f"hear that {self._shard_id} has committed")


@contextmanager
def _journals_that_come_to_steps(failpoints: Failpoints) -> Iterator[None]:
    """Let the removal, renaming and cutting of journal files be steps: of this whole process."""
    originals = {name: getattr(os, name) for name in ("unlink", "rename", "truncate")}

    def stepped(name: str) -> Callable[..., object]:
        def call(path: str | os.PathLike[str], *args: object, **options: object) -> object:
            if str(path).endswith((".log", ".spare")):
                failpoints.reach(f"{name} {Path(path).suffix} of a journal")
            return cast("Callable[..., object]", originals[name])(path, *args, **options)

        return call

    for name in originals:
        setattr(os, name, stepped(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


@dataclass(frozen=True)
class Service:
    """Two shards and their coordinator."""

    shards: dict[str, Shard]
    operations: BankOperations
    log: RevisionLog

    def owner(self, ref: BlockRef) -> Shard:
        """Return the shard that owns `ref`."""
        return self.shards[f"shard-{RIG_SPEC.partition_of(ref) % 2}"]

    def weights(self) -> dict[BlockRef, bytes]:
        """Return the weights that readers get."""
        return {
            block.ref: block.weight.tobytes()
            for shard in self.shards.values()
            for block in shard.fetch(
                [r for r in RIG_SPEC.blocks() if RIG_SPEC.partition_of(r) in shard.partitions]
            ).blocks
            if block.weight is not None
        }

    def push(self, ref: BlockRef, seed: int) -> None:
        """Push a marked gradient."""
        shard = self.owner(ref)
        gradient = Gradient(
            ref=ref,
            base_version=shard.describe([ref])[0].version,
            values=marked(RIG_SPEC.block_shape(ref.level), seed, scale=0.01),
        )
        update = Update(request_id=f"{ref}-{seed}", step=1, gradients=(gradient,))
        assert shard.push(update).results[0].accepted

    def run(self, operation: str) -> None:
        """Run a transaction; that of a retry is the same."""
        if operation == "delete":
            self.operations.apply(asked("the request"), [Delete(topic=TOPIC)])
        else:
            swaps = [
                Swap(ref=ref, weight=marked(RIG_SPEC.block_shape(1), 900 + ref.cluster))
                for ref in TOPICS
            ]
            self.operations.apply(asked("the request"), swaps)


@contextmanager
def served(root: Path, failpoints: Failpoints | None = None) -> Iterator[Service]:
    """Open the bank in `root`; what an earlier service left is settled."""
    points = failpoints or Failpoints(None, root / "unused")
    bank = Bank.open(_Objects(root, points))
    shards = {
        f"shard-{index}": Shard.open(
            Bank.open(_Objects(root, points)),
            shard_id=f"shard-{index}",
            partitions=range(index, RIG_SPEC.num_partitions, 2),
            # Small, so that a partition has several segments, spares among them.
            config=ShardConfig(segment_bytes=600, hold_wait_s=0),
            open_log_file=lambda path: _LogFile(path, points),
        )
        for index in range(2)
    }
    members = tuple(
        ShardMember(
            shard_id=name,
            partitions=shard.partitions,
            handle=cast("ShardHandle", _Handle(name, shard, points)),
        )
        for name, shard in shards.items()
    )
    group = ShardGroup(bank.spec, _Members(members))
    log, trees = RevisionLog(bank), TreeStore(bank)
    coordinator = Coordinator(
        bank,
        group,
        log=log,
        trees=trees,
        config=CoordinatorConfig(lock_wait_s=0.0, commit_patience_s=0.0, commit_pause_s=0.0),
    )
    try:
        coordinator.recover()
        yield Service(shards, BankOperations(bank, group, coordinator, log=log, trees=trees), log)
    finally:
        group.close()
        for shard in shards.values():
            shard.close(consolidate=False)


@dataclass(frozen=True)
class _Members:
    """A directory that never changes."""

    found: tuple[ShardMember, ...]

    def members(self) -> tuple[ShardMember, ...]:
        return self.found


def make_bank(root: Path) -> dict[str, bytes]:
    """Make a bank in which the topic is in slots, a snapshot and the journal; return its needles."""
    Bank.create(UnsyncedObjects(root), RIG_SPEC, tree=full_tree(RIG_SPEC))
    wanted: dict[str, bytes] = {}

    with served(root) as service:
        swaps = [
            Swap(ref=ref, weight=marked(RIG_SPEC.block_shape(ref.level), 100 + number))
            for number, ref in enumerate(DOOMED)
        ]
        service.operations.apply(asked("planted"), swaps)
        for swap in swaps:
            wanted |= needles(f"swapped weight of {swap.ref}", swap.weight)
        for step in range(3):
            for ref in DOOMED:
                service.push(ref, 10 * step + ref.level)
            for ref in TOPICS:
                if step == 0 and ref not in DOOMED:
                    service.push(ref, 500 + ref.cluster)
            for read in service.owner(TOPIC).read(DOOMED):
                contents_now = {Role.WEIGHT: read.weight, **read.optimizer_state}
                for role, array in contents_now.items():
                    wanted |= needles(f"{role} of {read.ref} after step {step}", array)
            wanted |= needles(f"gradient {step}", marked((16,), 10 * step + 1, scale=0.01))
            wanted |= needles(f"leaf gradient {step}", marked((16,), 10 * step + 2, scale=0.01))
            if step == 0:
                for shard in service.shards.values():
                    shard.consolidate()
                service.operations.create_snapshot(asked("pinned"), "before")
    return wanted | needles("last gradient", marked((16,), 77, scale=0.01))


def push_last(service: Service) -> None:
    """Leave an update in the segment that is being written to."""
    service.push(TOPIC, 77)


def play(root: Path, operation: str, at: Step | None, told: Path) -> None:
    """Update the bank in `root`, run a transaction on it, and die before the step `at` of that."""
    failpoints = Failpoints(at, told)
    with _journals_that_come_to_steps(failpoints), served(root, failpoints) as service:
        push_last(service)
        failpoints.is_armed = True
        service.run(operation)
        failpoints.reach("answer")
        failpoints.tell()
        # As it stands, as the others do.
        os._exit(0)
