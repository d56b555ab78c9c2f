"""Pushes that wait together are journalled together, and each gets its own answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.shard.maintenance import ThreadMaintenance
from membank.bank_service.shard.push_queue import Call, PushQueue
from membank.bank_service.store import Bank, Data
from membank.bank_service.store.journal import LogFile, PosixLogFile
from membank.wire.errors import (
    InvalidArgumentError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.records import Update
from membank.wire.spec import BlockRef
from storage_faults import FaultPlan, FaultyObjects, StorageFault
from tiny_bank import UnsyncedObjects, create_bank, full_state, make_update, tiny_spec

A, C, LEAF = BlockRef(1, 0), BlockRef(1, 2), BlockRef(2, 5)
WAIT_S = 20.0


class _Gate:
    """Journal files that wait before a write, and count writes and syncs."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.arrived = threading.Semaphore(0)
        self.num_appends = 0
        self.num_syncs = 0
        self.error: OSError | None = None
        """What a write that has waited ends with."""
        self.later_error: OSError | None = None
        """What one ends with that need not wait."""

    def open_file(self, path: Path) -> LogFile:
        gate = self

        class GatedFile(PosixLogFile):
            def append(self, buffers: Sequence[bytes | memoryview]) -> None:
                if gate.is_open.is_set():
                    if gate.later_error is not None:
                        raise gate.later_error
                    super().append(buffers)
                    return
                gate.num_appends += 1
                gate.arrived.release()
                assert gate.is_open.wait(WAIT_S)
                if gate.error is not None:
                    raise gate.error
                super().append(buffers)

            def sync(self) -> None:
                gate.num_syncs += 1
                super().sync()

        return GatedFile(path)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path, tiny_spec(num_partitions=1))


def _push_all(shard: Shard, gate: _Gate, updates: Sequence[Update]) -> list[Future[object]]:
    """Push `updates` so that the first waits in the journal, and the rest wait for it."""
    pool = ThreadPoolExecutor(len(updates))
    gate.is_open.clear()
    first = pool.submit(shard.push, updates[0])
    assert gate.arrived.acquire(timeout=WAIT_S)
    queue = shard._partitions[0]._updates._queue  # the only way to see who waits
    rest = []
    for number, update in enumerate(updates[1:], start=1):
        rest.append(pool.submit(shard.push, update))
        _wait_until(partial(_has_length, queue, number))
    gate.is_open.set()
    pool.shutdown()
    return [first, *rest]  # type: ignore[list-item]


def _has_length(queue: Sized, length: int) -> bool:
    return len(queue) == length


def _wait_until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(int(WAIT_S * 1000)):
        if condition():
            return
        waiting.wait(0.001)
    raise AssertionError("it did not come to pass")


def test_pushes_that_wait_share_one_write_and_one_sync(bank: Bank) -> None:
    gate = _Gate()
    config = ShardConfig(durability=Durability.HOST)
    shard = Shard.open(bank, config=config, open_log_file=gate.open_file)
    updates = [make_update(shard, [A, LEAF], f"u{number}") for number in range(6)]
    before = gate.num_syncs
    answers = [future.result() for future in _push_all(shard, gate, updates)]
    assert gate.num_syncs - before == 2
    # Each on top of the one before it, though they were journalled together.
    assert [a.results[0].version for a in answers] == [1, 2, 3, 4, 5, 6]  # type: ignore[attr-defined]
    state = full_state(shard)
    shard.close(consolidate=False)
    again = Shard.open(bank)
    assert full_state(again) == state
    again.close()


def test_one_bad_push_does_not_fail_those_beside_it(bank: Bank) -> None:
    gate = _Gate()
    shard = Shard.open(bank, open_log_file=gate.open_file)
    shard.push(make_update(shard, [A], "used"))
    updates = [
        make_update(shard, [A], "u0"),
        make_update(shard, [C], "used"),  # an id of another update
        make_update(shard, [C], "u1"),
    ]
    first, bad, last = _push_all(shard, gate, updates)
    assert isinstance(bad.exception(), InvalidArgumentError)
    assert first.exception() is last.exception() is None
    shard.close()


def test_a_retry_that_overtakes_its_first_attempt_is_applied_once(bank: Bank) -> None:
    gate = _Gate()
    shard = Shard.open(bank, open_log_file=gate.open_file)
    update = make_update(shard, [C], "same")
    other = make_update(shard, [A], "other")
    _, first, second = [f.result() for f in _push_all(shard, gate, [other, update, update])]
    assert (first.duplicate, second.duplicate) == (False, True)  # type: ignore[attr-defined]
    assert first.results == second.results  # type: ignore[attr-defined]
    assert shard.describe([C])[0].version == 1
    shard.close()


def test_a_retry_is_answered_though_its_first_attempt_is_forgotten_at_once(bank: Bank) -> None:
    gate = _Gate()
    config = ShardConfig(retained_requests=1)
    shard = Shard.open(bank, config=config, open_log_file=gate.open_file)
    update = make_update(shard, [C], "same")
    others = [make_update(shard, [A], f"other-{number}") for number in range(2)]
    updates = [others[0], update, others[1], update]
    _, first, _, second = [f.result() for f in _push_all(shard, gate, updates)]
    assert (first.duplicate, second.duplicate) == (False, True)  # type: ignore[attr-defined]
    assert first.results == second.results  # type: ignore[attr-defined]
    assert shard.describe([C])[0].version == 1
    shard.close()


def test_a_retry_that_waits_beside_its_first_attempt_has_no_other_blocks(bank: Bank) -> None:
    gate = _Gate()
    shard = Shard.open(bank, open_log_file=gate.open_file)
    updates = [make_update(shard, [ref], f"u-{ref}") for ref in (A, C, LEAF)]
    used = replace(updates[2], request_id=updates[1].request_id)
    _, first, bad = _push_all(shard, gate, [updates[0], updates[1], used])
    assert first.exception() is None
    assert isinstance(bad.exception(), InvalidArgumentError)
    shard.close()


def test_the_later_of_two_equal_attempts_may_give_up_first(bank: Bank) -> None:
    shard = Shard.open(bank)
    update = make_update(shard, [A], "same")
    shard.close()
    first, second = (
        Call(again, again.gradients)
        for again in (
            replace(update, gradients=(replace(gradient, values=gradient.values.copy()),))
            for gradient in update.gradients * 2
        )
    )
    queue = PushQueue()
    queue.add(first)
    queue.add(second)
    queue.remove(second)
    first.ready.set()
    assert queue.next_batch() == [first]


def test_a_batch_that_cannot_be_journalled_fails_whole_and_changes_nothing(bank: Bank) -> None:
    gate = _Gate()
    shard = Shard.open(bank, open_log_file=gate.open_file)
    state = full_state(shard)
    gate.error = OSError(28, "no space")
    updates = [make_update(shard, [A], f"u{number}") for number in range(3)]
    errors = [future.exception() for future in _push_all(shard, gate, updates[:1])]
    assert isinstance(errors[0], ResourceExhaustedError)
    assert full_state(shard) == state
    gate.error = None
    for update in updates:
        assert not shard.push(update).duplicate
    shard.close()


def test_what_is_refused_for_what_a_batch_makes_shares_its_fate(tmp_path: Path) -> None:
    spec = replace(tiny_spec(num_partitions=1), max_staleness=0)
    gate = _Gate()
    shard = Shard.open(create_bank(tmp_path, spec), open_log_file=gate.open_file)
    gate.later_error = OSError(28, "no space")
    refs = {"first": C, "accepted": A, "stale by it": A}
    updates = [make_update(shard, [ref], name) for name, ref in refs.items()]
    errors = [future.exception() for future in _push_all(shard, gate, updates)]
    assert [type(error) for error in errors] == [type(None), *[ResourceExhaustedError] * 2]
    gate.later_error = None
    (result,) = shard.push(updates[2]).results
    assert (result.accepted, result.version) == (True, 1)
    shard.close()


def test_updates_go_on_while_slots_are_written(tmp_path: Path) -> None:
    create_bank(tmp_path, tiny_spec(num_partitions=1))
    objects = _WaitingObjects(tmp_path)
    bank = Bank.open(objects)
    maintenance = ThreadMaintenance()
    config = ShardConfig(consolidate_bytes=1, journal_limit_bytes=1 << 20)
    shard = Shard.open(bank, config=config, maintenance=maintenance)
    objects.may_write.clear()
    shard.push(make_update(shard, [A], "u0"))
    assert objects.waits.acquire(timeout=WAIT_S)
    for number in range(1, 4):
        shard.push(make_update(shard, [A, C], f"u{number}"))
    assert shard.describe([A])[0].version == 4
    objects.may_write.set()
    state = full_state(shard)
    shard.close(consolidate=False)
    again = Shard.open(Bank.open(UnsyncedObjects(tmp_path)))
    assert full_state(again) == state
    again.close()


class _WaitingObjects(UnsyncedObjects):
    """Keeps whoever writes a slot waiting while told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.may_write = threading.Event()
        self.may_write.set()
        self.waits = threading.Semaphore(0)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        if "/c." in key and not self.may_write.is_set():
            self.waits.release()
            assert self.may_write.wait(WAIT_S)
        super().put_if_absent(key, data, durable=durable)


def test_updates_are_refused_once_a_consolidation_that_fails_leaves_no_room(
    tmp_path: Path,
) -> None:
    create_bank(tmp_path, tiny_spec(num_partitions=1))
    plan = FaultPlan(StorageFault.NO_SPACE)
    bank = Bank.open(_FullObjects(UnsyncedObjects(tmp_path), plan))
    config = ShardConfig(
        journal_dir=str(tmp_path / "journals"),
        consolidate_bytes=1,
        journal_limit_bytes=3000,
        hold_wait_s=0,
    )
    shard = Shard.open(bank, config=config)
    _FullObjects.is_full = True
    try:
        with pytest.raises(ResourceExhaustedError) as caught:
            _push_up_to(shard, 20)
        assert caught.value.reason is Reason.NO_SPACE
        accepted = shard.describe([A])[0].version
        assert accepted >= 2
    finally:
        _FullObjects.is_full = False
    # With space again, the next push finds room, and nothing was lost.
    shard.push(make_update(shard, [A], "after"))
    assert shard.describe([A])[0].version == accepted + 1
    shard.close()


def _push_up_to(shard: Shard, count: int) -> None:
    for number in range(count):
        shard.push(make_update(shard, [A], f"u{number}"))


class _FullObjects(FaultyObjects):
    """A store that has no space for slots while `is_full`."""

    is_full = False

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        if self.is_full and "/c." in key:
            raise ResourceExhaustedError(f"{key}: no space", reason=Reason.NO_SPACE)
        super().put_if_absent(key, data, durable=durable)


def test_dirty_blocks_are_written_back_within_the_budget(tmp_path: Path) -> None:
    spec = tiny_spec(num_partitions=2)
    bank = create_bank(tmp_path, spec)
    blocks = list(spec.blocks())
    size = sum(spec.weight_bytes(r.level) + spec.optimizer_bytes(r.level) for r in blocks)
    shard = Shard.open(bank, config=ShardConfig(resident_bytes=size // 4))
    for number in range(40):
        shard.push(make_update(shard, [blocks[number % len(blocks)]], f"u{number}"))
        assert shard.stats().resident_bytes <= size // 4
    state = full_state(shard)
    shard.close(consolidate=False)
    again = Shard.open(bank)
    assert full_state(again) == state
    again.close()


def test_a_held_partition_turns_pushes_away_in_time(bank: Bank) -> None:
    shard = Shard.open(bank, config=ShardConfig(hold_wait_s=0))
    shard.prepare(1, [], all_partitions=True)
    with pytest.raises(UnavailableError) as caught:
        shard.push(make_update(shard, [A], "u0"))
    assert caught.value.reason is Reason.TRANSACTION_IN_PROGRESS
    shard.abort(1)
    assert not shard.push(make_update(shard, [A], "u0")).duplicate
    shard.close()
