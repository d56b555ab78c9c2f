"""What an opening asks the storage for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from membank.bank_service.shard import Shard
from membank.bank_service.shard.contract import SetState
from membank.wire.errors import MembankError
from membank.wire.spec import BlockRef, BlockState
from storage_faults import FaultPlan, FaultyObjects, StorageFault
from tiny_bank import UnsyncedObjects, create_bank, transact

A = BlockRef(1, 0)
"""In partition 0."""
NUM_REVISIONS = 40


class _Counting(UnsyncedObjects):
    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.records_read: set[str] = set()

    def get(self, key: str) -> bytes:
        if key.startswith("revisions/"):
            self.records_read.add(key)
        return super().get(key)


def test_a_partition_that_no_commit_names_is_opened_without_the_whole_chain(
    tmp_path: Path,
) -> None:
    bank = create_bank(tmp_path)
    shard = Shard.open(bank, partitions=[0])
    for number in range(NUM_REVISIONS):
        state = BlockState.ACTIVE if number % 2 else BlockState.WITHHELD
        transact(shard, bank, [SetState(ref=A, state=state)])
    shard.close()
    # The first owner finds out what was committed, and its manifest says so.
    Shard.open(UnsyncedObjects(tmp_path), partitions=[1]).close()
    objects = _Counting(tmp_path)
    Shard.open(objects, partitions=[1]).close()
    # What settings ask to keep, the creation, and the newest.
    assert len(objects.records_read) < NUM_REVISIONS // 2


def _open_logs(root: Path) -> list[str]:
    handles = Path("/proc/self/fd")
    targets = [os.readlink(handle) for handle in handles.iterdir() if handle.is_symlink()]
    return [target for target in targets if target.startswith(str(root)) and ".log" in target]


@pytest.mark.parametrize("fault", [StorageFault.NO_SPACE, StorageFault.LOST_RESPONSE])
def test_an_opening_that_fails_leaves_no_handle(tmp_path: Path, fault: StorageFault) -> None:
    create_bank(tmp_path)
    plan = FaultPlan(fault)
    for at in range(1, 30):
        plan.at = plan.num_calls + at
        try:
            Shard.open(FaultyObjects(UnsyncedObjects(tmp_path), plan)).close()
        except MembankError:
            assert _open_logs(tmp_path) == []
    assert plan.happened
