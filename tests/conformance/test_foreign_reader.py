"""docs/format.md is enough to read a bank: a reader written from it alone finds what a shard does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from foreign_reader import ForeignBlock, Ref, read_bank
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import Erase, SetContent, SetState
from membank.wire.spec import BlockRef, BlockState, OptimizerKind
from tiny_bank import State, create_bank, full_state, make_update, tiny_spec, transact

A, B, C, LEAF = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2), BlockRef(2, 5)


def _as_foreign(state: State) -> dict[Ref, ForeignBlock]:
    return {
        (ref.level, ref.cluster): ForeignBlock(
            version, block_state, step, {role.value: data for role, data in arrays.items()}
        )
        for ref, (version, block_state, step, arrays) in state.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_a_foreign_reader_agrees(tmp_path: Path, dtype: str, kind: OptimizerKind) -> None:
    bank = create_bank(tmp_path, tiny_spec(dtype=dtype, optimizer=kind))
    assert read_bank(tmp_path)[2, 5].version == 0
    shard = Shard.open(bank)
    shard.push(make_update(shard, [A, B, LEAF], "u0"))
    transact(shard, bank, [], all_partitions=True)
    pinned = full_state(shard)
    shard.push(make_update(shard, [A, B], "u1"))
    weight = np.ones(bank.spec.block_shape(1)).astype(bank.spec.numpy_dtype)
    transact(shard, bank, [SetContent(ref=C, weight=weight), Erase(ref=LEAF)])
    transact(shard, bank, [SetState(ref=BlockRef(2, 0), state=BlockState.WITHHELD)])
    # Prepared but undecided: no reader may take it for the truth.
    shard.prepare(4, [Erase(ref=A)])
    now = full_state(shard)
    shard.close()
    assert read_bank(tmp_path) == _as_foreign(now)
    del pinned[LEAF]  # what was deleted is gone from every revision
    then = read_bank(tmp_path, revision=1)
    assert then.pop((2, 5)).state == BlockState.DELETED
    assert then == _as_foreign(pinned)


def test_a_foreign_reader_agrees_on_a_journal_that_was_written_over(tmp_path: Path) -> None:
    bank = create_bank(tmp_path, tiny_spec(num_partitions=1))
    # Images, which a reader need not compute.
    shard = Shard.open(bank, config=ShardConfig(ship_every_s=1e9))
    for life in range(3):
        for number in range(6 - life):
            shard.push(make_update(shard, [A, B], f"{life}.{number}"))
        shard.consolidate()
    shard.push(make_update(shard, [A], "last"))
    (path,) = (tmp_path / "partitions/0000/journal").glob("*.log")
    assert b'"life":' in path.read_bytes()[:300]
    # As a process that is killed leaves it.
    assert read_bank(tmp_path) == _as_foreign(full_state(shard))
    shard.close()
