"""A block that had never been written when it was pinned, and was deleted since."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete, Swap
from shard_rig import ShardRig, asked

A = BlockRef(1, 0)


@pytest.fixture
def rig(tmp_path: Path) -> ShardRig:
    rig = ShardRig(tmp_path)
    rig.operations.create_snapshot(asked("s"), "then")
    rig.operations.apply(asked("d"), [Delete(topic=A)])
    weight = np.full(rig.spec.block_shape(A.level), 9.0, np.float32)
    rig.operations.apply(asked("w"), [Swap(ref=A, weight=weight)])
    return rig


@pytest.mark.parametrize("is_reopened", [False, True])
def test_it_stays_deleted_for_readers_when_it_is_created_anew(
    rig: ShardRig, is_reopened: bool
) -> None:
    if is_reopened:
        rig.kill_shards()
        rig.open_shards()
    (block,) = rig.owner(A).fetch([A], snapshot="then").blocks
    rig.close()
    assert block.header.state is BlockState.DELETED
    assert block.weight is None


@pytest.mark.parametrize("target", ["then", 0])
def test_a_rollback_leaves_it_as_it_was_created_anew(rig: ShardRig, target: str | int) -> None:
    before = rig.status(A)
    rig.operations.rollback(asked("r"), target, A)
    assert rig.status(A) == before
    rig.close()
