"""Journals that another machine may have to replay hold results, not gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.store import Bank, LocalJournal
from membank.bank_service.store.journal import FrameKind, ObjectJournal
from membank.wire.errors import CorruptionError, Reason
from membank.wire.spec import BlockRef, OptimizerKind
from tiny_bank import create_bank, full_state, make_update, tiny_spec

A, C, LEAF = BlockRef(1, 0), BlockRef(1, 2), BlockRef(2, 5)


def _with_other_kernels(bank: Bank) -> Bank:
    """Return `bank` as a machine sees it whose kernels compute something else."""
    levels = tuple(replace(level, learning_rate=0.5) for level in bank.spec.levels)
    return Bank(bank.objects, replace(bank.spec, levels=levels))


@pytest.mark.parametrize("optimizer", list(OptimizerKind))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "settings",
    [{"durability": Durability.STORE}, {"ship_every_s": 1.0}],
    ids=["store", "shipped"],
)
def test_other_kernels_replay_the_same_bits(
    tmp_path: Path, optimizer: OptimizerKind, dtype: str, settings: dict[str, object]
) -> None:
    bank = create_bank(tmp_path / "bank", tiny_spec(optimizer=optimizer, dtype=dtype))
    config = ShardConfig(journal_dir=str(tmp_path / "j"), **settings)  # type: ignore[arg-type]
    shard = Shard.open(bank, config=config)
    for number in range(3):
        shard.push(make_update(shard, [A, C, LEAF], f"u{number}"))
    state = full_state(shard)
    shard.close(consolidate=False)
    again = Shard.open(_with_other_kernels(bank), config=config)
    assert full_state(again) == state
    assert again.push(make_update(again, [A, C, LEAF], "u2", bases={A: 2, C: 2, LEAF: 2})).duplicate
    again.close()


def test_gradients_are_not_replayed_by_other_kernels(tmp_path: Path) -> None:
    bank = create_bank(tmp_path / "bank")
    shard = Shard.open(bank)
    shard.push(make_update(shard, [A], "u0"))
    shard.close(consolidate=False)
    with pytest.raises(CorruptionError) as caught:
        Shard.open(_with_other_kernels(bank))
    assert caught.value.reason is Reason.REPLAY_MISMATCH


def test_what_each_level_writes(tmp_path: Path) -> None:
    bank = create_bank(tmp_path / "bank", tiny_spec(num_partitions=1))
    config = ShardConfig(journal_dir=str(tmp_path / "j"))
    shard = Shard.open(bank, config=config)
    shard.push(make_update(shard, [A], "u0"))
    shard.close(consolidate=False)
    identity = f"{bank.spec.bank_id}/0"
    folder = tmp_path / "j" / bank.spec.bank_id / "0000"
    local = LocalJournal.open(folder, identity)
    assert [frame.kind for frame in local.replay(0)] == [FrameKind.UPDATE]
    local.close()
    config = ShardConfig(journal_dir=str(tmp_path / "j"), durability=Durability.STORE)
    shard = Shard.open(bank, config=config)
    shard.push(make_update(shard, [A], "u1"))
    shard.close(consolidate=False)
    stored = ObjectJournal.open(bank.objects, 0, identity)
    frames = list(stored.replay(0))
    assert [frame.kind for frame in frames] == [FrameKind.IMAGE]
    spec = bank.spec
    assert len(frames[0].payload) > spec.weight_bytes(1) + spec.optimizer_bytes(1)


def test_what_is_shipped_is_all_that_another_machine_knows(tmp_path: Path) -> None:
    bank = create_bank(tmp_path / "bank")
    one = Shard.open(
        bank, config=ShardConfig(journal_dir=str(tmp_path / "one"), ship_every_s=60, lease_s=0)
    )
    one.push(make_update(one, [A, C], "u0"))
    for partition in one._partitions.values():
        partition.ship()  # what the maintenance does every minute
    shipped = full_state(one)
    one.push(make_update(one, [A], "u1"))
    one.close(consolidate=False)
    two = Shard.open(
        bank, config=ShardConfig(journal_dir=str(tmp_path / "two"), ship_every_s=60, lease_s=0)
    )
    assert full_state(two) == shipped
    two.push(make_update(two, [LEAF], "u2"))
    state = full_state(two)
    two.close(consolidate=False)
    again = Shard.open(
        bank, config=ShardConfig(journal_dir=str(tmp_path / "two"), ship_every_s=60, lease_s=0)
    )
    assert full_state(again) == state
    again.close()
