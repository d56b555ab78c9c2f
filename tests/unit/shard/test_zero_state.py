"""An optimizer state of zeros is not stored: what that must not change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from membank.bank_service.fsck import check_bank
from membank.bank_service.shard import Shard
from membank.bank_service.shard.contract import SetContent
from membank.bank_service.store import Bank, LocalObjects
from membank.bank_service.store.arrays import SlotArrays
from membank.wire.crc import crc32c, zeros_crc32c
from membank.wire.errors import CorruptionError, InvalidArgumentError, Reason
from membank.wire.format import encode_slot
from membank.wire.format.layout import array_prefix, slot_key
from membank.wire.spec import Array, BlockRef, Role
from storage_faults import Crash, FaultPlan, FaultyObjects, StorageFault
from tiny_bank import UnsyncedObjects, create_bank, make_update, tiny_spec, transact

A = BlockRef(1, 0)
STATE = (Role.EXP_AVG, Role.EXP_AVG_SQ)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path / "bank")


@pytest.fixture
def shard(bank: Bank) -> Iterator[Shard]:
    shard = Shard.open(bank)
    yield shard
    shard.close()


def swap(value: float = 3.0) -> SetContent:
    return SetContent(ref=A, weight=np.full(tiny_spec().block_shape(1), value, np.float32))


def path_of(bank: Bank, role: Role, slot: int) -> Path:
    return Path(bank.url) / slot_key(0, A.level, role, slot)


def slot_of(bank: Bank) -> int:
    """Return the slot that the newest manifest names for `A`."""
    return bank.read_manifest(0, bank.manifest_numbers(0)[-1]).entries[A].slot


def state_of(shard: Shard) -> dict[Role, Array]:
    (content,) = shard.read([A])
    return dict(content.optimizer_state)


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, (1 << 20) + 3])
def test_the_crc_of_zeros_is_that_of_zeros(num_bytes: int) -> None:
    assert zeros_crc32c(num_bytes) == crc32c(bytes(num_bytes))


def test_a_swap_stores_the_weight_alone(shard: Shard, bank: Bank, tmp_path: Path) -> None:
    transact(shard, bank, [swap()])
    slot = slot_of(bank)
    assert path_of(bank, Role.WEIGHT, slot).exists()
    assert not any(path_of(bank, role, slot).exists() for role in STATE)
    assert not any(array.any() for array in state_of(shard).values())
    # Whoever reads the bank by zarr alone finds the same.
    array = zarr.open_array(tmp_path / "bank" / array_prefix(0, 1, Role.EXP_AVG), mode="r")
    assert not np.asarray(array[slot]).any()
    shard.close()
    assert check_bank(LocalObjects(tmp_path / "bank")).findings == ()


def test_steps_after_a_swap_are_the_same_whether_the_state_was_stored(
    shard: Shard, bank: Bank
) -> None:
    zeros = {role: np.zeros(tiny_spec().block_shape(1), np.float32) for role in STATE}
    results: list[tuple[bytes, dict[Role, Array]]] = []
    for state in ({}, zeros):
        content = SetContent(ref=A, weight=swap().weight, optimizer_state=state)
        transact(shard, bank, [content])
        shard.close()
        shard = Shard.open(bank)
        shard.push(make_update(shard, [A], f"r{len(results)}", seed=1))
        (after,) = shard.read([A])
        results.append((after.weight.tobytes(), state_of(shard)))
    shard.close()
    assert results[0][0] == results[1][0]
    for role in STATE:
        assert results[0][1][role].any()
        np.testing.assert_array_equal(results[0][1][role], results[1][1][role])


def test_what_a_crash_left_is_not_taken_for_the_state(shard: Shard, bank: Bank) -> None:
    transact(shard, bank, [swap()])
    slot = slot_of(bank)
    junk = np.ones(tiny_spec().block_shape(1), np.float32)
    path_of(bank, Role.EXP_AVG, slot).write_bytes(b"".join(encode_slot(junk, crc32c(junk))))
    shard.close()
    with_junk = Shard.open(bank)
    assert not any(array.any() for array in state_of(with_junk).values())
    with_junk.close()


def test_a_state_that_was_made_is_still_missed(shard: Shard, bank: Bank) -> None:
    shard.push(make_update(shard, [A], "r"))
    shard.consolidate()
    path_of(bank, Role.EXP_AVG, slot_of(bank)).unlink()
    shard.close()
    again = Shard.open(bank)
    with pytest.raises(CorruptionError, match="exp_avg"):
        state_of(again)
    again.close()


@pytest.mark.parametrize("num_done", [1, 2])
def test_a_removal_that_is_cut_off_leaves_the_weight(
    shard: Shard, bank: Bank, tmp_path: Path, num_done: int
) -> None:
    shard.push(make_update(shard, [A], "r"))
    shard.consolidate()
    slot = slot_of(bank)
    plan = FaultPlan(StorageFault.CRASH_AFTER, at=num_done)
    arrays = SlotArrays(FaultyObjects(UnsyncedObjects(tmp_path / "bank"), plan), bank.spec, 0)
    assert [chunk.key.split("/")[3] for chunk in arrays.stored_chunks(1)][-1] == Role.WEIGHT
    with pytest.raises(Crash):
        arrays.delete(1, slot)
    assert path_of(bank, Role.WEIGHT, slot).exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused_in_any_element_type(
    tmp_path: Path, bad: float
) -> None:
    for dtype in ("float32", "float16", "bfloat16"):
        spec = tiny_spec(dtype=dtype)
        bank = create_bank(tmp_path / dtype, spec)
        shard = Shard.open(bank)
        weight = np.zeros(spec.block_shape(1), np.float32)
        weight[-1, -1, -1, -1] = bad
        content = SetContent(ref=A, weight=weight.astype(spec.numpy_dtype))
        with pytest.raises(InvalidArgumentError) as caught:
            shard.prepare(1, [content])
        assert caught.value.reason is Reason.NOT_FINITE
        shard.close()
