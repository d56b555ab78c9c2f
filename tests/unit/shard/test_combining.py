"""Content that a transaction computes on the shard: which numbers, which version, which state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import Combine, Erase, SetContent, SetState
from membank.bank_service.store import Bank
from membank.wire.errors import (
    ConflictError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
)
from membank.wire.format import initial_weight
from membank.wire.spec import Array, BlockRef, BlockState
from tiny_bank import create_bank, full_state, make_update, tiny_spec, transact

A, B = BlockRef(1, 0), BlockRef(1, 1)


@pytest.fixture(params=["float32", "bfloat16", "float16"])
def bank(tmp_path: Path, request: pytest.FixtureRequest) -> Bank:
    return create_bank(tmp_path / "bank", spec=replace(tiny_spec(), dtype=request.param))


@pytest.fixture
def shard(bank: Bank) -> Iterator[Shard]:
    shard = Shard.open(bank, config=ShardConfig(hold_wait_s=0), clock=lambda: 0.0)
    yield shard
    shard.close()


def drawn(bank: Bank, seed: int, scale: float = 1.0) -> Array:
    shape = bank.spec.block_shape(1)
    values = scale * np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values.astype(bank.spec.numpy_dtype)


def content(shard: Shard, ref: BlockRef = A) -> Array:
    (found,) = shard.read([ref])
    return found.weight


@pytest.mark.parametrize(("keep", "add"), [(0.7, 0.3), (-1.5, 0.1), (1.0, 1.0), (1 / 3, 2 / 3)])
def test_a_blend_is_computed_in_float32_and_rounded_once(
    bank: Bank, shard: Shard, keep: float, add: float
) -> None:
    own, other = drawn(bank, 1), drawn(bank, 2)
    transact(shard, bank, [SetContent(ref=A, weight=own)])
    transact(shard, bank, [Combine(ref=A, keep=keep, other=other, add=add, expected_version=1)])
    expected = np.float32(keep) * own.astype(np.float32) + np.float32(add) * other.astype(
        np.float32
    )
    assert content(shard).tobytes() == expected.astype(own.dtype).tobytes()


def test_a_copy_has_the_same_bits_and_zeroes_have_none(bank: Bank, shard: Shard) -> None:
    other = drawn(bank, 2)
    other.flat[:3] = -0.0
    transact(shard, bank, [Combine(ref=A, keep=0, other=other, add=1)])
    assert content(shard).tobytes() == other.tobytes()
    transact(shard, bank, [Combine(ref=A, keep=0)])
    assert not np.any(content(shard).view(np.uint8))


def test_a_block_that_was_never_written_is_scaled_from_its_seed(bank: Bank, shard: Shard) -> None:
    transact(shard, bank, [Combine(ref=A, keep=-2)])
    expected = -2 * initial_weight(bank.spec, A).astype(np.float32)
    np.testing.assert_array_equal(content(shard).astype(np.float32), expected)


def test_own_content_is_that_of_the_moment_and_the_optimizer_starts_afresh(
    bank: Bank, shard: Shard
) -> None:
    for number in range(3):
        shard.push(make_update(shard, [A], f"r{number}"))
    trained = content(shard).astype(np.float32)
    prepared = transact(shard, bank, [Combine(ref=A, keep=0.5)])
    (change,) = prepared.changes
    assert (change.version_before, change.version_after) == (3, 4)
    (found,) = shard.read([A])
    assert (found.version, found.step) == (4, 0)
    assert (
        found.weight.tobytes() == (trained * np.float32(0.5)).astype(found.weight.dtype).tobytes()
    )
    assert not any(array.any() for array in found.optimizer_state.values())


def test_it_survives_a_restart(bank: Bank, shard: Shard) -> None:
    transact(shard, bank, [Combine(ref=A, keep=2, other=drawn(bank, 1), add=1)])
    before = full_state(shard)
    shard.close(consolidate=False)
    again = Shard.open(bank, config=ShardConfig(hold_wait_s=0), clock=lambda: 0.0)
    assert full_state(again) == before
    again.close()


def test_a_withheld_block_stays_withheld(bank: Bank, shard: Shard) -> None:
    transact(shard, bank, [SetState(ref=A, state=BlockState.WITHHELD)])
    prepared = transact(shard, bank, [Combine(ref=A, keep=0, other=drawn(bank, 1), add=1)])
    assert prepared.changes[0].state_after is BlockState.WITHHELD
    assert shard.fetch([A]).blocks[0].weight is None
    transact(shard, bank, [SetState(ref=A, state=BlockState.ACTIVE)])
    assert content(shard).tobytes() == drawn(bank, 1).tobytes()


def test_a_deleted_block_has_nothing_to_keep_and_is_created_anew(bank: Bank, shard: Shard) -> None:
    transact(shard, bank, [Erase(ref=A)])
    before = full_state(shard)
    with pytest.raises(FailedPreconditionError) as caught:
        transact(shard, bank, [Combine(ref=A, keep=0.5, other=drawn(bank, 1), add=0.5)])
    assert caught.value.reason is Reason.BLOCK_DELETED
    assert full_state(shard) == before
    transact(shard, bank, [Combine(ref=A, keep=0, other=drawn(bank, 1), add=1)])
    assert content(shard).tobytes() == drawn(bank, 1).tobytes()
    assert shard.describe([A])[0].state is BlockState.ACTIVE


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_not_finite_is_refused(bank: Bank, shard: Shard, dry_run: bool) -> None:
    transact(shard, bank, [SetContent(ref=A, weight=drawn(bank, 1))])
    before = full_state(shard)
    # Not finite in float16; in the others not either, if it is near what float32 has.
    operation = Combine(ref=A, keep=3e38)
    with pytest.raises(InvalidArgumentError) as caught:
        shard.prepare(shard.revision + 1, [SetState(ref=B, state=BlockState.WITHHELD), operation],
                      dry_run=dry_run)  # fmt: skip
    assert caught.value.reason is Reason.NOT_FINITE
    assert full_state(shard) == before


@pytest.mark.parametrize(
    "operation",
    [
        Combine(ref=A, keep=0, expected_version=4),
        SetState(ref=A, state=BlockState.WITHHELD, expected_version=4),
        SetState(ref=A, state=BlockState.ACTIVE, expected_version=4),
        Erase(ref=A, expected_version=4),
    ],
)
def test_versions_are_compared(
    bank: Bank, shard: Shard, operation: Combine | SetState | Erase
) -> None:
    before = full_state(shard)
    with pytest.raises(ConflictError) as caught:
        transact(shard, bank, [Combine(ref=B, keep=0), operation])
    assert caught.value.reason is Reason.VERSION_MISMATCH
    assert full_state(shard) == before


def test_what_does_not_fit_is_refused(bank: Bank, shard: Shard) -> None:
    wrong = np.zeros(3, bank.spec.numpy_dtype)
    with pytest.raises(InvalidArgumentError) as caught:
        transact(shard, bank, [Combine(ref=A, keep=1, other=wrong, add=1)])
    assert caught.value.reason is Reason.BAD_SHAPE
