"""Operations over two shards in one process: what changes, what does not, who is told no."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.knowledge import ShardGroup, TreeStore
from membank.bank_service.knowledge.topics import TopicCatalog
from membank.wire.errors import (
    AlreadyExistsError,
    ConflictError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format import TreeDocument, decode_tree
from membank.wire.spec import Array, BlockRef, BlockState
from membank.wire.steps import Delete, Restore, Swap, Withhold
from shard_rig import RIG_SPEC, ShardRig, asked

TOPIC, OTHER = BlockRef(1, 1), BlockRef(1, 2)
UNDER = (BlockRef(2, 2), BlockRef(2, 3))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank")
    yield rig
    rig.close()


def filled(ref: BlockRef, value: float) -> Array:
    return np.full(RIG_SPEC.block_shape(ref.level), value, np.float32)


def test_swap_replaces_blocks_of_both_shards_at_one_revision(rig: ShardRig) -> None:
    contents = [
        Swap(ref=TOPIC, weight=filled(TOPIC, 1.0), expected_version=0),
        Swap(ref=OTHER, weight=filled(OTHER, 2.0)),
    ]
    report = rig.operations.apply(asked("r1"), contents).report
    assert report.revision == 1
    assert [(c.ref, c.version_before, c.version_after) for c in report.changes] == [
        (TOPIC, 0, 1),
        (OTHER, 0, 1),
    ]
    assert {shard.revision for shard in rig.shards.values()} == {1}
    np.testing.assert_array_equal(rig.weight(TOPIC), filled(TOPIC, 1.0))
    np.testing.assert_array_equal(rig.weight(OTHER), filled(OTHER, 2.0))


def test_one_wrong_version_keeps_every_block_as_it_was(rig: ShardRig) -> None:
    rig.push(OTHER, "p1")
    before = rig.state()
    contents = [
        Swap(ref=TOPIC, weight=filled(TOPIC, 1.0), expected_version=0),
        Swap(ref=OTHER, weight=filled(OTHER, 2.0), expected_version=0),
    ]
    with pytest.raises(ConflictError) as caught:
        rig.operations.apply(asked("r1"), contents)
    assert caught.value.reason is Reason.VERSION_MISMATCH
    assert rig.state() == before
    # Nothing is held back either.
    assert rig.push(TOPIC, "p2").results[0].accepted


def test_a_block_named_twice_is_refused(rig: ShardRig) -> None:
    content = Swap(ref=TOPIC, weight=filled(TOPIC, 1.0))
    with pytest.raises(InvalidArgumentError):
        rig.operations.apply(asked("r1"), [content, content])


def test_retry_returns_the_first_answer_and_changes_nothing(rig: ShardRig) -> None:
    first = rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)]).report
    state = rig.state()
    assert rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)]).report == first
    rig.start_coordinator()
    assert rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)]).report == first
    assert rig.state() == state
    assert rig.log.last == 1


def test_request_id_of_somebody_else_is_refused(rig: ShardRig) -> None:
    rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)])
    with pytest.raises(ConflictError):
        rig.operations.apply(asked("r1", principal="mallory"), [Withhold(topic=TOPIC)])


def test_request_id_of_another_operation_is_refused(rig: ShardRig) -> None:
    rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)])
    with pytest.raises(InvalidArgumentError):
        rig.operations.apply(asked("r1"), [Delete(topic=TOPIC)])
    assert rig.status(TOPIC).state is BlockState.WITHHELD


def test_dry_run_reports_and_changes_nothing(rig: ShardRig) -> None:
    before = rig.state()
    report = rig.operations.apply(asked("", dry_run=True), [Delete(topic=TOPIC)]).report
    assert report.dry_run
    assert report.revision == 0
    assert {change.ref for change in report.changes} == {TOPIC, *UNDER}
    assert all(change.state_after is BlockState.DELETED for change in report.changes)
    assert rig.state() == before
    assert rig.log.last == 0


def test_withhold_hides_a_topic_and_restore_brings_it_back(rig: ShardRig) -> None:
    rig.push(TOPIC, "p1")
    content = rig.weight(TOPIC)
    rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)])
    assert rig.weight(TOPIC) is None
    assert rig.log.committed.removal_revision == 1
    assert rig.status(UNDER[0]).state is BlockState.WITHHELD
    rig.operations.apply(asked("r2"), [Restore(topic=TOPIC)])
    np.testing.assert_array_equal(rig.weight(TOPIC), content)
    assert rig.log.committed.removal_revision == 1


def test_delete_scrubs_the_tree_and_destroys_the_documents_before(rig: ShardRig) -> None:
    rig.push(TOPIC, "p1")
    rig.operations.apply(asked("r1"), [Delete(topic=TOPIC)])
    assert {rig.status(ref).state for ref in (TOPIC, *UNDER)} == {BlockState.DELETED}
    (key,) = rig.tree_keys()
    data = rig.objects.get(key)
    tree = decode_tree(data, key=key)
    assert not {TOPIC, *UNDER} & set(tree.labels)
    assert np.isnan(tree.centroids[1][2:4]).all()
    assert OTHER in tree.labels
    assert rig.log.committed.tree_revision == rig.log.committed.removal_revision == 1


def test_labels_of_a_deleted_topic_are_nowhere_on_disk(rig: ShardRig) -> None:
    rig.push(TOPIC, "p1")
    rig.operations.create_snapshot(asked("r1"), "before")
    rig.operations.apply(asked("r2"), [Delete(topic=TOPIC)])
    files = [path.read_bytes() for path in rig.objects.root.rglob("*") if path.is_file()]
    assert not [data for data in files if b"label of 1-1" in data or b"label of 2-3" in data]
    assert [data for data in files if b"label of 1-2" in data]


def test_what_is_deleted_cannot_be_withheld_restored_or_deleted_again(rig: ShardRig) -> None:
    rig.operations.apply(asked("r1"), [Delete(topic=TOPIC)])
    for step in (Withhold(topic=TOPIC), Restore(topic=TOPIC), Delete(topic=TOPIC)):
        with pytest.raises(FailedPreconditionError) as caught:
            rig.operations.apply(asked(step.kind), [step])
        assert caught.value.reason is Reason.BLOCK_DELETED


def test_rollback_returns_content_under_new_versions(rig: ShardRig) -> None:
    rig.push(TOPIC, "p1")
    content = rig.weight(TOPIC)
    snapshot = rig.operations.create_snapshot(asked("r1"), "first")
    assert snapshot.revision == 1
    rig.push(TOPIC, "p2")
    rig.push(OTHER, "p3")
    report = rig.operations.rollback(asked("r2"), "first")
    assert {change.ref for change in report.changes} == {TOPIC, OTHER}
    np.testing.assert_array_equal(rig.weight(TOPIC), content)
    assert rig.status(TOPIC).version == 3
    assert rig.operations.list_snapshots() == (snapshot,)


def test_rollback_of_one_topic_leaves_the_others(rig: ShardRig) -> None:
    rig.operations.create_snapshot(asked("r1"), "first")
    rig.push(TOPIC, "p1")
    rig.push(OTHER, "p2")
    other = rig.weight(OTHER)
    rig.operations.rollback(asked("r2"), "first", TOPIC)
    assert rig.status(TOPIC).version == 2
    np.testing.assert_array_equal(rig.weight(OTHER), other)


def test_rollback_does_not_cross_a_delete(rig: ShardRig) -> None:
    rig.push(TOPIC, "p1")
    rig.push(OTHER, "p2")
    rig.operations.create_snapshot(asked("r1"), "first")
    rig.operations.apply(asked("r2"), [Delete(topic=TOPIC)])
    rig.push(OTHER, "p3")
    report = rig.operations.rollback(asked("r3"), "first")
    assert {change.ref for change in report.changes} == {OTHER}
    assert rig.status(TOPIC).state is BlockState.DELETED


def test_rollback_leaves_what_was_created_anew_after_a_delete(rig: ShardRig) -> None:
    rig.push(TOPIC, "p1")
    rig.operations.create_snapshot(asked("r1"), "first")
    rig.operations.apply(asked("r2"), [Delete(topic=TOPIC)])
    rig.operations.apply(asked("r3"), [Swap(ref=TOPIC, weight=filled(TOPIC, 5.0))])
    rig.operations.rollback(asked("r4"), "first")
    np.testing.assert_array_equal(rig.weight(TOPIC), filled(TOPIC, 5.0))


def test_rollback_leaves_what_was_never_written_before_its_delete(rig: ShardRig) -> None:
    # The pinned manifest does not name such a block, so nothing there tells of the delete.
    leaf = UNDER[0]
    rig.operations.create_snapshot(asked("r1"), "first")
    rig.operations.apply(asked("r2"), [Delete(topic=TOPIC)])
    rig.operations.apply(asked("r3"), [Swap(ref=leaf, weight=filled(leaf, 5.0))])
    report = rig.operations.rollback(asked("r4"), "first")
    assert report.changes == ()
    np.testing.assert_array_equal(rig.weight(leaf), filled(leaf, 5.0))


def test_snapshot_survives_updates_that_are_folded_later(rig: ShardRig) -> None:
    rig.push(TOPIC, "p1")
    content = rig.weight(TOPIC)
    rig.operations.create_snapshot(asked("r1"), "first")
    for number in range(3):
        rig.push(TOPIC, f"q{number}")
        for shard in rig.shards.values():
            shard.consolidate()
    rig.operations.rollback(asked("r2"), "first")
    np.testing.assert_array_equal(rig.weight(TOPIC), content)


def test_snapshot_names_are_unique_and_well_formed(rig: ShardRig) -> None:
    rig.operations.create_snapshot(asked("r1"), "first")
    with pytest.raises(AlreadyExistsError) as caught:
        rig.operations.create_snapshot(asked("r2"), "first")
    assert caught.value.reason is Reason.SNAPSHOT_EXISTS
    with pytest.raises(InvalidArgumentError):
        rig.operations.create_snapshot(asked("r3"), "Not A Name")
    with pytest.raises(NotFoundError) as missing:
        rig.operations.rollback(asked("r4"), "second")
    assert missing.value.reason is Reason.UNKNOWN_SNAPSHOT


def test_snapshot_retry_returns_the_same_snapshot(rig: ShardRig) -> None:
    first = rig.operations.create_snapshot(asked("r1"), "first")
    assert rig.operations.create_snapshot(asked("r1"), "first") == first


def test_topics_join_labels_and_states(rig: ShardRig) -> None:
    rig.push(UNDER[0], "p1")
    rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)])
    topics, revision = rig.operations.list_topics()
    assert revision == 1
    assert [topic.ref for topic in topics] == list(RIG_SPEC.blocks())
    by_ref = {topic.ref: topic for topic in topics}
    assert by_ref[UNDER[0]].label == "label of 2-2"
    assert by_ref[UNDER[0]].step == 1
    assert by_ref[TOPIC].state is BlockState.WITHHELD
    assert by_ref[TOPIC].num_documents == 11
    assert by_ref[OTHER].partition == 2


class _RacedTrees(TreeStore):
    """A transaction comes in right before the first read."""

    def __init__(self, rig: ShardRig, transaction: Callable[[], object]) -> None:
        super().__init__(rig.bank)
        self._transaction: Callable[[], object] | None = transaction

    def read(self, revision: int) -> TreeDocument:
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            transaction()
        return super().read(revision)


@pytest.mark.parametrize("first", [BlockRef(1, 3), None])
def test_topics_are_told_while_a_delete_replaces_the_tree(
    rig: ShardRig, first: BlockRef | None
) -> None:
    # A document of revision 0 may be absent, and one of a later revision may not.
    if first is not None:
        rig.operations.apply(asked("r0"), [Delete(topic=first)])
    trees = _RacedTrees(
        rig, lambda: rig.operations.apply(asked("r1"), [Delete(topic=TOPIC)]).report
    )
    topics, revision = TopicCatalog(rig.spec, ShardGroup(rig.spec, rig), rig.log, trees).list(
        OTHER, depth=1
    )
    assert revision == rig.log.last
    assert topics[0].label == "label of 1-2"


@pytest.mark.parametrize(
    ("parent", "depth", "count"),
    [(None, 0, 12), (None, 1, 4), (TOPIC, 0, 3), (TOPIC, 1, 3), (BlockRef(2, 5), 0, 1)],
)
def test_topics_are_cut_by_parent_and_depth(
    rig: ShardRig, parent: BlockRef | None, depth: int, count: int
) -> None:
    topics, _ = rig.operations.list_topics(parent, depth=depth)
    assert len(topics) == count


def test_describe_names_the_owner_and_unknown_blocks_are_refused(rig: ShardRig) -> None:
    (block,) = rig.operations.describe_blocks([BlockRef(2, 2)])
    assert block.shard_id == "shard-1"
    assert block.shape == RIG_SPEC.block_shape(2)
    with pytest.raises(NotFoundError):
        rig.operations.describe_blocks([BlockRef(2, 99)])
    with pytest.raises(NotFoundError):
        rig.operations.apply(asked("r1"), [Withhold(topic=BlockRef(3, 0))])


def test_audit_says_who_did_what_and_no_more(rig: ShardRig) -> None:
    rig.operations.apply(asked("r1", principal="bob"), [Withhold(topic=TOPIC)])
    rig.operations.apply(asked("r2"), [Delete(topic=TOPIC)])
    newest, before, first = rig.operations.audit(10)
    assert (newest.operation, newest.principal, newest.request_id) == ("delete", "alice", "r2")
    assert newest.detail["steps"] == [{"step": "delete", "topic": "1/1"}]
    assert newest.detail["num_blocks"] == 3
    assert (before.operation, before.principal, first.operation) == ("withhold", "bob", "create")
    assert "changes" not in newest.detail
    assert rig.operations.audit(1) == (newest,)


def test_stats_count_blocks_and_shards(rig: ShardRig) -> None:
    rig.push(TOPIC, "p1")
    stats = rig.operations.stats()
    assert (stats.num_blocks, stats.num_blocks_written, stats.revision) == (12, 1, 0)
    assert [shard.shard_id for shard in stats.shards] == ["shard-0", "shard-1"]


def test_two_transactions_at_a_time_are_refused(rig: ShardRig) -> None:
    with rig.coordinator.exclusive(), pytest.raises(UnavailableError) as caught:
        rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)])
    assert caught.value.reason is Reason.TRANSACTION_IN_PROGRESS
