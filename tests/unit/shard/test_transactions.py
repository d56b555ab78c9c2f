"""Transactions on one shard: all or nothing, whoever dies in between."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import (
    BlockOperation,
    Erase,
    RestoreEntry,
    SetContent,
    SetState,
)
from membank.bank_service.store import Bank
from membank.bank_service.store.journal import PosixLogFile
from membank.wire.errors import (
    ConflictError,
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.format import initial_weight
from membank.wire.records import Snapshot
from membank.wire.spec import Array, BlockRef, BlockState, Role
from storage_faults import FaultPlan, FaultyObjects, StorageFault
from tiny_bank import (
    UnsyncedObjects,
    commit_record,
    create_bank,
    file_bytes,
    full_state,
    make_update,
    tiny_spec,
    transact,
)

# A and C lie in partition 0, B in partition 1.
A, B, C, LEAF = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2), BlockRef(2, 0)
NO_WAIT = ShardConfig(hold_wait_s=0, settle_after_s=60)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path / "bank")


@pytest.fixture
def shard(bank: Bank) -> Iterator[Shard]:
    shard = Shard.open(bank, config=NO_WAIT, clock=lambda: 0.0)
    yield shard
    shard.close()


def _push(shard: Shard, request_id: str, *refs: BlockRef) -> None:
    assert all(r.accepted for r in shard.push(make_update(shard, refs, request_id)).results)


def _weight(value: float, ref: BlockRef = A) -> Array:
    return np.full(tiny_spec().block_shape(ref.level), value, np.float32)


def _fetch(shard: Shard, ref: BlockRef) -> Array:
    (block,) = shard.fetch([ref]).blocks
    assert block.weight is not None
    return block.weight


def test_swap_replaces_content_and_starts_the_optimizer_afresh(shard: Shard, bank: Bank) -> None:
    _push(shard, "r", A)
    prepared = transact(shard, bank, [SetContent(ref=A, weight=_weight(3), expected_version=1)])
    (change,) = prepared.changes
    assert (change.version_before, change.version_after) == (1, 2)
    (content,) = shard.read([A])
    assert (content.version, content.step) == (2, 0)
    np.testing.assert_array_equal(content.weight, _weight(3))
    assert not any(array.any() for array in content.optimizer_state.values())
    assert shard.revision == 1


def test_content_is_exported_and_imported_bit_for_bit(shard: Shard, bank: Bank) -> None:
    for number in range(3):
        _push(shard, f"r{number}", A)
    (content,) = shard.read([A])
    transact(shard, bank, [Erase(ref=A)])
    assert list(shard.read([A])) == []
    imported = SetContent(
        ref=A, weight=content.weight, optimizer_state=content.optimizer_state, step=content.step
    )
    transact(shard, bank, [imported])
    (again,) = shard.read([A])
    assert again.weight.tobytes() == content.weight.tobytes()
    for role, array in content.optimizer_state.items():
        assert again.optimizer_state[role].tobytes() == array.tobytes()
    assert (again.step, again.version) == (3, 5)


def test_the_arrays_of_a_swap_are_not_retained(shard: Shard, bank: Bank) -> None:
    weight = _weight(1)
    transact(shard, bank, [SetContent(ref=A, weight=weight)])
    weight[:] = 2
    np.testing.assert_array_equal(_fetch(shard, A), _weight(1))


def test_a_version_that_is_not_expected_changes_nothing(shard: Shard, bank: Bank) -> None:
    _push(shard, "r", A, B)
    before = full_state(shard)
    operations = [
        SetContent(ref=B, weight=_weight(1)),
        SetContent(ref=A, weight=_weight(1), expected_version=0),
    ]
    with pytest.raises(ConflictError) as caught:
        shard.prepare(1, operations)
    assert caught.value.reason is Reason.VERSION_MISMATCH
    assert full_state(shard) == before
    _push(shard, "later", A, B)


def test_withhold_and_restore(shard: Shard, bank: Bank) -> None:
    _push(shard, "r", A)
    before = _fetch(shard, A).copy()
    transact(shard, bank, [SetState(ref=A, state=BlockState.WITHHELD)])
    (block,) = shard.fetch([A]).blocks
    assert (block.weight, block.header.state, block.version) == (None, BlockState.WITHHELD, 2)
    transact(shard, bank, [SetState(ref=A, state=BlockState.ACTIVE)])
    np.testing.assert_array_equal(_fetch(shard, A), before)
    assert shard.describe([A])[0].step == 1


def test_what_has_no_effect_changes_nothing(shard: Shard, bank: Bank) -> None:
    transact(shard, bank, [Erase(ref=A)])
    state = full_state(shard)
    prepared = transact(
        shard,
        bank,
        [
            Erase(ref=A),
            SetState(ref=B, state=BlockState.ACTIVE),
            RestoreEntry(ref=C, manifest=0),
        ],
    )
    assert prepared.changes == ()
    assert full_state(shard) == state
    assert shard.revision == 2


def test_deleted_stays_deleted(shard: Shard, bank: Bank) -> None:
    _push(shard, "r", A, C)
    transact(shard, bank, [], all_partitions=True)
    pinned = bank.named_manifest(1, 0)
    transact(shard, bank, [Erase(ref=A)])
    _push(shard, "later", C)
    attempts: list[list[BlockOperation]] = [
        [SetState(ref=A, state=BlockState.ACTIVE)],
        [RestoreEntry(ref=A, manifest=pinned), RestoreEntry(ref=C, manifest=pinned)],
        [RestoreEntry(ref=A, manifest=0)],
    ]
    for operations in attempts:
        transact(shard, bank, operations)
        assert shard.describe([A])[0].state is BlockState.DELETED
    assert shard.describe([C])[0].step == 1
    (result,) = shard.push(make_update(shard, [A], "late")).results
    assert result.reason is Reason.BLOCK_DELETED


def test_a_late_gradient_does_not_reach_what_was_imported(shard: Shard, bank: Bank) -> None:
    _push(shard, "r", A)
    transact(shard, bank, [Erase(ref=A)])
    transact(shard, bank, [SetContent(ref=A, weight=_weight(1))])
    (late,) = shard.push(make_update(shard, [A], "late", bases={A: 1})).results
    assert (late.accepted, late.reason, late.version) == (False, Reason.STALE_VERSION, 3)
    np.testing.assert_array_equal(_fetch(shard, A), _weight(1))
    _push(shard, "fresh", A)


def test_rollback_brings_content_back_under_a_new_version(shard: Shard, bank: Bank) -> None:
    _push(shard, "r", A, B)
    transact(shard, bank, [SetContent(ref=LEAF, weight=_weight(5, LEAF))], all_partitions=True)
    pinned = full_state(shard)
    _push(shard, "more", A, B)
    transact(shard, bank, [SetState(ref=LEAF, state=BlockState.WITHHELD)], all_partitions=True)
    operations = [
        RestoreEntry(ref=ref, manifest=bank.named_manifest(1, bank.spec.partition_of(ref)))
        for ref in bank.spec.blocks()
    ]
    prepared = transact(shard, bank, operations)
    assert {change.ref for change in prepared.changes} == {A, B, LEAF}
    after = full_state(shard)
    for ref, (version, state, step, content) in pinned.items():
        assert after[ref][1:] == (state, step, content)
        assert after[ref][0] == (version + 2 if ref in {A, B, LEAF} else version)


def test_rollback_needs_a_retained_revision(bank: Bank) -> None:
    shard = Shard.open(bank, config=replace(NO_WAIT, retained_revisions=1))
    transact(shard, bank, [SetContent(ref=A, weight=_weight(1))])
    bank.create_snapshot(Snapshot(name="kept", revision=1, create_time_s=0))
    transact(shard, bank, [SetContent(ref=A, weight=_weight(2))])
    transact(shard, bank, [SetContent(ref=A, weight=_weight(3))])
    first, second = bank.named_manifest(1, 0), bank.named_manifest(2, 0)
    with pytest.raises(NotFoundError, match="not retained"):
        shard.prepare(4, [RestoreEntry(ref=A, manifest=second)])
    transact(shard, bank, [RestoreEntry(ref=A, manifest=first)])
    np.testing.assert_array_equal(_fetch(shard, A), _weight(1))
    bank.delete_snapshot("kept")
    _push(shard, "r", A)
    shard.consolidate()
    shard.close()
    assert first not in bank.manifest_numbers(0)


def test_a_dry_run_changes_nothing(shard: Shard, bank: Bank, tmp_path: Path) -> None:
    _push(shard, "r", A, B)
    files = file_bytes(tmp_path / "bank")
    operations: list[BlockOperation] = [Erase(ref=A), SetContent(ref=B, weight=_weight(1))]
    dry = shard.prepare(1, operations, dry_run=True)
    assert file_bytes(tmp_path / "bank") == files
    _push(shard, "not held", C)
    wet = transact(shard, bank, operations)
    assert dry.changes == wet.changes
    assert dry.num_slots_destroyed == wet.num_slots_destroyed == 1
    assert dry.manifests == {}


def test_erase_leaves_no_byte(shard: Shard, bank: Bank, tmp_path: Path) -> None:
    marker = np.float32(1.2345678)
    pattern = marker.tobytes() * 4
    weight = np.full(bank.spec.block_shape(1), marker, np.float32)
    # In slots of two retained revisions, in a snapshot, in the optimizer's state, in the journal.
    state = dict.fromkeys(bank.spec.optimizer.state_roles, weight)
    transact(shard, bank, [SetContent(ref=A, weight=weight, optimizer_state=state)])
    bank.create_snapshot(Snapshot(name="pinned", revision=1, create_time_s=0))
    update = make_update(shard, [A, C], "r")
    marked = replace(update, gradients=tuple(replace(g, values=weight) for g in update.gradients))
    shard.push(marked)
    transact(shard, bank, [SetState(ref=C, state=BlockState.WITHHELD)])
    shard.push(replace(marked, request_id="again", gradients=(
        replace(marked.gradients[0], base_version=2),)))  # fmt: skip
    assert _holding(tmp_path, pattern)
    prepared = shard.prepare(3, [Erase(ref=A)])
    assert prepared.num_slots_destroyed == 3
    shard.commit(bank.decide(commit_record(bank, 3, prepared)))
    assert _holding(tmp_path, pattern) == []
    (block,) = shard.fetch([A]).blocks
    assert (block.weight, block.header.state) == (None, BlockState.DELETED)
    # What others have in the same snapshot is still there, and a restart changes nothing.
    transact(shard, bank, [RestoreEntry(ref=C, manifest=bank.named_manifest(1, 0))])
    assert shard.describe([A, C])[1].step == 0


class _DyingLogFile(PosixLogFile):
    """Fails from the second frame of an update on, and cannot undo what it wrote of it."""

    num_appends = 0

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        self.num_appends += 1
        if self.num_appends > 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().append(buffers)

    def truncate(self, num_bytes: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_nothing_is_deleted_while_the_journal_cannot_be_trimmed(bank: Bank) -> None:
    shard = Shard.open(bank, config=NO_WAIT, open_log_file=_DyingLogFile)
    _push(shard, "kept", A)
    with pytest.raises(UnavailableError):
        _push(shard, "lost", A)
    with pytest.raises(UnavailableError) as caught:
        shard.prepare(1, [Erase(ref=A)])
    assert caught.value.reason is Reason.STORE_FAILED
    shard.close()
    # As the message says: a new owner finds out what the journal holds, and then it can.
    shard = Shard.open(bank)
    transact(shard, bank, [Erase(ref=A)])
    shard.close()


def _holding(root: Path, pattern: bytes) -> list[str]:
    return [name for name, data in file_bytes(root).items() if pattern in data]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_erase_wipes_memory_but_not_under_a_reader(tmp_path: Path, dtype: str) -> None:
    bank = create_bank(tmp_path, tiny_spec(dtype=dtype))
    shard = Shard.open(bank)
    _push(shard, "r", A, C)
    (lent,) = shard.fetch([A]).blocks
    assert lent.weight is not None
    copy = lent.weight.copy()
    unlent = shard._owner(C).record(C).content  # the only way to see memory that was let go
    assert unlent is not None
    moments = unlent.arrays[Role.EXP_AVG]
    kept = moments.copy()
    transact(shard, bank, [Erase(ref=A), Erase(ref=C)])
    np.testing.assert_array_equal(lent.weight, copy)
    # `moments` is a reader too.
    np.testing.assert_array_equal(moments, kept)
    assert unlent.arrays == {}
    shard.close()


def test_updates_are_held_back_and_fetches_are_not(shard: Shard, bank: Bank) -> None:
    _push(shard, "r", A)
    before = _fetch(shard, A).copy()
    prepared = shard.prepare(1, [SetContent(ref=A, weight=_weight(9))])
    np.testing.assert_array_equal(_fetch(shard, A), before)
    with pytest.raises(UnavailableError) as caught:
        shard.push(make_update(shard, [C], "held"))
    assert caught.value.reason is Reason.TRANSACTION_IN_PROGRESS
    _push(shard, "other partition", B)
    shard.commit(bank.decide(commit_record(bank, 1, prepared)))
    np.testing.assert_array_equal(_fetch(shard, A), _weight(9))
    _push(shard, "held", C)


def test_an_update_that_waits_goes_on_after_the_commit(bank: Bank) -> None:
    shard = Shard.open(bank, config=ShardConfig(hold_wait_s=60))
    prepared = shard.prepare(1, [SetState(ref=A, state=BlockState.WITHHELD)])
    waiting = threading.Thread(target=_push, args=(shard, "r", C))
    waiting.start()
    shard.commit(bank.decide(commit_record(bank, 1, prepared)))
    waiting.join()
    assert shard.describe([C])[0].version == 1
    shard.close()


def _named_files(root: Path) -> tuple[set[str], int]:
    """Return all files but records and manifests, and how many manifests: their numbers go up."""
    names = {name for name in file_bytes(root) if not name.startswith("revisions/")}
    manifests = {name for name in names if "/manifests/" in name}
    return names - manifests, len(manifests)


def test_abort_leaves_everything_as_it_was(shard: Shard, bank: Bank, tmp_path: Path) -> None:
    _push(shard, "r", A)
    shard.consolidate()
    state, files = full_state(shard), _named_files(tmp_path / "bank")
    shard.prepare(1, [SetContent(ref=A, weight=_weight(9)), Erase(ref=C)])
    shard.abort(1)
    shard.abort(1)
    assert full_state(shard) == state
    assert _named_files(tmp_path / "bank") == files
    _push(shard, "later", A)
    transact(shard, bank, [SetContent(ref=A, weight=_weight(9))])


def test_what_could_not_be_prepared_everywhere_keeps_nobody_waiting(tmp_path: Path) -> None:
    root, config = tmp_path / "bank", ShardConfig(journal_dir=str(tmp_path / "journals"))
    create_bank(root)
    plan = FaultPlan(StorageFault.NO_SPACE)
    shard = Shard.open(Bank.open(FaultyObjects(UnsyncedObjects(root), plan)), config=config)
    # In each partition, slots (none here) are synced and a manifest is published; the second one
    # finds no space.
    plan.at = plan.num_calls + 4
    with pytest.raises(ResourceExhaustedError):
        shard.prepare(1, [SetState(ref=ref, state=BlockState.WITHHELD) for ref in (A, B)])
    shard.close(consolidate=False)
    bank = Bank.open(UnsyncedObjects(root))
    again = Shard.open(bank, config=config)
    transact(again, bank, [SetContent(ref=A, weight=_weight(9))])
    again.close()


def test_commit_may_be_repeated(shard: Shard, bank: Bank) -> None:
    prepared = shard.prepare(1, [Erase(ref=A)])
    record = bank.decide(commit_record(bank, 1, prepared))
    shard.commit(record)
    _push(shard, "r", C)
    state = full_state(shard)
    shard.commit(record)
    assert full_state(shard) == state


def test_commit_needs_the_record(shard: Shard, bank: Bank) -> None:
    prepared = shard.prepare(1, [Erase(ref=A)])
    with pytest.raises(FailedPreconditionError):
        shard.commit(commit_record(bank, 1, prepared))
    assert shard.describe([A])[0].state is BlockState.ACTIVE


def test_a_record_that_names_what_was_not_prepared_is_refused(shard: Shard, bank: Bank) -> None:
    prepared = shard.prepare(1, [Erase(ref=A)])
    record = bank.decide(replace(commit_record(bank, 1, prepared), manifests={0: 99}))
    with pytest.raises(CorruptionError, match="not prepared here"):
        shard.commit(record)


def test_one_transaction_at_a_time(shard: Shard, bank: Bank) -> None:
    prepared = shard.prepare(1, [Erase(ref=A)])
    with pytest.raises(UnavailableError) as caught:
        shard.prepare(1, [Erase(ref=C)])
    assert caught.value.reason is Reason.TRANSACTION_IN_PROGRESS
    shard.commit(bank.decide(commit_record(bank, 1, prepared)))
    with pytest.raises(ConflictError) as conflict:
        shard.prepare(1, [Erase(ref=C)])
    assert conflict.value.reason is Reason.TRANSACTION_CONFLICT
    transact(shard, bank, [Erase(ref=C)])


def test_all_partitions_take_part_if_asked(shard: Shard, bank: Bank) -> None:
    _push(shard, "r", A, B)
    prepared = transact(shard, bank, [], all_partitions=True)
    assert set(prepared.manifests) == {0, 1}
    for partition, number in prepared.manifests.items():
        manifest = bank.read_manifest(partition, number)
        assert [entry.version for entry in manifest.entries.values()] == [1]


def test_a_shard_without_a_part_notes_the_revision(bank: Bank) -> None:
    one, two = Shard.open(bank, partitions=[0]), Shard.open(bank, partitions=[1])
    record = bank.decide(commit_record(bank, 1, one.prepare(1, [Erase(ref=A)])))
    one.commit(record)
    assert (one.revision, two.revision) == (1, 0)
    # Told, or asked for it: both work.
    assert two.fetch([B], min_revision=1).revision == 1
    two.commit(record)
    one.close()
    two.close()


def test_no_fetch_sees_half_of_a_transaction(bank: Bank) -> None:
    shard = Shard.open(bank)
    refs = [A, B, C]
    transact(shard, bank, [SetContent(ref=ref, weight=_weight(0)) for ref in refs])
    stop, mixtures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            result = shard.fetch(refs)
            values = {float(b.weight.flat[0]) for b in result.blocks if b.weight is not None}
            if len(values) != 1 or values != {float(result.revision - 1)}:
                mixtures.append(values)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 25):
        operations = [SetContent(ref=ref, weight=_weight(number)) for ref in refs]
        transact(shard, bank, operations)
    stop.set()
    reader.join()
    shard.close()
    assert mixtures == []


@pytest.mark.parametrize("decision", ["commit", "abort", "other"])
def test_a_prepared_shard_that_dies_learns_the_decision(bank: Bank, decision: str) -> None:
    shard = Shard.open(bank)
    _push(shard, "r", A)
    before = full_state(shard)
    prepared = shard.prepare(1, [SetContent(ref=A, weight=_weight(4)), Erase(ref=C)])
    shard.close(consolidate=False)
    record = commit_record(bank, 1, prepared)
    if decision == "abort":
        record = replace(record, committed=False, manifests={})
    elif decision == "other":
        record = replace(record, manifests={1: 1})
    bank.decide(record)
    again = Shard.open(Bank.open(bank.objects))
    if decision == "commit":
        np.testing.assert_array_equal(_fetch(again, A), _weight(4))
        assert again.describe([C])[0].state is BlockState.DELETED
    else:
        assert full_state(again) == before
    assert again.revision == (0 if decision == "abort" else 1)
    _push(again, "later", A)
    again.close()


@pytest.mark.parametrize("committed", [True, False])
def test_a_decision_that_comes_after_the_restart(bank: Bank, committed: bool) -> None:
    shard = Shard.open(bank)
    _push(shard, "r", A)
    before = full_state(shard)
    prepared = shard.prepare(1, [SetContent(ref=A, weight=_weight(4)), Erase(ref=C)])
    shard.close(consolidate=False)
    again = Shard.open(bank, config=NO_WAIT)
    assert full_state(again) == before
    with pytest.raises(UnavailableError):
        again.push(make_update(again, [A], "held"))
    record = commit_record(bank, 1, prepared)
    again.commit(bank.decide(replace(record, committed=committed)))
    if committed:
        np.testing.assert_array_equal(_fetch(again, A), _weight(4))
        assert again.describe([C])[0].state is BlockState.DELETED
    else:
        assert full_state(again) == before
    _push(again, "held", A)
    again.close()


def test_a_silent_coordinator_is_not_waited_for_for_ever(shard: Shard, bank: Bank) -> None:
    before = full_state(shard)
    prepared = shard.prepare(1, [Erase(ref=A)])
    assert shard.settle(59.0) == ()
    assert shard.settle(60.0) == (1,)
    record = bank.record(1)
    assert record is not None
    assert not record.committed
    assert full_state(shard) == before
    _push(shard, "r", C)
    with pytest.raises(ConflictError):
        bank.decide(commit_record(bank, 1, prepared))
    transact(shard, bank, [Erase(ref=A)])
    assert shard.revision == 2


def test_settling_follows_a_decision_that_was_made(shard: Shard, bank: Bank) -> None:
    prepared = shard.prepare(1, [Erase(ref=A)])
    bank.decide(commit_record(bank, 1, prepared))
    shard.settle(math.inf)
    assert shard.describe([A])[0].state is BlockState.DELETED
    assert shard.revision == 1


def test_malformed_operations(shard: Shard) -> None:
    good = _weight(1)
    nan = good.copy()
    nan[0, 0, 0, 0] = np.nan
    cases = [
        ([SetContent(ref=A, weight=good[:1])], Reason.BAD_SHAPE),
        ([SetContent(ref=A, weight=good.astype(np.float64))], Reason.BAD_DTYPE),
        ([SetContent(ref=A, weight=nan)], Reason.NOT_FINITE),
        ([SetContent(ref=A, weight=good, step=-1)], Reason.BAD_ARGUMENT),
        (
            [SetContent(ref=A, weight=good, optimizer_state={Role.SUM_SQ: good})],
            Reason.BAD_ARGUMENT,
        ),
        ([SetState(ref=A, state=BlockState.DELETED)], Reason.BAD_ARGUMENT),
        ([Erase(ref=A), Erase(ref=A)], Reason.BAD_ARGUMENT),
    ]
    for operations, reason in cases:
        with pytest.raises(InvalidArgumentError) as caught:
            shard.prepare(1, operations)  # type: ignore[arg-type]
        assert caught.value.reason is reason
    with pytest.raises(NotFoundError):
        shard.prepare(1, [Erase(ref=BlockRef(1, 99))])


def test_never_written_blocks_can_be_reset_to(shard: Shard, bank: Bank) -> None:
    _push(shard, "r", A)
    transact(shard, bank, [RestoreEntry(ref=A, manifest=0)])
    np.testing.assert_array_equal(_fetch(shard, A), initial_weight(bank.spec, A))
    assert (shard.describe([A])[0].version, shard.describe([A])[0].step) == (2, 0)
    _push(shard, "more", A)
