"""A collection of garbage that is cut off anywhere: the bank is as it was, and the next one ends it.

One bank with all kinds of garbage is made once. For every mutating call of a collection, a copy of it
is collected with a fault at that call, opened again and looked at, and collected to the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.knowledge import (
    AdminRequest,
    BankOperations,
    Coordinator,
    CoordinatorConfig,
    RevisionLog,
    ShardGroup,
    ShardMember,
    TreeStore,
)
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.content import BlockRecord
from membank.bank_service.shard.partition_store import PartitionStore
from membank.bank_service.store import Bank
from membank.bank_service.store.arrays import SlotArrays
from membank.bank_service.store.objects import PROBES
from membank.wire.errors import MembankError
from membank.wire.format.layout import slot_key
from membank.wire.records import GarbageKind, Snapshot
from membank.wire.spec import BlockRef, Role
from membank.wire.steps import Swap
from storage_faults import Crash, FaultPlan, FaultyObjects, StorageFault
from tiny_bank import State, UnsyncedObjects, create_bank, full_state, make_update, tiny_spec

A, B, C, LEAF = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2), BlockRef(2, 3)
KEEP = 3
SPEC = tiny_spec()


@dataclass(frozen=True)
class Opened:
    """A bank in service."""

    bank: Bank
    shard: Shard
    operations: BankOperations


class _One:
    """A directory of one shard."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def members(self) -> tuple[ShardMember, ...]:
        partitions = self._shard.partitions
        return (ShardMember(shard_id="s", partitions=partitions, handle=self._shard),)


@contextmanager
def opened(root: Path, plan: FaultPlan | None = None) -> Iterator[Opened]:
    """Serve the bank in `root`; faults come as `plan` says."""
    bank = Bank.open(FaultyObjects(UnsyncedObjects(root), plan or FaultPlan()))
    config = ShardConfig(
        journal_dir=str(root / "journals"), retained_revisions=100, hold_wait_s=0, lease_s=0
    )
    shard = Shard.open(bank, config=config)
    try:
        log, trees = RevisionLog(bank), TreeStore(bank)
        shards = ShardGroup(bank.spec, _One(shard))
        coordinator = Coordinator(
            bank,
            shards,
            log=log,
            trees=trees,
            config=CoordinatorConfig(lock_wait_s=0.0, commit_patience_s=0.0, commit_pause_s=0.0),
        )
        coordinator.recover()
        yield Opened(bank, shard, BankOperations(bank, shards, coordinator, log=log, trees=trees))
        shards.close()
    finally:
        shard.close(consolidate=False)


def asked(request_id: str, *, dry_run: bool = False) -> AdminRequest:
    return AdminRequest(request_id=request_id, principal="tester", dry_run=dry_run)


def make_littered_bank(root: Path) -> None:
    """Make a bank with history, a snapshot, updates in its journal, and all kinds of leftovers."""
    create_bank(root)
    with opened(root) as it:
        for number in range(3):
            change(it, number)
            if number == 1:
                it.operations.create_snapshot(asked("snapshot"), "kept")
    objects = UnsyncedObjects(root)
    for level in (1, 2):
        # What a writer leaves that dies before it publishes, at the numbers that it took.
        slot = 1 + max(chunk.slot for chunk in SlotArrays(objects, SPEC, 1).stored_chunks(level))
        for role in (Role.WEIGHT, Role.EXP_AVG):
            objects.put(slot_key(1, level, role, slot), b"\0" * 64)
    for number in (1, 2):
        objects.put(f"{PROBES}/{number}", b"first")
    with opened(root) as it:
        for number in range(3, 6):
            change(it, number)
        it.shard.push(make_update(it.shard, [B, LEAF], "in the journal"))
        it.bank.create_snapshot(Snapshot(name="never", revision=50, create_time_s=0.0))


def change(it: Opened, number: int) -> None:
    """Train, fold, and swap."""
    update = make_update(it.shard, [A, B, C, LEAF], f"u{number}")
    assert all(result.accepted for result in it.shard.push(update).results)
    it.shard.consolidate()
    weight = np.full(SPEC.block_shape(1), float(number), np.float32)
    it.operations.apply(asked(f"s{number}"), [Swap(ref=A, weight=weight)])


Ends = Mapping[int, Mapping[BlockRef, tuple[int, int, tuple[int, ...]]]]


def ends_of(it: Opened) -> Ends:
    """Return version, step and CRCs of every block at the end of each retained revision.

    Every slot is read and checked.
    """
    histories = it.shard.history()
    found = {}
    for record in it.operations.audit(1000, retained_only=True):
        entries = {}
        for history in histories:
            number = history.end_of(record.revision)
            if not number:
                continue
            store = PartitionStore(it.bank, history.partition)
            for ref, entry in store.manifests.read(number).entries.items():
                store.load_content(ref, BlockRecord(entry), SPEC.roles)
                entries[ref] = (entry.version, entry.step, entry.crcs)
        found[record.revision] = entries
    return found


def pinned(it: Opened) -> list[bytes]:
    blocks = it.shard.fetch(list(SPEC.blocks()), snapshot="kept").blocks
    return [block.weight.tobytes() for block in blocks if block.weight is not None]


@dataclass(frozen=True)
class Before:
    """The bank that is collected, and what a collection without a fault makes of it."""

    root: Path
    state: State
    ends: Ends
    snapshot: list[bytes]
    num_calls: int
    ends_after: Ends


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Before:
    root = tmp_path_factory.mktemp("littered") / "bank"
    make_littered_bank(root)
    copy = Path(shutil.copytree(root, root.with_name("undisturbed")))
    plan = FaultPlan()
    with opened(copy, plan) as it:
        state, ends, snapshot = full_state(it.shard), ends_of(it), pinned(it)
        num_calls = plan.num_calls
        report = it.operations.collect_garbage(asked("g"), keep_revisions=KEEP)
        num_calls = plan.num_calls - num_calls
        assert {garbage.kind for garbage in report.garbage} == {
            GarbageKind.RETIRED_MANIFEST,
            GarbageKind.RETIRED_SLOT,
            GarbageKind.UNNAMED_SLOT,
            GarbageKind.SNAPSHOT,
            GarbageKind.PROBE,
        }
        assert full_state(it.shard) == state
        ends_after = ends_of(it)
    return Before(root, state, ends, snapshot, num_calls, ends_after)


def collect_with_fault(before: Before, root: Path, fault: StorageFault, at: int) -> None:
    shutil.copytree(before.root, root)
    plan = FaultPlan(fault)
    try:
        with opened(root, plan) as it:
            plan.at = plan.num_calls + at
            it.operations.collect_garbage(asked("g"), keep_revisions=KEEP)
    except (Crash, MembankError):
        assert plan.happened
    with opened(root) as it:
        assert full_state(it.shard) == before.state
        assert pinned(it) == before.snapshot
        # Whatever is said to be retained is, and as it was.
        found = ends_of(it)
        assert {*found, it.shard.revision} >= before.ends_after.keys()
        for revision, entries in found.items():
            if revision in before.ends:
                assert entries == before.ends[revision], f"revision {revision}"
        it.operations.collect_garbage(asked("g"), keep_revisions=KEEP)
        assert it.operations.collect_garbage(asked("", dry_run=True)).garbage == ()
        assert ends_of(it).keys() == before.ends_after.keys()
        assert full_state(it.shard) == before.state
        assert pinned(it) == before.snapshot
        # It goes on as if nothing had happened.
        assert it.shard.push(make_update(it.shard, [A, LEAF], "after")).results[0].accepted
        it.operations.rollback(asked("back"), "kept")


def test_the_collection_without_a_fault(before: Before) -> None:
    assert before.num_calls > 40
    # The snapshot's revision, and three less the collection's own, which is in force.
    assert list(before.ends_after) == [7, 6, 3]
    assert list(before.ends) == [6, 5, 4, 3, 2, 1, 0]
    for revision in (6, 3):
        assert before.ends_after[revision] == before.ends[revision]


@pytest.mark.parametrize("fault", StorageFault)
@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_sample_of_the_moments(
    before: Before, tmp_path: Path, fault: StorageFault, part: int
) -> None:
    collect_with_fault(before, tmp_path / "bank", fault, before.num_calls * part // 4)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("fault", StorageFault)
def test_every_moment(before: Before, tmp_path: Path, fault: StorageFault) -> None:
    for at in range(1, before.num_calls + 1):
        collect_with_fault(before, tmp_path / str(at), fault, at)
        shutil.rmtree(tmp_path / str(at))
