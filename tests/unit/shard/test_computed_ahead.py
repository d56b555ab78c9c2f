"""What pushes compute before their turn comes, and that nothing is decided by it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.shard.content import initial_content, zero_state
from membank.bank_service.shard.contract import BlockOperation, Erase, SetContent
from membank.bank_service.shard.optimizer import BlockOptimizer, BlockStep
from membank.bank_service.shard.push_queue import Call, PushQueue
from membank.bank_service.store import Bank
from membank.bank_service.store.journal import LogFile, PosixLogFile
from membank.wire.errors import CorruptionError, Reason, UnavailableError
from membank.wire.records import Update
from membank.wire.spec import BlockRef, LevelSpec
from tiny_bank import (
    UnsyncedObjects,
    commit_record,
    create_bank,
    file_bytes,
    full_state,
    make_update,
    tiny_spec,
)

A, B, C = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2)
WAIT_S = 20.0


class _Gate:
    """Journal files whose writes wait while it is closed."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_open.set()
        self.arrived = threading.Semaphore(0)

    def open_file(self, path: Path) -> LogFile:
        gate = self

        class GatedFile(PosixLogFile):
            def append(self, buffers: Sequence[bytes | memoryview]) -> None:
                if not gate.is_open.is_set():
                    gate.arrived.release()
                    assert gate.is_open.wait(WAIT_S)
                super().append(buffers)

        return GatedFile(path)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path, tiny_spec(num_partitions=1))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def _waiting(shard: Shard, number: int) -> Call:
    """Return the call that waits as the last of `number`, once it computes nothing any more."""
    queue = shard._partitions[0]._updates._queue  # the only way to see who waits
    _wait_until(lambda: len(queue) == number)
    call = queue._calls[-1]
    assert call.ready.wait(WAIT_S)
    return call


def _wait_until(condition: Callable[[], bool]) -> None:
    waiting = threading.Event()
    for _ in range(int(WAIT_S * 1000)):
        if condition():
            return
        waiting.wait(0.001)
    raise AssertionError("it did not come to pass")


def _start(shard: Shard, gate: _Gate, pool: ThreadPoolExecutor, update: Update) -> Future[object]:
    """Push `update`, and return while it is being journalled."""
    gate.is_open.clear()
    pushed = pool.submit(shard.push, update)
    assert gate.arrived.acquire(timeout=WAIT_S)
    return pushed  # type: ignore[return-value]


def test_a_push_is_computed_while_another_one_is_journalled(
    bank: Bank, pool: ThreadPoolExecutor
) -> None:
    gate = _Gate()
    shard = Shard.open(bank, open_log_file=gate.open_file)
    first = _start(shard, gate, pool, make_update(shard, [A], "first"))
    update = make_update(shard, [C], "second")
    second = pool.submit(shard.push, update)
    ahead = _waiting(shard, 1).ahead[C].after
    assert ahead is not None
    # Nobody sees any of it before it is journalled.
    assert shard.describe([C])[0].version == 0
    gate.is_open.set()
    first.result()
    assert second.result().results[0].version == 1
    start = {**initial_content(shard.spec, C).arrays, **zero_state(shard.spec, C)}
    expected = BlockOptimizer(shard.spec).apply(1, start, 0, update.gradients[0].values, 1.0)
    assert expected is not None
    with shard._context.state_lock:
        content = shard._partitions[0].record(C).content
    # Taken over as it is, not computed a second time.
    assert content is ahead[1]
    for role, array in expected.items():
        np.testing.assert_array_equal(content.arrays[role], array)
    state = full_state(shard)
    shard.close(consolidate=False)
    again = Shard.open(bank)
    assert full_state(again) == state
    again.close()


def test_a_push_that_waits_for_the_result_of_another_is_computed_in_its_turn(
    bank: Bank, pool: ThreadPoolExecutor
) -> None:
    gate = _Gate()
    shard = Shard.open(bank, open_log_file=gate.open_file)
    updates = [make_update(shard, refs, f"u{i}") for i, refs in enumerate([[A], [A, C], [C], [B]])]
    pushes = [_start(shard, gate, pool, updates[0])]
    ahead = []
    for number, update in enumerate(updates[1:], start=1):
        pushes.append(pool.submit(shard.push, update))
        ahead.append(set(_waiting(shard, number).ahead))
    assert ahead == [set(), set(), {B}]
    gate.is_open.set()
    versions = [[r.version for r in push.result().results] for push in pushes]  # type: ignore[attr-defined]
    assert versions == [[1], [2, 1], [2], [1]]
    # Nothing is taken for busy that is not: the next one is computed ahead again.
    assert not shard._partitions[0]._updates._queue._busy
    shard.close()


def test_a_block_that_a_transaction_changes_meanwhile_refuses_what_was_computed(
    bank: Bank, pool: ThreadPoolExecutor
) -> None:
    shard = Shard.open(bank, config=ShardConfig(hold_wait_s=WAIT_S))
    weight = np.full(shard.spec.block_shape(1), 2.0, np.float32)
    operations: list[BlockOperation] = [SetContent(ref=C, weight=weight)]
    prepared = shard.prepare(1, operations)
    push = pool.submit(shard.push, make_update(shard, [C], "u"))
    assert set(_waiting(shard, 1).ahead) == {C}
    shard.commit(bank.decide(commit_record(bank, 1, prepared)))
    (result,) = push.result().results
    assert (result.accepted, result.reason) == (False, Reason.STALE_VERSION)
    np.testing.assert_array_equal(shard.fetch([C]).blocks[0].weight, weight)
    shard.close()


def test_what_a_transaction_that_is_given_up_kept_waiting_is_taken_over(
    bank: Bank, pool: ThreadPoolExecutor
) -> None:
    shard = Shard.open(bank, config=ShardConfig(hold_wait_s=WAIT_S))
    shard.prepare(1, [], all_partitions=True)
    push = pool.submit(shard.push, make_update(shard, [C], "u"))
    assert set(_waiting(shard, 1).ahead) == {C}
    shard.abort(1)
    assert push.result().results[0].version == 1
    shard.close()


@contextmanager
def _computing(
    shard: Shard, pool: ThreadPoolExecutor, update: Update, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Future[object]]:
    """Push `update`, and keep its computation waiting until the end."""
    begun, go = threading.Event(), threading.Event()
    run = BlockStep.run

    def waiting_run(step: BlockStep, tile: int) -> None:
        begun.set()
        assert go.wait(WAIT_S)
        run(step, tile)

    monkeypatch.setattr(BlockStep, "run", waiting_run)
    push = pool.submit(shard.push, update)
    assert begun.wait(WAIT_S)
    yield push  # type: ignore[misc]
    go.set()


def test_a_block_that_is_deleted_and_made_anew_meanwhile_keeps_nothing_of_the_old(
    bank: Bank, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard.open(bank)
    shard.push(make_update(shard, [A], "before"))
    weight = np.full(shard.spec.block_shape(1), 2.0, np.float32)
    operations: list[BlockOperation] = [Erase(ref=A), SetContent(ref=A, weight=weight)]
    with _computing(shard, pool, make_update(shard, [A], "late"), monkeypatch) as push:
        for revision, operation in enumerate(operations, start=1):
            prepared = shard.prepare(revision, [operation])
            shard.commit(bank.decide(commit_record(bank, revision, prepared)))
    (result,) = push.result().results  # type: ignore[attr-defined]
    assert (result.accepted, result.reason) == (False, Reason.STALE_VERSION)
    shard.close(consolidate=False)
    again = Shard.open(bank)
    np.testing.assert_array_equal(again.fetch([A]).blocks[0].weight, weight)
    again.close()


def test_a_shard_closes_while_a_push_computes_which_changes_nothing_then(
    bank: Bank, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard.open(bank)
    with _computing(shard, pool, make_update(shard, [A], "late"), monkeypatch) as push:
        shard.close()
    assert isinstance(push.exception(), UnavailableError)
    again = Shard.open(bank)
    assert again.describe([A])[0].version == 0
    again.close()


def test_a_computation_that_fails_is_repeated_in_its_turn(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard.open(bank)
    run, num_failures = BlockStep.run, 1

    def failing_run(step: BlockStep, tile: int) -> None:
        nonlocal num_failures
        num_failures -= 1
        if num_failures >= 0:
            raise MemoryError
        run(step, tile)

    monkeypatch.setattr(BlockStep, "run", failing_run)
    assert shard.push(make_update(shard, [A], "once")).results[0].version == 1
    num_failures = 2
    with pytest.raises(MemoryError):
        shard.push(make_update(shard, [A], "twice"))
    assert not shard._partitions[0]._updates._queue._busy
    assert shard.push(make_update(shard, [A], "twice")).results[0].version == 2
    shard.close()


def test_a_gradient_that_is_not_finite_is_refused_ahead_as_in_its_turn(bank: Bank) -> None:
    shard = Shard.open(bank)
    update = make_update(shard, [A, C], "u")
    update.gradients[1].values[0, 0, 0, 0] = np.nan
    results = shard.push(update).results
    assert [r.reason for r in results] == [None, Reason.NOT_FINITE]
    assert [status.version for status in shard.describe([A, C])] == [1, 0]
    shard.close()


def test_a_damaged_block_fails_its_push_and_no_other(tmp_path: Path) -> None:
    spec = tiny_spec(num_partitions=1)
    create_bank(tmp_path, spec)
    shard = Shard.open(UnsyncedObjects(tmp_path))
    shard.push(make_update(shard, [A], "u"))
    shard.close()
    name = next(name for name in file_bytes(tmp_path) if name.endswith("weight/c.0.0.0.0.0"))
    (tmp_path / name).write_bytes(b"x")
    shard = Shard.open(UnsyncedObjects(tmp_path))
    with pytest.raises(CorruptionError):
        shard.push(make_update(shard, [A], "again"))
    assert shard.push(make_update(shard, [C], "other")).results[0].accepted
    shard.close(consolidate=False)


def test_what_waits_is_computed_ahead_within_a_bound(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = Shard.open(bank)
    calls = [
        Call(update, update.gradients)
        for update in (make_update(shard, [ref], f"u-{ref}") for ref in (A, B, C))
    ]
    shard.close()
    monkeypatch.setattr(
        "membank.bank_service.shard.push_queue._AHEAD_BYTES", 2 * calls[0].num_bytes
    )
    queue = PushQueue()
    assert [queue.add(call) for call in calls] == [True, True, False]
    for call in calls:
        call.ready.set()
    assert queue.next_batch() == calls
    queue.settle(calls)
    # With nobody before it, one push may have more than the bound.
    monkeypatch.setattr("membank.bank_service.shard.push_queue._AHEAD_BYTES", 0)
    assert queue.add(calls[0])


def test_a_batch_does_not_wait_for_those_that_still_compute(bank: Bank) -> None:
    shard = Shard.open(bank)
    calls = [
        Call(update, update.gradients)
        for update in (make_update(shard, [ref], f"u-{ref}") for ref in (A, B, C))
    ]
    shard.close()
    queue = PushQueue()
    for call in calls:
        queue.add(call)
    calls[0].ready.set()
    calls[2].ready.set()
    # In the order of their coming, so that none is overtaken for ever.
    assert queue.next_batch() == calls[:1]
    calls[1].ready.set()
    assert queue.next_batch() == calls[1:]


def test_partitions_of_one_push_are_written_side_by_side(tmp_path: Path) -> None:
    spec = replace(tiny_spec(num_partitions=2), levels=(LevelSpec(fan_out=4, block_width=2),))
    meeting = threading.Barrier(2, timeout=WAIT_S)
    meets = threading.Event()

    class MeetingFile(PosixLogFile):
        def append(self, buffers: Sequence[bytes | memoryview]) -> None:
            if meets.is_set():
                meeting.wait()
            super().append(buffers)

    config = ShardConfig(durability=Durability.HOST)
    shard = Shard.open(create_bank(tmp_path, spec), config=config, open_log_file=MeetingFile)
    refs = list(spec.blocks())
    assert len({spec.partition_of(ref) for ref in refs}) == 2
    meets.set()
    answer = shard.push(make_update(shard, refs, "u"))
    meets.clear()
    assert [result.ref for result in answer.results] == refs
    assert shard.push(make_update(shard, refs, "u")).duplicate
    shard.close()
