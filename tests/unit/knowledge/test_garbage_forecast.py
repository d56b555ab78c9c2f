"""What a dry run of a collection says, and what the collection then does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from membank.wire.records import GarbageReport
from membank.wire.spec import BlockRef
from membank.wire.steps import Swap
from shard_rig import ShardRig, asked

A = BlockRef(1, 0)


def _keys(report: GarbageReport) -> set[str]:
    return {key for garbage in report.garbage for key in garbage.keys}


@pytest.mark.parametrize(
    ("keep_revisions", "is_dirty"), [(1, False), (1, True), (2, False), (3, False)]
)
def test_a_dry_run_says_what_giving_history_up_removes(
    tmp_path: Path, keep_revisions: int, is_dirty: bool
) -> None:
    rig = ShardRig(tmp_path)
    for number in range(4):
        weight = np.full(rig.spec.block_shape(1), number + 0.5, np.float32)
        rig.operations.apply(asked(f"r{number}"), [Swap(ref=A, weight=weight)])
    if is_dirty:
        # Since the last consolidation: the collection folds it into a fresh slot.
        rig.push(A, "p")
    before = set(rig.objects.list(""))
    dry = rig.operations.collect_garbage(asked("", dry_run=True), keep_revisions=keep_revisions)
    wet = rig.operations.collect_garbage(asked("g"), keep_revisions=keep_revisions)
    rig.close()
    assert dry.history_from == wet.history_from
    # The consolidation in between may have made something that goes at once.
    assert _keys(dry) == _keys(wet) & before
