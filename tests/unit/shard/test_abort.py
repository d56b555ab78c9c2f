"""Giving a transaction up: what is dropped cannot be committed, whoever says so and however late."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import Erase, SetContent, SetState
from membank.bank_service.store import Bank
from membank.wire.errors import ConflictError, Reason, ResourceExhaustedError, UnavailableError
from membank.wire.spec import Array, BlockRef, BlockState
from storage_faults import FaultPlan, FaultyObjects, StorageFault
from tiny_bank import (
    UnsyncedObjects,
    commit_record,
    create_bank,
    full_state,
    make_update,
    tiny_spec,
    transact,
)

# Both lie in partition 0.
A, C = BlockRef(1, 0), BlockRef(1, 2)


@pytest.fixture
def plan() -> FaultPlan:
    return FaultPlan(StorageFault.NO_SPACE)


@pytest.fixture
def bank(tmp_path: Path, plan: FaultPlan) -> Bank:
    create_bank(tmp_path / "bank")
    return Bank.open(FaultyObjects(UnsyncedObjects(tmp_path / "bank"), plan))


@pytest.fixture
def config(tmp_path: Path) -> ShardConfig:
    return ShardConfig(hold_wait_s=0, lease_s=0, journal_dir=str(tmp_path / "journals"))


@pytest.fixture
def shard(bank: Bank, config: ShardConfig) -> Iterator[Shard]:
    shard = Shard.open(bank, config=config)
    shard.push(make_update(shard, [A], "u0"))
    yield shard
    shard.close(consolidate=False)


def _nines() -> Array:
    return np.full(tiny_spec().block_shape(1), 9, np.float32)


def test_what_a_late_abort_takes_away_cannot_be_committed(
    shard: Shard, bank: Bank, config: ShardConfig
) -> None:
    before = full_state(shard)
    prepared = shard.prepare(1, [SetContent(ref=A, weight=_nines())])
    # Sent by a coordinator that is gone; the one that prepared this is about to commit it.
    shard.abort(1)
    with pytest.raises(ConflictError) as caught:
        bank.decide(commit_record(bank, 1, prepared))
    assert caught.value.reason is Reason.TRANSACTION_CONFLICT
    assert full_state(shard) == before
    transact(shard, bank, [SetState(ref=C, state=BlockState.WITHHELD)])
    shard.close(consolidate=False)
    again = Shard.open(bank, config=config)
    assert full_state(again)[A] == before[A]
    again.close()


def test_an_abort_that_comes_after_the_commit_follows_it(shard: Shard, bank: Bank) -> None:
    prepared = shard.prepare(1, [SetContent(ref=A, weight=_nines())])
    bank.decide(commit_record(bank, 1, prepared))
    shard.abort(1)
    np.testing.assert_array_equal(shard.fetch([A]).blocks[0].weight, _nines())


def test_where_nothing_is_prepared_nothing_is_put_on_record(shard: Shard, bank: Bank) -> None:
    shard.prepare(1, [Erase(ref=A)], dry_run=True)
    with pytest.raises(ConflictError):
        shard.prepare(1, [SetContent(ref=C, weight=_nines(), expected_version=7)])
    shard.abort(1)
    assert bank.latest_number() == 0
    transact(shard, bank, [Erase(ref=A)])


def test_what_cannot_be_given_up_on_record_is_kept(
    shard: Shard, bank: Bank, plan: FaultPlan
) -> None:
    prepared = shard.prepare(1, [SetContent(ref=A, weight=_nines())])
    plan.at = plan.num_calls + 1
    with pytest.raises(ResourceExhaustedError):
        shard.abort(1)
    with pytest.raises(UnavailableError) as caught:
        shard.push(make_update(shard, [A], "held"))
    assert caught.value.reason is Reason.TRANSACTION_IN_PROGRESS
    shard.commit(bank.decide(commit_record(bank, 1, prepared)))
    np.testing.assert_array_equal(shard.fetch([A]).blocks[0].weight, _nines())
