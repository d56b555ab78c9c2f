"""Readers whose block is deleted in the midst of their call."""

from __future__ import annotations

from pathlib import Path

from membank.bank_service.shard import Shard
from membank.bank_service.shard.content import BlockRecord, Content
from membank.bank_service.shard.contract import Erase
from membank.bank_service.store import Bank
from membank.wire.spec import BlockRef, BlockState
from tiny_bank import create_bank, make_update, transact

A = BlockRef(1, 0)


def test_a_block_that_is_deleted_as_soon_as_it_was_loaded_is_read_as_it_was(
    tmp_path: Path,
) -> None:
    shard = Shard.open(create_bank(tmp_path))
    shard.push(make_update(shard, [A], "u0"))
    (before,) = shard.read([A])
    shard.close()
    bank = Bank.open(str(tmp_path))
    shard = Shard.open(bank)
    partition = shard._partitions[shard.spec.partition_of(A)]
    keep = partition.keep

    def keep_and_delete(ref: BlockRef, record: BlockRecord, content: Content) -> None:
        keep(ref, record, content)
        transact(shard, bank, [Erase(ref=A)])

    partition.keep = keep_and_delete  # type: ignore[method-assign]  # a removal at the worst moment
    (content,) = shard.read([A])
    assert content.weight.tobytes() == before.weight.tobytes()
    assert shard.describe([A])[0].state is BlockState.DELETED
    shard.close()
