"""A removal whose answer is lost: done, but reported as failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import Erase
from membank.bank_service.store import Bank
from membank.wire.errors import Reason, UnavailableError
from membank.wire.spec import BlockRef, BlockState
from storage_faults import FaultPlan, FaultyObjects
from tiny_bank import UnsyncedObjects, create_bank, make_update, transact

A = BlockRef(1, 0)


class LostRemoval(FaultPlan):
    """Loses the answer to the first removal of a manifest once it is armed."""

    is_armed = False

    def run(
        self, call: Callable[[], None], *, half: Callable[[], None] | None = None, what: str
    ) -> None:
        call()
        if self.is_armed and what.startswith("delete ") and "/manifests/" in what:
            self.is_armed, self.happened = False, True
            raise UnavailableError(f"{what}: no answer", reason=Reason.STORE_FAILED)


@pytest.fixture
def plan() -> LostRemoval:
    return LostRemoval()


@pytest.fixture
def bank(tmp_path: Path, plan: LostRemoval) -> Bank:
    create_bank(tmp_path)
    return Bank.open(FaultyObjects(UnsyncedObjects(tmp_path), plan))


@pytest.fixture
def shard(bank: Bank, tmp_path: Path, plan: LostRemoval) -> Shard:
    """Return a shard that does not know that a manifest is gone."""
    config = ShardConfig(journal_dir=str(tmp_path / "journals"), retained_revisions=1)
    shard = Shard.open(bank, config=config)
    for number in range(2):
        shard.push(make_update(shard, [A], f"r{number}"))
        plan.is_armed = number == 1
        shard.consolidate()
    assert plan.happened
    return shard


def test_garbage_is_collected_all_the_same(shard: Shard) -> None:
    partition = shard.spec.partition_of(A)
    shard.collect(partition)
    assert shard.collect(partition, dry_run=True).garbage == ()


def test_a_block_is_deleted_all_the_same(bank: Bank, shard: Shard) -> None:
    transact(shard, bank, [Erase(ref=A)])
    assert shard.describe([A])[0].state is BlockState.DELETED
