"""A block that had never been written when it was pinned, and was deleted since."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard.contract import SetContent
from membank.wire.spec import BlockRef, BlockState
from shard_rig import ShardRig, asked

A = BlockRef(1, 0)


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="no manifest of the snapshot names the block, so nothing there says that it was deleted; "
    "a rollback leaves it alone, a reader gets its initial content. Once mended, take the exception "
    "out of `shown_by` in the model of random programs",
)
def test_it_stays_deleted_for_readers_when_it_is_created_anew(tmp_path: Path) -> None:
    rig = ShardRig(tmp_path)
    rig.operations.create_snapshot(asked("s"), "then")
    rig.operations.delete_topic(asked("d"), A)
    weight = np.full(rig.spec.block_shape(A.level), 9.0, np.float32)
    rig.operations.swap_blocks(asked("w"), [SetContent(ref=A, weight=weight)])
    (block,) = rig.owner(A).fetch([A], snapshot="then").blocks
    rig.close()
    assert block.header.state is BlockState.DELETED
    assert block.weight is None
