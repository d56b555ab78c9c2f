"""Files that somebody put into a bank's folders do not stop it, and stay where they are."""

from __future__ import annotations

from pathlib import Path

from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete
from shard_rig import ShardRig, asked

A = BlockRef(1, 0)

STRAYS = (
    "revisions/notes",
    "revisions/0000000001.json.orig",
    "revisions/7.json",
    "trees/old.safetensors",
    "snapshots/README",
    "partitions/0000/manifests/newest",
    "partitions/0000/manifests/0000000099.bak",
    "partitions/0000/level-1/weight/c.orig",
    "partitions/0000/level-1/weight/c.0.0.0.0.0.orig",
    "partitions/0000/level-1/weight/c.-1.0.0.0.0",
    "partitions/0000/level-1/weight/c.4294967296.0.0.0.0",
)


def test_a_bank_with_strays_goes_on(tmp_path: Path) -> None:
    rig = ShardRig(tmp_path)
    for key in STRAYS:
        path = tmp_path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"a copy")
    rig.kill_shards()
    rig.open_shards()
    rig.start_coordinator()
    rig.operations.create_snapshot(asked("s"), "then")
    rig.operations.apply(asked("d"), [Delete(topic=A)])
    rig.operations.collect_garbage(asked("g"), keep_revisions=1)
    assert [snapshot.name for snapshot in rig.operations.list_snapshots()] == ["then"]
    assert rig.status(A).state is BlockState.DELETED
    rig.close()
    assert all((tmp_path / key).read_bytes() == b"a copy" for key in STRAYS)
