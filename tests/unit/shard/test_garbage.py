"""Garbage of a partition: all of it is found, and nothing that anybody needs."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from membank.bank_service.shard import Shard, ShardConfig, folding
from membank.bank_service.shard.contract import (
    PartitionGarbage,
    RestoreEntry,
    SetContent,
)
from membank.bank_service.shard.garbage import MAX_KEYS, Item, merged, summed
from membank.bank_service.store import Bank, Data
from membank.wire.errors import MembankError, Reason, UnavailableError
from membank.wire.format.layout import manifest_key, slot_key
from membank.wire.records import Garbage, GarbageKind, Snapshot
from membank.wire.spec import BlockRef, Role
from storage_faults import FaultPlan, FaultyObjects, Outage, StorageFault
from tiny_bank import (
    UnsyncedObjects,
    commit_record,
    create_bank,
    file_bytes,
    full_state,
    make_update,
    transact,
)

A, B, C, LEAF = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2), BlockRef(2, 0)
"""All but B lie in partition 0."""
CONFIG = ShardConfig(hold_wait_s=0, retained_revisions=2)
KEEP_ALL = ShardConfig(hold_wait_s=0, retained_revisions=100)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    create_bank(tmp_path / "bank")
    return tmp_path / "bank"


@pytest.fixture
def bank(root: Path) -> Bank:
    return Bank.open(UnsyncedObjects(root))


def push(shard: Shard, name: str, *refs: BlockRef) -> None:
    assert all(r.accepted for r in shard.push(make_update(shard, refs, name)).results)


def swap(shard: Shard, bank: Bank, value: float) -> None:
    weight = np.full(bank.spec.block_shape(1), value, np.float32)
    transact(shard, bank, [SetContent(ref=A, weight=weight)])


def kinds(found: PartitionGarbage) -> dict[GarbageKind, int]:
    return {garbage.kind: garbage.num_objects for garbage in found.garbage}


def keys(found: PartitionGarbage) -> set[str]:
    return {key for garbage in found.garbage for key in garbage.keys}


def objects(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in file_bytes(root).items() if "/journal/" not in name}


def write_stray(root: Path, slot: int, level: int = 1) -> set[str]:
    """Leave what a writer leaves that fails before it publishes."""
    found = set()
    objects = UnsyncedObjects(root)
    for role in (Role.WEIGHT, Role.EXP_AVG):
        key = slot_key(0, level, role, slot)
        objects.put_if_absent(key, b"x" * 100)
        found.add(key)
    return found


def test_a_tidy_bank_has_none(root: Path, bank: Bank) -> None:
    shard = Shard.open(bank, config=CONFIG)
    for number in range(5):
        push(shard, f"u{number}", A, B, LEAF)
        shard.consolidate()
        swap(shard, bank, float(number))
    files = objects(root)
    found = shard.collect(0)
    assert found.garbage == ()
    assert found.is_complete
    assert objects(root) == files
    shard.close()


def test_a_partition_that_transactions_pass_by_lets_expired_history_go(bank: Bank) -> None:
    # It publishes nothing at others' revisions, so it keeps what it promised at its last one.
    shard = Shard.open(bank, config=CONFIG)
    push(shard, "u0", B)
    shard.consolidate()
    swap(shard, bank, 0.0)
    push(shard, "u1", B)
    shard.consolidate()
    for number in range(3):
        swap(shard, bank, float(number))
    assert shard.history()[1].history_from == 0
    found = shard.collect(1)
    assert found.history_from == 3
    assert kinds(found).keys() == {GarbageKind.RETIRED_MANIFEST, GarbageKind.RETIRED_SLOT}
    assert shard.collect(1).garbage == ()
    shard.close()


def test_the_report_is_what_went_to_the_byte(root: Path, bank: Bank) -> None:
    shard = Shard.open(bank, config=KEEP_ALL)
    for number in range(4):
        push(shard, f"u{number}", A, LEAF)
        shard.consolidate()
        swap(shard, bank, float(number))
    before, state = objects(root), full_state(shard)
    dry = shard.collect(0, history_from=4, dry_run=True)
    assert objects(root) == before
    wet = shard.collect(0, history_from=4)
    assert dry == wet
    assert set(kinds(wet)) == {GarbageKind.RETIRED_MANIFEST, GarbageKind.RETIRED_SLOT}
    gone = before.keys() - objects(root).keys()
    assert keys(wet) == gone
    assert sum(g.num_bytes for g in wet.garbage) == sum(len(before[key]) for key in gone)
    assert full_state(shard) == state
    assert shard.collect(0).garbage == ()
    shard.close()


def test_what_an_earlier_owner_left_unnamed_goes(root: Path, bank: Bank) -> None:
    shard = Shard.open(bank, config=CONFIG)
    for number in range(3):
        push(shard, f"u{number}", A, C)
        shard.consolidate()
    state = full_state(shard)
    newest = bank.read_manifest(0, bank.manifest_numbers(0)[-1])
    highest = max(entry.slot for ref, entry in newest.entries.items() if ref.level == 1)
    shard.close()
    free = next(slot for slot in range(highest) if _is_free(root, slot))
    strays = write_stray(root, free)
    # From here on, numbers are those of an owner that may come.
    beyond = write_stray(root, highest + 1)
    shard = Shard.open(bank, config=CONFIG)
    found = shard.collect(0)
    assert kinds(found) == {GarbageKind.UNNAMED_SLOT: 2}
    assert keys(found) == strays
    # Bytes by the spec: the role is stored in float32, with a CRC.
    block_bytes = 4 * bank.spec.block_params(1) + 4
    assert found.garbage[0].num_bytes == 2 * block_bytes
    assert beyond <= objects(root).keys()
    assert full_state(shard) == state
    shard.close()


def _is_free(root: Path, slot: int) -> bool:
    return not (root / slot_key(0, 1, Role.WEIGHT, slot)).exists()


def test_a_prepared_transaction_keeps_what_it_needs(root: Path, bank: Bank) -> None:
    shard = Shard.open(bank, config=KEEP_ALL)
    push(shard, "u0", A, C)
    weight = np.full(bank.spec.block_shape(1), 7.0, np.float32)
    prepared = shard.prepare(1, [SetContent(ref=A, weight=weight)])
    before = objects(root)
    assert shard.collect(0).garbage == ()
    assert objects(root) == before
    shard.close(consolidate=False)
    # Also where the owner died, and nobody knows yet how it ended.
    shard = Shard.open(bank, config=CONFIG)
    assert shard.collect(0).garbage == ()
    shard.commit(bank.decide(commit_record(bank, 1, prepared)))
    (block,) = shard.fetch([A]).blocks
    np.testing.assert_array_equal(block.weight, weight)
    shard.close()


def test_history_is_not_given_up_under_a_transaction(bank: Bank) -> None:
    shard = Shard.open(bank, config=KEEP_ALL)
    for number in range(3):
        push(shard, f"u{number}", A)
        swap(shard, bank, float(number))
    shard.prepare(4, [RestoreEntry(ref=A, manifest=0)])
    with pytest.raises(UnavailableError) as caught:
        shard.collect(0, history_from=3)
    assert caught.value.reason is Reason.TRANSACTION_IN_PROGRESS
    shard.abort(4)
    assert shard.collect(0, history_from=3).history_from == 3
    shard.close()


def test_a_transaction_that_is_given_up_leaves_garbage_where_it_could_not_tidy(
    root: Path,
) -> None:
    plan = FaultPlan()
    bank = Bank.open(FaultyObjects(UnsyncedObjects(root), plan))
    shard = Shard.open(bank, config=_apart(root))
    push(shard, "u0", A)
    weight = np.zeros(bank.spec.block_shape(1), np.float32)
    prepared = shard.prepare(1, [SetContent(ref=A, weight=weight)])
    # The record that it is given up comes first.
    plan.fault, plan.at = StorageFault.NO_SPACE, plan.num_calls + 2
    shard.abort(1)
    assert plan.happened
    dry = shard.collect(0, dry_run=True)
    found = shard.collect(0)
    # The slot of a swap has a weight alone.
    expected = {GarbageKind.ABANDONED_MANIFEST: 1, GarbageKind.RETIRED_SLOT: 1}
    assert kinds(found).items() >= expected.items()
    assert keys(dry) == keys(found)
    assert manifest_key(0, prepared.manifests[0]) in keys(found)
    assert shard.collect(0).garbage == ()
    shard.close()


def test_a_forecast_after_an_owner_came_between_a_transaction_and_its_commit(root: Path) -> None:
    bank = Bank.open(UnsyncedObjects(root))
    shard = Shard.open(bank, config=KEEP_ALL)
    swap(shard, bank, 1.0)
    weight = np.zeros(bank.spec.block_shape(1), np.float32)
    prepared = shard.prepare(2, [SetContent(ref=A, weight=weight)])
    shard.close(consolidate=False)
    shard = Shard.open(bank, config=KEEP_ALL)
    shard.commit(bank.decide(commit_record(bank, 2, prepared)))
    dry = shard.collect(0, history_from=3, dry_run=True)
    transact(shard, bank, [], all_partitions=True)
    assert keys(dry) == keys(shard.collect(0, history_from=3))
    shard.close()


@pytest.mark.parametrize("delivers", [True, False])
def test_a_publication_of_unknown_outcome_keeps_its_slots(root: Path, *, delivers: bool) -> None:
    outage = Outage(UnsyncedObjects(root))
    storage = _PublishFails(outage, delivers=delivers)
    bank = Bank.open(storage)
    shard = Shard.open(bank, config=_apart(root))
    push(shard, "u0", A, C)
    shard.consolidate()
    push(shard, "u1", A, C)
    objects_before = objects(root)
    storage.armed = True
    with pytest.raises(MembankError):
        shard.consolidate()
    storage.armed = False
    written = {key for key in objects(root).keys() - objects_before.keys() if "/c." in key}
    assert len(written) == 2 * len(bank.spec.roles)
    shard.collect(0)
    assert written <= objects(root).keys()
    state = full_state(shard)
    shard.close(consolidate=False)
    shard = Shard.open(Bank.open(UnsyncedObjects(root)), config=_apart(root))
    assert full_state(shard) == state
    shard.consolidate()
    shard.collect(0)
    assert full_state(shard) == state
    shard.close()


def _apart(root: Path) -> ShardConfig:
    """Return the settings for storage that does not look like a directory."""
    journals = str(root.parent / "journals")
    return ShardConfig(hold_wait_s=0, retained_revisions=2, journal_dir=journals, lease_s=0)


class _PublishFails(Outage):
    """Fails, while it is armed, where a manifest is created."""

    def __init__(self, inner: Outage, *, delivers: bool) -> None:
        super().__init__(inner)
        self.delivers = delivers
        self.armed = False

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self.is_down = self.armed and "/manifests/" in key
        try:
            super().put_if_absent(key, data, durable=durable)
        finally:
            self.is_down = False


def test_a_consolidation_under_way_is_waited_for(root: Path) -> None:
    gate = _Gate(root)
    bank = Bank.open(gate)
    shard = Shard.open(bank, config=CONFIG)
    push(shard, "u0", A, C)
    gate.arm()
    folder = threading.Thread(target=shard.consolidate)
    folder.start()
    assert gate.reached.wait(10)
    found: list[PartitionGarbage] = []
    collector = threading.Thread(target=lambda: found.append(shard.collect(0)))
    collector.start()
    # Updates go on meanwhile, and their content is in no slot at all.
    push(shard, "u1", A)
    assert found == []
    gate.go.set()
    folder.join()
    collector.join()
    assert [f.garbage for f in found] == [()]
    state = full_state(shard)
    shard.close(consolidate=False)
    shard = Shard.open(Bank.open(UnsyncedObjects(root)), config=CONFIG)
    assert full_state(shard) == state
    shard.close()


class _Gate(UnsyncedObjects):
    """Stops the next manifest before it is created."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reached, self.go = threading.Event(), threading.Event()
        self._armed = False

    def arm(self) -> None:
        self._armed = True

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        if self._armed and "/manifests/" in key:
            self._armed = False
            self.reached.set()
            assert self.go.wait(10)
        super().put_if_absent(key, data, durable=durable)


def test_an_owner_that_was_replaced_removes_nothing(root: Path, tmp_path: Path) -> None:
    def opened(journals: str) -> Shard:
        # Apart, as on two machines: no lock tells one of the other.
        config = ShardConfig(journal_dir=str(tmp_path / journals), hold_wait_s=0, lease_s=0)
        return Shard.open(Bank.open(UnsyncedObjects(root)), config=config)

    old = opened("one")
    push(old, "u0", A, C)
    old.consolidate()
    new = opened("two")
    push(new, "u1", A)
    new.consolidate()
    (root / slot_key(0, 1, Role.WEIGHT, 0)).with_name("c.77.0.0.0.0").write_bytes(b"x")
    before = objects(root)
    with pytest.raises(UnavailableError) as caught:
        old.collect(0)
    assert caught.value.reason is Reason.FENCED
    assert objects(root) == before
    with pytest.raises(UnavailableError):
        push(old, "u2", A)
    with suppress(MembankError):
        old.close()
    new.close()


def test_one_call_removes_so_much_and_says_that_there_is_more(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "MAX_REMOVED", 5)
    shard = Shard.open(bank, config=KEEP_ALL)
    for number in range(3):
        push(shard, f"u{number}", A, C)
        swap(shard, bank, float(number))
    dry = shard.collect(0, history_from=3, dry_run=True)
    parts = [shard.collect(0, history_from=3)]
    while not parts[-1].is_complete:
        parts.append(shard.collect(0, history_from=3))
    assert len(parts) > 2
    total = merged(garbage for part in parts for garbage in part.garbage)
    assert {g.kind: (g.num_objects, g.num_bytes) for g in total} == {
        g.kind: (g.num_objects, g.num_bytes) for g in dry.garbage
    }
    shard.close()


def test_a_snapshot_is_kept_whatever_is_given_up(bank: Bank) -> None:
    shard = Shard.open(bank, config=KEEP_ALL)
    push(shard, "u0", A)
    transact(shard, bank, [], all_partitions=True)
    bank.create_snapshot(Snapshot(name="kept", revision=1, create_time_s=0.0))
    then = full_state(shard)[A]
    for number in range(3):
        push(shard, f"v{number}", A)
        swap(shard, bank, float(number))
    shard.collect(0, history_from=4)
    transact(shard, bank, [RestoreEntry(ref=A, manifest=bank.named_manifest(1, 0))])
    assert full_state(shard)[A][2:] == then[2:]
    shard.close()


def test_expired_history_goes_although_nothing_is_published(bank: Bank) -> None:
    now = [0.0]
    config = ShardConfig(hold_wait_s=0, retained_revisions=1, retained_s=100.0)
    shard = Shard.open(bank, config=config, wall_clock=lambda: now[0])
    for number in range(3):
        push(shard, f"u{number}", A)
        swap(shard, bank, float(number))
    assert shard.collect(0).garbage == ()
    assert shard.history()[0].history_from == 0
    now[0] = 1000.0
    found = shard.collect(0)
    assert found.history_from == 3
    assert kinds(found).keys() == {GarbageKind.RETIRED_MANIFEST, GarbageKind.RETIRED_SLOT}
    shard.close()


items = st.lists(
    st.builds(
        Item,
        kind=st.sampled_from(GarbageKind),
        key=st.text(min_size=1, max_size=3),
        num_bytes=st.integers(0, 1 << 50),
    ),
    max_size=20,
)


@given(st.lists(items, max_size=4))
def test_sums_of_parts_are_the_sum_of_all(parts: list[list[Item]]) -> None:
    whole = [item for part in parts for item in part]
    assert merged(garbage for part in parts for garbage in summed(part)) == summed(whole)


def test_very_many_keys_are_cut_and_counted() -> None:
    many = [Item(GarbageKind.TREE, f"k{n}", 1) for n in range(MAX_KEYS + 5)]
    (found,) = merged([*summed(many), *summed(many)])
    assert isinstance(found, Garbage)
    assert (found.num_objects, found.num_bytes) == (2 * len(many), 2 * len(many))
    assert found.keys == tuple(item.key for item in many[:MAX_KEYS])
