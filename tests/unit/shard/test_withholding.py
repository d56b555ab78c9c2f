"""Withholding looks at no content: it must be possible whatever became of that, and at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from membank.bank_service.shard import Shard
from membank.bank_service.shard.contract import RestoreEntry, SetState
from membank.bank_service.store import Bank
from membank.wire.errors import CorruptionError
from membank.wire.format.layout import slot_key
from membank.wire.spec import BlockRef, BlockState, Role
from tiny_bank import UnsyncedObjects, create_bank, full_state, make_update, transact

A = BlockRef(1, 0)


class _Reads(UnsyncedObjects):
    """Notes the slots that are read."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.slots: list[str] = []

    def get_checked(self, key: str, num_bytes: int) -> tuple[memoryview, int]:
        self.slots.append(key)
        return super().get_checked(key, num_bytes)


@pytest.fixture
def objects(tmp_path: Path) -> _Reads:
    shard = Shard.open(create_bank(tmp_path))
    shard.push(make_update(shard, [A], "u0"))
    shard.close()
    return _Reads(tmp_path)


def test_withholding_and_restoring_read_no_content(objects: _Reads) -> None:
    bank = Bank.open(objects)
    shard = Shard.open(bank)
    for state in (BlockState.WITHHELD, BlockState.ACTIVE):
        shard.prepare(bank.latest_number() + 1, [SetState(ref=A, state=state)], dry_run=True)
        transact(shard, bank, [SetState(ref=A, state=state)])
    assert objects.slots == []
    assert full_state(shard)[A][:3] == (3, int(BlockState.ACTIVE), 1)
    assert objects.slots
    shard.close()


def test_a_block_whose_slot_is_damaged_can_be_withheld(objects: _Reads) -> None:
    key = slot_key(0, 1, Role.EXP_AVG, 0)
    data = bytearray(objects.get(key))
    data[0] ^= 1
    objects.put(key, bytes(data))
    bank = Bank.open(objects)
    shard = Shard.open(bank)
    transact(shard, bank, [SetState(ref=A, state=BlockState.WITHHELD)], all_partitions=True)
    transact(shard, bank, [RestoreEntry(ref=A, manifest=0)])
    # But nobody gives up what is there for content that is damaged.
    number = bank.named_manifest(1, 0)
    with pytest.raises(CorruptionError):
        shard.prepare(bank.latest_number() + 1, [RestoreEntry(ref=A, manifest=number)])
    shard.close()
