"""Content that was written for a block and never counted goes when the block is deleted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import Erase, SetContent
from membank.bank_service.store import Bank
from membank.wire.spec import BlockRef
from storage_faults import Crash, FaultPlan, FaultyObjects
from tiny_bank import UnsyncedObjects, create_bank, file_bytes, make_update, tiny_spec, transact

A = BlockRef(1, 0)
MARKER = np.float32(1.2345678)
SECRET = SetContent(ref=A, weight=np.full(tiny_spec().block_shape(1), MARKER, np.float32))


class DeathBeforeManifest(FaultPlan):
    """Kills the process before it publishes a manifest, once it is armed."""

    is_armed = False

    def run(
        self, call: Callable[[], None], *, half: Callable[[], None] | None = None, what: str
    ) -> None:
        self.is_dead |= self.is_armed and what.startswith("create ") and "/manifests/" in what
        super().run(call, half=half, what=what)


def _open(root: Path, plan: FaultPlan) -> tuple[Bank, Shard]:
    bank = Bank.open(FaultyObjects(UnsyncedObjects(root), plan))
    return bank, Shard.open(bank, config=ShardConfig(journal_dir=str(root / "journals")))


def _holding_marker(root: Path) -> list[str]:
    return [name for name, data in file_bytes(root).items() if MARKER.tobytes() * 4 in data]


@pytest.mark.parametrize("was_written", [True, False])
def test_what_a_dead_writer_left_goes_with_the_block(tmp_path: Path, was_written: bool) -> None:
    create_bank(tmp_path)
    plan = DeathBeforeManifest()
    bank, shard = _open(tmp_path, plan)
    if was_written:
        shard.push(make_update(shard, [A], "r0"))
        shard.consolidate()
    plan.is_armed = True
    with pytest.raises(Crash):
        shard.prepare(1, [SECRET])
    shard.close(consolidate=False)
    # The test finds what it looks for.
    if len(_holding_marker(tmp_path)) != 1:
        pytest.fail("the dead writer should have left a slot")

    bank, shard = _open(tmp_path, FaultPlan())
    transact(shard, bank, [Erase(ref=A)])
    shard.close()
    assert _holding_marker(tmp_path) == []
