"""Diffs: what changed since an earlier state, and only where that state is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from membank.wire.errors import ConflictError, MembankError, Reason
from membank.wire.format.pack import decode_pack, encode_pack
from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete, Restore, Withhold
from shard_rig import RIG_SPEC, ShardRig, asked

TOPIC, LEAF, QUIET = BlockRef(1, 1), BlockRef(2, 2), BlockRef(2, 3)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    """A bank with a snapshot `then`, and two blocks of the topic that changed since."""
    rig = ShardRig(tmp_path / "bank")
    rig.push(TOPIC, "a")
    rig.operations.create_snapshot(asked("s"), "then")
    rig.push(TOPIC, "b")
    rig.push(LEAF, "c")
    yield rig
    rig.close()


@pytest.fixture
def other(rig: ShardRig, tmp_path: Path) -> Iterator[ShardRig]:
    """Another bank of the same anchor, which holds what the first held at the snapshot."""
    spec = dataclasses.replace(RIG_SPEC, name="second", num_partitions=2)
    other = ShardRig(tmp_path / "other", spec=spec)
    present = rig.export(TOPIC)
    rig.operations.rollback(asked("back"), "then", TOPIC)
    other.operations.import_topic(asked("i"), rig.export(TOPIC))
    rig.operations.import_topic(asked("forth"), present)
    yield other
    other.close()


def contents(rig: ShardRig, topic: BlockRef = TOPIC) -> list[tuple[int, list[bytes]]]:
    """Return step, weight and optimizer state of the blocks of a topic."""
    return [
        (block.step, [a.tobytes() for a in (block.weight, *block.optimizer_state.values())])
        for ref in rig.spec.subtree(topic)
        for block in rig.owner(ref).read([ref])
    ]


def test_a_diff_holds_what_changed_and_says_of_what(rig: ShardRig) -> None:
    full, diff = decode_pack(rig.export(TOPIC)), decode_pack(rig.export(TOPIC, since="then"))
    assert [block.ref for block in diff.blocks] == [TOPIC, LEAF]
    assert diff.base is not None
    assert (diff.base.revision, diff.base.snapshot) == (1, "then")
    assert list(diff.base.unchanged) == [QUIET]
    assert [block.base and block.base.version for block in diff.blocks] == [1, 0]
    assert diff.labels == full.labels
    assert len(rig.export(TOPIC, since="then")) < len(rig.export(TOPIC))


def test_a_diff_leads_to_what_the_full_pack_leads_to(rig: ShardRig, other: ShardRig) -> None:
    assert contents(other) != contents(rig)
    report, _ = other.operations.import_topic(asked("d"), rig.export(TOPIC, since="then"))
    assert {change.ref for change in report.changes} == {TOPIC, LEAF}
    assert contents(other) == contents(rig)
    # Once more: it holds what the diff leads to.
    other.operations.import_topic(asked("again"), rig.export(TOPIC, since="then"))
    assert contents(other) == contents(rig)


def test_a_diff_against_the_end_of_a_revision(rig: ShardRig) -> None:
    # What was pushed during revision 1 is part of its end, once the next one has folded it.
    rig.operations.apply(asked("w"), [Withhold(topic=LEAF)])
    rig.operations.apply(asked("r"), [Restore(topic=LEAF)])
    rig.push(QUIET, "d")
    diff = decode_pack(rig.export(TOPIC, since=1))
    assert QUIET in {block.ref for block in diff.blocks}
    # Withheld and restored: another version, the same content.
    assert diff.base is not None
    assert LEAF in diff.base.unchanged


@pytest.mark.parametrize("changed", [TOPIC, LEAF, QUIET])
def test_a_bank_that_holds_something_else_refuses_a_diff(
    rig: ShardRig, other: ShardRig, changed: BlockRef
) -> None:
    other.push(changed, "elsewhere", value=3.0)
    before = other.state()
    diff = rig.export(TOPIC, since="then")
    with pytest.raises(ConflictError, match=str(changed)) as caught:
        other.operations.import_topic(asked("d"), diff)
    assert caught.value.reason is Reason.BASE_MISMATCH
    assert other.state() == before
    other.operations.import_topic(asked("f"), diff, force=True)
    same = contents(other) == contents(rig)
    # What the diff does not carry stays as it was.
    assert same is (changed != QUIET)
    assert other.log.committed.detail["forced"] is True


def test_a_diff_moves_like_any_pack(rig: ShardRig, other: ShardRig) -> None:
    there = BlockRef(1, 3)
    full = decode_pack(rig.export(TOPIC))
    other.operations.import_topic(asked("i1"), _at_base(rig), topic=there)
    other.operations.import_topic(asked("i2"), rig.export(TOPIC, since="then"), topic=there)
    assert contents(other, there) == contents(rig)
    assert full.topic == TOPIC


def _at_base(rig: ShardRig) -> bytes:
    present = rig.export(TOPIC)
    rig.operations.rollback(asked("back2"), "then", TOPIC)
    data = rig.export(TOPIC)
    rig.operations.import_topic(asked("forth2"), present)
    return data


def test_what_was_deleted_at_the_base_must_be_deleted_where_it_goes(rig: ShardRig) -> None:
    whole = rig.export(TOPIC)
    rig.operations.apply(asked("x"), [Delete(topic=LEAF)])
    rig.operations.create_snapshot(asked("s2"), "without")
    leaf_alone = dataclasses.replace(
        decode_pack(whole),
        blocks=tuple(b for b in decode_pack(whole).blocks if b.ref == LEAF),
    )
    rig.operations.import_topic(asked("y"), encode_pack(leaf_alone))
    diff = decode_pack(rig.export(TOPIC, since="without"))
    assert [(block.ref, block.base) for block in diff.blocks] == [(LEAF, None)]
    rig.push(LEAF, "z")
    with pytest.raises(ConflictError):
        rig.operations.import_topic(asked("n"), encode_pack(diff))
    rig.operations.apply(asked("x2"), [Delete(topic=LEAF)])
    rig.operations.import_topic(asked("ok"), encode_pack(diff))
    assert rig.status(LEAF).state is BlockState.ACTIVE


def test_weights_alone_are_compared_alone(rig: ShardRig) -> None:
    diff = decode_pack(rig.export(TOPIC, since="then", weights_only=True))
    assert [block.ref for block in diff.blocks] == [TOPIC, LEAF]
    assert not any(block.optimizer_state for block in diff.blocks)


def test_a_diff_against_nothing_is_refused(rig: ShardRig) -> None:
    for since, reason in (("never", Reason.UNKNOWN_SNAPSHOT), (99, Reason.UNKNOWN_REVISION)):
        with pytest.raises(MembankError) as caught:
            rig.export(TOPIC, since=since)
        assert caught.value.reason is reason
