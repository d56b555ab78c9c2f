"""Fetches and updates of a shard."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from membank.bank_service.shard import Shard, ShardApi, ShardConfig
from membank.bank_service.shard.content import initial_content, zero_state
from membank.bank_service.shard.contract import SetState
from membank.bank_service.shard.optimizer import BlockOptimizer
from membank.bank_service.store import Bank
from membank.wire.codec import fetch_codec
from membank.wire.crc import crc32c
from membank.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format import initial_weight
from membank.wire.records import Gradient, Update
from membank.wire.spec import BlockRef, BlockState, LevelSpec, OptimizerKind, Role
from tiny_bank import create_bank, full_state, gradient_for, make_update, tiny_spec, transact

A, B, C, LEAF = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2), BlockRef(2, 5)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path / "bank")


@pytest.fixture
def shard(bank: Bank) -> Iterator[Shard]:
    shard = Shard.open(bank)
    yield shard
    shard.close()


def _push(shard: Shard, request_id: str, *refs: BlockRef) -> None:
    result = shard.push(make_update(shard, refs, request_id))
    assert all(found.accepted for found in result.results)


def test_it_is_what_the_contract_says(shard: Shard) -> None:
    assert isinstance(shard, ShardApi)


def test_blocks_that_were_never_written_are_derived(shard: Shard) -> None:
    (block,) = shard.fetch([LEAF]).blocks
    expected = initial_weight(shard.spec, LEAF)
    assert block.weight is not None
    np.testing.assert_array_equal(block.weight, expected)
    assert (block.version, block.header.crc32c) == (0, crc32c(expected))
    assert shard.stats().journal_bytes < 1000


def test_an_update_takes_one_step_of_the_optimizer(shard: Shard) -> None:
    update = make_update(shard, [A], "r")
    result = shard.push(update)
    assert [(r.accepted, r.version) for r in result.results] == [(True, 1)]
    start = {**initial_content(shard.spec, A).arrays, **zero_state(shard.spec, A)}
    expected = BlockOptimizer(shard.spec).apply(1, start, 0, update.gradients[0].values, 1.0)
    assert expected is not None
    (content,) = shard.read([A])
    assert (content.version, content.step) == (1, 1)
    for role, array in expected.items():
        found = content.weight if role is Role.WEIGHT else content.optimizer_state[role]
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("consolidated", [False, True])
def test_an_update_touches_no_other_block(shard: Shard, consolidated: bool) -> None:
    _push(shard, "first", *shard.spec.blocks())
    if consolidated:
        shard.consolidate()
    before = full_state(shard)
    _push(shard, "second", A, LEAF)
    if consolidated:
        shard.consolidate()
    after = full_state(shard)
    for ref, state in before.items():
        if ref in (A, LEAF):
            assert after[ref][0] == 2
            assert all(after[ref][3][role] != data for role, data in state[3].items())
        else:
            assert after[ref] == state, ref


def test_bytes_received_are_in_proportion_to_the_blocks_touched(shard: Shard) -> None:
    before = shard.stats()
    _push(shard, "r", A, LEAF)
    after = shard.stats()
    touched = sum(4 * shard.spec.block_params(ref.level) for ref in (A, LEAF))
    assert after.num_bytes_pushed - before.num_bytes_pushed == touched
    # The journal holds the gradients and a head, not the blocks.
    assert after.journal_bytes - before.journal_bytes < touched + 2 * 600


def test_a_fetched_block_does_not_change_when_it_is_updated(shard: Shard) -> None:
    (block,) = shard.fetch([A]).blocks
    assert block.weight is not None
    before = block.weight.copy()
    for number in range(3):
        _push(shard, f"r{number}", A)
    np.testing.assert_array_equal(block.weight, before)
    assert not block.weight.flags.writeable


def test_the_gradient_is_not_retained(shard: Shard) -> None:
    update = make_update(shard, [A], "r")
    shard.push(update)
    before = full_state(shard)
    update.gradients[0].values[:] = 9
    assert full_state(shard) == before


def test_a_held_version_costs_a_header_only(shard: Shard) -> None:
    _push(shard, "r", A)
    held, other = shard.fetch([A, B], held_versions=[1, 5]).blocks
    assert held.weight is None
    assert held.header.unchanged
    assert other.weight is not None
    assert not other.header.unchanged


def test_a_header_of_an_unchanged_block_has_the_checksum_that_is_known(shard: Shard) -> None:
    _push(shard, "r", A)
    for dtype in ("float32", "float16"):
        content = shard.fetch([A], dtype=dtype).blocks[0].header
        header = shard.fetch([A], held_versions=[1], dtype=dtype).blocks[0].header
        assert header.unchanged
        assert header.crc32c == (content.crc32c if dtype == shard.spec.dtype else 0)
    # What was never written derives from the seed, and nobody has summed it up.
    assert shard.fetch([B], held_versions=[0]).blocks[0].header.crc32c == 0


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
def test_dtype_of_a_fetch(tmp_path: Path, stored: str, asked: str) -> None:
    bank = create_bank(tmp_path, tiny_spec(dtype=stored))
    shard = Shard.open(bank)
    (block,) = shard.fetch([A], dtype=asked).blocks
    expected = initial_weight(bank.spec, A).astype(np.dtype(asked))
    assert block.weight is not None
    assert block.weight.tobytes() == expected.tobytes()
    assert block.header.crc32c == crc32c(expected)
    assert (block.header.dtype, block.header.num_bytes) == (asked, expected.nbytes)
    shard.close()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_a_fetch_in_an_encoding_gives_its_payload(tmp_path: Path, stored: str) -> None:
    shard = Shard.open(create_bank(tmp_path, tiny_spec(dtype=stored)))
    _push(shard, "p1", A)
    (exact,) = shard.fetch([A]).blocks
    (block,) = shard.fetch([A], dtype="int8").blocks
    assert exact.weight is not None
    assert block.weight is not None
    assert block.weight.tobytes() == fetch_codec("int8").encode(exact.weight).tobytes()
    assert not block.weight.flags.writeable
    header = block.header
    assert (header.dtype, header.shape) == ("int8", exact.weight.shape)
    assert (header.num_bytes, header.crc32c) == (block.weight.nbytes, crc32c(block.weight))
    # Its CRC is not that of the elements, which is all that is known without reading them.
    unchanged = shard.fetch([A], held_versions=[1], dtype="int8").blocks[0].header
    assert (unchanged.unchanged, unchanged.crc32c) == (True, 0)
    shard.close()


def test_blocks_are_not_sent_in_part(tmp_path: Path) -> None:
    shard = Shard.open(create_bank(tmp_path, tiny_spec()))
    with pytest.raises(InvalidArgumentError) as caught:
        shard.fetch([A], dtype="sparse")
    assert caught.value.reason is Reason.BAD_DTYPE
    shard.close()


@pytest.mark.parametrize("kind", list(OptimizerKind))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_everything_survives_a_stop_and_a_kill(
    tmp_path: Path, kind: OptimizerKind, dtype: str
) -> None:
    bank = create_bank(tmp_path, tiny_spec(dtype=dtype, optimizer=kind))
    for consolidate in (True, False):
        shard = Shard.open(bank)
        for number in range(2):
            _push(shard, f"{consolidate}{number}", A, LEAF)
        before = full_state(shard)
        shard.close(consolidate=consolidate)
        again = Shard.open(bank)
        assert full_state(again) == before
        again.close(consolidate=False)


def test_a_retry_is_answered_and_not_applied(shard: Shard) -> None:
    update = make_update(shard, [A, B], "r")
    first, state = shard.push(update), full_state(shard)
    second = shard.push(update)
    assert (first.duplicate, second.duplicate) == (False, True)
    assert second.results == first.results
    assert full_state(shard) == state


@pytest.mark.parametrize("consolidate", [False, True])
def test_a_retry_is_recognised_after_a_restart(bank: Bank, consolidate: bool) -> None:
    shard = Shard.open(bank)
    update = make_update(shard, [A, B], "r")
    first = shard.push(update)
    shard.close(consolidate=consolidate)
    again = Shard.open(bank)
    second = again.push(update)
    assert (second.duplicate, second.results) == (True, first.results)
    assert [status.version for status in again.describe([A, B])] == [1, 1]
    again.close()


def test_only_the_latest_requests_are_remembered(bank: Bank) -> None:
    shard = Shard.open(bank, config=ShardConfig(retained_requests=2))
    updates = [make_update(shard, [A], f"r{i}", bases={A: i}) for i in range(3)]
    for update in updates:
        shard.push(update)
    assert [shard.push(update).duplicate for update in reversed(updates)] == [True, True, False]
    shard.close()


def test_a_retry_applies_what_is_missing(shard: Shard) -> None:
    # A lies in partition 0, B in partition 1: a first attempt that reached only partition 0.
    whole = make_update(shard, [A, B], "r")
    shard.push(replace(whole, gradients=whole.gradients[:1]))
    result = shard.push(whole)
    assert not result.duplicate
    assert [status.version for status in shard.describe([A, B])] == [1, 1]


def test_a_request_id_of_another_update_is_refused(shard: Shard) -> None:
    _push(shard, "r", A)
    with pytest.raises(InvalidArgumentError, match="other blocks"):
        shard.push(make_update(shard, [C], "r"))


def test_a_base_that_is_too_old_is_refused(tmp_path: Path) -> None:
    shard = Shard.open(create_bank(tmp_path, tiny_spec(max_staleness=2)))
    for number in range(3):
        _push(shard, f"r{number}", A)
    results = [
        shard.push(make_update(shard, [A, B], f"s{base}", bases={A: base, B: 0})).results[0]
        for base in (0, 1)
    ]
    assert (results[0].accepted, results[0].reason) == (False, Reason.STALE_VERSION)
    assert (results[0].version, results[1].accepted, results[1].version) == (3, True, 4)
    shard.close()


def test_a_base_from_the_future_is_refused(shard: Shard) -> None:
    (result,) = shard.push(make_update(shard, [A], "r", bases={A: 1})).results
    assert (result.accepted, result.reason) == (False, Reason.VERSION_MISMATCH)


def test_numbers_that_are_not_finite_are_refused(shard: Shard) -> None:
    update = make_update(shard, [A, C], "r")
    values = update.gradients[0].values.copy()
    values[0, 0, 0, 0] = np.nan
    bad = replace(update, gradients=(replace(update.gradients[0], values=values),
                                     update.gradients[1]))  # fmt: skip
    first, second = shard.push(bad).results
    assert (first.accepted, first.reason, first.version) == (False, Reason.NOT_FINITE, 0)
    assert second.accepted
    # The refusal is part of the answer to a retry too.
    assert shard.push(bad).results == (first, second)


@pytest.mark.parametrize(("state", "reason"), [(BlockState.WITHHELD, Reason.BLOCK_WITHHELD)])
def test_a_withheld_block_takes_no_update(
    shard: Shard, bank: Bank, state: BlockState, reason: Reason
) -> None:
    transact(shard, bank, [SetState(ref=A, state=state)])
    (result,) = shard.push(make_update(shard, [A], "r")).results
    assert (result.accepted, result.reason) == (False, reason)
    (block,) = shard.fetch([A]).blocks
    assert (block.weight, block.header.state) == (None, state)


def _gradient(ref: BlockRef, values: np.ndarray) -> Update:
    return Update(
        request_id="r", step=0, gradients=(Gradient(ref=ref, base_version=0, values=values),)
    )


def test_malformed_updates_are_refused_as_a_whole(shard: Shard) -> None:
    good = gradient_for(shard.spec, A, 1)
    cases = {
        Reason.BAD_SHAPE: _gradient(A, good[:1]),
        Reason.BAD_DTYPE: _gradient(A, good.astype(np.float64)),
        Reason.UNKNOWN_CLUSTER: _gradient(BlockRef(1, 3), good),
        Reason.UNKNOWN_LEVEL: _gradient(BlockRef(3, 0), good),
        Reason.BAD_ARGUMENT: replace(_gradient(A, good), learning_rate_scale=float("nan")),
    }
    for reason, update in cases.items():
        with pytest.raises((InvalidArgumentError, NotFoundError)) as caught:
            shard.push(update)
        assert caught.value.reason is reason
    with pytest.raises(InvalidArgumentError, match="twice"):
        shard.push(replace(cases[Reason.BAD_SHAPE], gradients=(
            Gradient(ref=A, base_version=0, values=good),) * 2))  # fmt: skip
    assert shard.describe([A])[0].version == 0


def test_a_partition_of_another_shard(bank: Bank) -> None:
    shard = Shard.open(bank, partitions=[0])
    with pytest.raises(UnavailableError) as caught:
        shard.fetch([B])
    assert caught.value.reason is Reason.NOT_OWNER
    other = Shard.open(bank, partitions=[1])
    assert other.fetch([B]).blocks[0].version == 0
    with pytest.raises(FailedPreconditionError) as in_use:
        Shard.open(bank, partitions=[1])
    assert in_use.value.reason is Reason.BANK_IN_USE
    other.close()
    shard.close()
    with pytest.raises(NotFoundError):
        Shard.open(bank, partitions=[2])


def test_a_revision_that_is_not_there_yet(shard: Shard) -> None:
    with pytest.raises(UnavailableError) as caught:
        shard.fetch([A], min_revision=1)
    assert caught.value.reason is Reason.BEHIND_REVISION


def test_a_bank_without_a_directory_needs_one_for_its_journals(tmp_path: Path) -> None:
    bank = Bank.create("memory://journal-test", tiny_spec())
    with pytest.raises(FailedPreconditionError, match="journal_dir"):
        Shard.open(bank)
    config = ShardConfig(journal_dir=str(tmp_path))
    shard = Shard.open(bank, config=config)
    _push(shard, "a", A, LEAF)
    before = full_state(shard)
    shard.close()
    again = Shard.open("memory://journal-test", config=config)
    assert full_state(again) == before
    again.close()


def test_a_small_budget_changes_nothing_but_memory(bank: Bank) -> None:
    spec = bank.spec
    budget = spec.weight_bytes(1) + spec.optimizer_bytes(1)
    shard = Shard.open(bank, config=ShardConfig(resident_bytes=budget, consolidate_bytes=1))
    for number in range(2):
        for ref in spec.blocks():
            _push(shard, f"{number}-{ref}", ref)
    assert shard.stats().resident_bytes <= budget
    state = full_state(shard)
    shard.close()
    roomy = Shard.open(bank)
    assert full_state(roomy) == state
    assert all(version == 2 for version, *_ in state.values())
    roomy.close()


def test_the_journal_is_folded_at_its_threshold(bank: Bank) -> None:
    shard = Shard.open(bank, config=ShardConfig(consolidate_bytes=3000))
    sizes = []
    for number in range(12):
        _push(shard, f"r{number}", A)
        sizes.append(shard.stats().journal_bytes)
    assert max(sizes) < 3000 + 2000
    assert any(later < earlier for earlier, later in itertools.pairwise(sizes))
    shard.close()


def test_the_journal_is_folded_after_so_many_updates_of_blocks(bank: Bank) -> None:
    shard = Shard.open(bank, config=ShardConfig(consolidate_updates=6))
    found = []
    for number in range(7):
        _push(shard, f"r{number}", A, C)  # of one partition
        found.append(shard.stats().journal_bytes)
    drops = [i for i, (before, after) in enumerate(itertools.pairwise(found), 1) if after < before]
    assert drops == [2, 5]
    shard.close(consolidate=False)
    # What is replayed counts as well.
    again = Shard.open(bank, config=ShardConfig(consolidate_updates=4))
    before = again.stats().journal_bytes
    _push(again, "r7", A, C)
    assert again.stats().journal_bytes < before
    again.close()


def test_slots_and_manifests_do_not_pile_up(bank: Bank, tmp_path: Path) -> None:
    shard = Shard.open(bank, config=ShardConfig(consolidate_bytes=1))
    for number in range(20):
        _push(shard, f"r{number}", A, B)
    folder = tmp_path / "bank" / "partitions" / "0000"
    assert len(list((folder / "manifests").iterdir())) == 1
    assert len(list((folder / "level-1" / "weight").glob("c.*"))) == 1
    shard.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_slots_are_chunks_for_any_zarr_reader(tmp_path: Path, dtype: str) -> None:
    bank = create_bank(tmp_path, tiny_spec(dtype=dtype))
    shard = Shard.open(bank)
    refs = list(bank.spec.blocks())
    _push(shard, "r", *refs)
    shard.consolidate()
    for partition in range(bank.spec.num_partitions):
        manifest = bank.read_manifest(partition, bank.manifest_numbers(partition)[-1])
        for ref, entry in manifest.entries.items():
            (content,) = shard.read([ref])
            arrays = {Role.WEIGHT: content.weight, **content.optimizer_state}
            for role, expected in arrays.items():
                path = tmp_path / f"partitions/{partition:04d}/level-{ref.level}/{role.value}"
                ours = zarr.open_array(str(path), mode="r")
                theirs = tensorstore.open(
                    {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
                ).result()
                for found in (ours[entry.slot], theirs[entry.slot].read().result()):
                    assert np.asarray(found).tobytes() == expected.tobytes()
                logical = ours.attrs["logical_dtype"]
                assert logical == (dtype if role is Role.WEIGHT else "float32")
    shard.close()


def test_a_retry_may_leave_out_what_was_withheld_since(shard: Shard) -> None:
    # A and C lie in one partition, and so in one entry of its log.
    whole = make_update(shard, [A, C], "r")
    first = shard.push(whole)
    again = shard.push(replace(whole, gradients=whole.gradients[:1]))
    assert again.duplicate
    assert again.results == first.results[:1]
    assert [status.version for status in shard.describe([A, C])] == [1, 1]


def test_a_numpy_number_is_a_learning_rate_scale(shard: Shard) -> None:
    update = dataclasses.replace(make_update(shard, [A], "r"), learning_rate_scale=np.float64(0.5))
    assert shard.push(update).results[0].accepted


def test_concurrent_fetches_and_updates_agree(bank: Bank) -> None:
    shard = Shard.open(bank, config=ShardConfig(consolidate_bytes=4000, resident_bytes=0))
    stop = threading.Event()
    problems: list[str] = []

    def read() -> None:
        while not stop.is_set():
            for block in shard.fetch([A, B, LEAF]).blocks:
                assert block.weight is not None
                if crc32c(block.weight) != block.header.crc32c:
                    problems.append(f"{block.ref} is torn")

    def write(ref: BlockRef) -> None:
        for number in range(30):
            _push(shard, f"{ref}-{number}", ref)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(ref,)) for ref in (A, B, LEAF)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not problems
    assert [status.version for status in shard.describe([A, B, LEAF])] == [30, 30, 30]
    shard.close()


def test_first_reads_do_not_disturb_a_consolidation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(tiny_spec(num_partitions=1), levels=(LevelSpec(fan_out=2000, block_width=1),))
    shard = Shard.open(create_bank(tmp_path, spec))
    first, *rest = spec.blocks()
    problems: list[BaseException] = []
    done = threading.Event()
    monkeypatch.setattr(threading, "excepthook", lambda args: problems.append(args.exc_value))

    def consolidate() -> None:
        for number in itertools.count():
            _push(shard, f"r{number}", first)
            shard.consolidate()
            if done.is_set():
                return

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # so that threads meet in the middle of a loop
    try:
        writer = threading.Thread(target=consolidate)
        writer.start()
        for ref in rest:
            shard.fetch([ref])
        done.set()
        writer.join()
    finally:
        sys.setswitchinterval(before)
    assert problems == []
    shard.close()


def test_watchers_are_told_of_what_they_asked_for(shard: Shard, bank: Bank) -> None:
    everything, only_b = shard.subscribe(), shard.subscribe([B])
    admin = shard.subscribe(admin_only=True)
    _push(shard, "r", A, B)
    transact(shard, bank, [SetState(ref=B, state=BlockState.WITHHELD)])
    events, dropped = everything.next_events(0)
    assert [(e.ref, e.version, e.is_update) for e in events] == [
        (A, 1, True),
        (B, 1, True),
        (B, 2, False),
    ]
    assert dropped == 0
    assert [e.version for e in only_b.next_events(0)[0]] == [1, 2]
    (event,) = admin.next_events(0)[0]
    assert (event.state, event.revision) == (BlockState.WITHHELD, 1)
    assert admin.next_events(0) == ((), 0)
    admin.close()
    assert admin.next_events(60) == ((), 0)


def test_a_slow_watcher_loses_the_oldest_and_is_told(bank: Bank) -> None:
    shard = Shard.open(bank, config=ShardConfig(watch_queue_events=2))
    slow = shard.subscribe()
    for number in range(5):
        _push(shard, f"r{number}", A)
    events, dropped = slow.next_events(0)
    assert ([event.version for event in events], dropped) == ([4, 5], 3)
    shard.close()


def test_a_closed_shard_says_so(bank: Bank) -> None:
    shard = Shard.open(bank)
    shard.close()
    shard.close()
    with pytest.raises(UnavailableError):
        shard.fetch([A])
