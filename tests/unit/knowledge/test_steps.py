"""Transactions of steps over two shards: what each step does, what they do together, who is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from membank.bank_service.knowledge import ShardGroup, TreeStore
from membank.bank_service.knowledge.steps import StepPlanner
from membank.bank_service.shard.contract import BlockContent
from membank.wire.errors import (
    ConflictError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format import TreeDocument
from membank.wire.records import CentroidChange, TreeChange
from membank.wire.spec import Array, BlockRef, BlockState
from membank.wire.steps import Combine, Delete, Place, Restore, Step, Swap, Withhold
from shard_rig import RIG_SPEC, ShardRig, When, asked

# Topic t lies in partition t, on shard t % 2.
A, B, C, D = (BlockRef(1, cluster) for cluster in range(4))
LEAF = BlockRef(2, 2)
"""Under B."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank")
    train(rig)
    yield rig
    rig.close()


def train(rig: ShardRig) -> None:
    for ref in (A, B, LEAF):
        rig.push(ref, f"first-{ref}", value=1.0 + ref.cluster)


def apply(rig: ShardRig, *steps: Step, request_id: str = "r1") -> None:
    rig.operations.apply(asked(request_id), steps)


def filled(value: float, ref: BlockRef = A) -> Array:
    return np.full(RIG_SPEC.block_shape(ref.level), value, np.float32)


def weight(rig: ShardRig, ref: BlockRef) -> npt.NDArray[np.float32]:
    found = rig.weight(ref)
    assert found is not None
    return found.astype(np.float32)


def tree(rig: ShardRig) -> TreeDocument:
    return TreeStore(rig.bank).read(rig.log.committed.tree_revision)


def copy(source: BlockRef, target: BlockRef) -> Combine:
    return Combine(ref=target, keep=0, other=source, add=1)


# ---- content


def test_a_block_is_blended_with_one_of_another_shard(rig: ShardRig) -> None:
    a, b = weight(rig, A), weight(rig, B)
    apply(rig, Combine(ref=A, keep=0.75, other=B, add=0.25, expected_version=1))
    np.testing.assert_array_equal(weight(rig, A), 0.75 * a + 0.25 * b)
    np.testing.assert_array_equal(weight(rig, B), b)
    assert (rig.status(A).version, rig.status(A).step, rig.status(B).version) == (2, 0, 1)


def test_every_step_sees_the_bank_as_it_was(rig: ShardRig) -> None:
    a, b, c = weight(rig, A), weight(rig, B), weight(rig, C)
    apply(rig, copy(A, B), copy(B, A), Swap(ref=C, weight=filled(9.0)), copy(C, D))
    np.testing.assert_array_equal(weight(rig, A), b)
    np.testing.assert_array_equal(weight(rig, B), a)
    np.testing.assert_array_equal(weight(rig, C), filled(9.0))
    np.testing.assert_array_equal(weight(rig, D), c)


def test_a_block_is_moved_in_one_transaction(rig: ShardRig) -> None:
    leaf = weight(rig, LEAF)
    apply(rig, copy(LEAF, BlockRef(2, 7)), Delete(topic=LEAF))
    np.testing.assert_array_equal(weight(rig, BlockRef(2, 7)), leaf)
    assert rig.status(LEAF).state is BlockState.DELETED


class _BusyShards(ShardGroup):
    """Lets an update pass right after blocks were read."""

    def __init__(self, rig: ShardRig, ref: BlockRef) -> None:
        super().__init__(rig.spec, rig)
        self._rig = rig
        self._ref = ref

    def read(self, refs: Sequence[BlockRef]) -> Iterator[BlockContent]:
        yield from super().read(refs)
        self._rig.push(self._ref, f"after {self._rig.status(self._ref).version}")


def test_an_update_that_comes_in_between_is_not_lost_by_a_move(rig: ShardRig) -> None:
    shards = _BusyShards(rig, LEAF)
    planner = StepPlanner(rig.spec, shards, rig.log, TreeStore(rig.bank))

    def run(*steps: Step, request_id: str) -> None:
        rig.coordinator.run(asked(request_id), "combine", {}, lambda: planner.plan(steps))

    before = rig.state()
    with pytest.raises(ConflictError) as caught:
        run(copy(LEAF, A), Delete(topic=LEAF), request_id="r1")
    assert caught.value.reason is Reason.VERSION_MISMATCH
    assert rig.status(LEAF).version == 2
    assert rig.state() == before | {LEAF: rig.state()[LEAF]}
    # Who is only read may go on: the copy is of the version that was read.
    leaf = weight(rig, LEAF)
    run(copy(LEAF, A), request_id="r2")
    np.testing.assert_array_equal(weight(rig, A), leaf)
    assert rig.status(LEAF).version == 3
    shards.close()


def test_a_deleted_block_is_created_anew_by_a_copy_alone(rig: ShardRig) -> None:
    b = weight(rig, B)
    apply(rig, Delete(topic=A))
    with pytest.raises(FailedPreconditionError) as caught:
        apply(rig, Combine(ref=A, keep=0.5, other=B, add=0.5), request_id="r2")
    assert caught.value.reason is Reason.BLOCK_DELETED
    apply(rig, copy(B, A), request_id="r3")
    np.testing.assert_array_equal(weight(rig, A), b)


@pytest.mark.parametrize(
    ("hide", "reason"),
    [(Withhold(topic=B), Reason.BLOCK_WITHHELD), (Delete(topic=B), Reason.BLOCK_DELETED)],
)
def test_nothing_is_taken_from_what_is_hidden(rig: ShardRig, hide: Step, reason: Reason) -> None:
    apply(rig, hide)
    with pytest.raises(FailedPreconditionError, match="1/1") as caught:
        apply(rig, copy(B, A), request_id="r2")
    assert caught.value.reason is reason


def test_only_blocks_of_one_shape_are_combined(tmp_path: Path) -> None:
    levels = (RIG_SPEC.levels[0], replace(RIG_SPEC.levels[1], block_width=1))
    rig = ShardRig(tmp_path / "other", spec=replace(RIG_SPEC, levels=levels))
    with pytest.raises(InvalidArgumentError) as caught:
        apply(rig, copy(LEAF, A))
    assert caught.value.reason is Reason.BAD_SHAPE
    rig.close()


@pytest.mark.parametrize(
    "step",
    [
        Combine(ref=A, keep=0, expected_version=2),
        Combine(ref=A, keep=0, other=B, add=1, expected_other_version=0),
        Swap(ref=A, weight=np.zeros(RIG_SPEC.block_shape(1), np.float32), expected_version=2),
    ],
)
def test_a_version_that_is_not_expected_changes_nothing_anywhere(rig: ShardRig, step: Step) -> None:
    before = rig.state()
    with pytest.raises(ConflictError) as caught:
        apply(rig, Delete(topic=D), Swap(ref=C, weight=filled(2.0)), step)
    assert caught.value.reason is Reason.VERSION_MISMATCH
    assert rig.state() == before
    assert rig.log.committed.revision == 0


# ---- topics


def test_only_the_block_of_a_topic(rig: ShardRig) -> None:
    apply(rig, Withhold(topic=A, only_block=True), Delete(topic=B, only_block=True))
    states = {ref: rig.status(ref).state for ref in (A, BlockRef(2, 0), B, LEAF)}
    assert states == {
        A: BlockState.WITHHELD,
        BlockRef(2, 0): BlockState.ACTIVE,
        B: BlockState.DELETED,
        LEAF: BlockState.ACTIVE,
    }
    assert B not in tree(rig).labels
    assert LEAF in tree(rig).labels
    apply(rig, Restore(topic=A, only_block=True), request_id="r2")
    assert rig.status(A).state is BlockState.ACTIVE
    with pytest.raises(FailedPreconditionError):
        apply(rig, Restore(topic=B, only_block=True), request_id="r3")


@pytest.mark.parametrize(
    ("steps", "named"),
    [
        (
            (Delete(topic=B), Swap(ref=LEAF, weight=filled(1, LEAF))),
            ("delete of topic 1/1", "swap"),
        ),
        ((Withhold(topic=B), Restore(topic=LEAF)), ("withhold of topic 1/1", "restore of topic")),
        ((copy(A, C), Combine(ref=C, keep=2)), ("combine of block 1/2", "combine of block 1/2")),
        ((Place(topic=A, label="x"), Place(topic=A, label="y")), ("place of topic 1/0", "1/0")),
        ((Delete(topic=A), Delete(topic=A, only_block=True)), ("topic 1/0", "delete of block 1/0")),
    ],
)
def test_two_steps_of_one_block_are_refused_by_their_names(
    rig: ShardRig, steps: tuple[Step, ...], named: tuple[str, str]
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        apply(rig, *steps)
    assert all(name in caught.value.message for name in named)
    assert rig.log.committed.revision == 0


@pytest.mark.parametrize(
    "step",
    [
        Delete(topic=BlockRef(1, 9)),
        Place(topic=BlockRef(3, 0), label="x"),
        Combine(ref=A, keep=0, other=BlockRef(2, 99), add=1),
    ],
)
def test_what_the_bank_has_not(rig: ShardRig, step: Step) -> None:
    with pytest.raises(NotFoundError):
        apply(rig, step)


def test_no_step_is_no_transaction(rig: ShardRig) -> None:
    with pytest.raises(InvalidArgumentError):
        apply(rig)


# ---- the tree


def test_a_topic_is_placed_in_the_same_transaction(rig: ShardRig) -> None:
    apply(rig, Delete(topic=LEAF))
    row = np.array([0.5, 0.25, -1.0], np.float32)
    before = tree(rig)
    steps = (copy(BlockRef(2, 3), LEAF), Place(topic=LEAF, label="steel", centroid=row))
    dry = rig.operations.apply(asked("", dry_run=True), steps).report
    assert tree(rig).labels == before.labels
    report = rig.operations.apply(asked("r2"), steps).report
    assert dry.tree_changes == report.tree_changes
    assert report.tree_changes == (
        TreeChange(topic=LEAF, changes_label=True, centroid_change=CentroidChange.SET),
    )
    after = tree(rig)
    assert after.labels == {**before.labels, LEAF: "steel"}
    np.testing.assert_array_equal(after.centroids[1][LEAF.cluster], row)
    np.testing.assert_array_equal(after.centroids[0], before.centroids[0])
    # The one before would tell of labels and centroids that are gone.
    assert len(rig.tree_keys()) == 1


def test_a_topic_is_retired(rig: ShardRig) -> None:
    report = rig.operations.apply(
        asked("r1"), [Delete(topic=LEAF), Place(topic=LEAF, remove_centroid=True)]
    ).report
    assert report.tree_changes == (
        TreeChange(
            topic=LEAF,
            changes_label=True,
            changes_num_documents=True,
            centroid_change=CentroidChange.REMOVED,
        ),
    )
    assert np.isnan(tree(rig).centroids[1][LEAF.cluster]).all()
    assert not np.isnan(tree(rig).centroids[1][LEAF.cluster + 1]).any()


def test_a_label_is_changed_without_a_block(rig: ShardRig) -> None:
    before = rig.state()
    report = rig.operations.apply(
        asked("r1"), [Place(topic=A, label=""), Place(topic=B, num_documents=77)]
    ).report
    assert (report.revision, report.changes) == (1, ())
    assert A not in tree(rig).labels
    assert tree(rig).num_documents[B] == 77
    assert rig.state() == before
    again = rig.operations.apply(
        asked("r1"), [Place(topic=A, label=""), Place(topic=B, num_documents=77)]
    ).report
    assert again == report


def test_what_changes_nothing_in_the_tree_writes_none(rig: ShardRig) -> None:
    label = tree(rig).labels[A]
    report = rig.operations.apply(asked("r1"), [Place(topic=A, label=label)]).report
    assert (report.tree_changes, rig.log.committed.tree_revision) == ((), 0)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((Delete(topic=A), Place(topic=A, label="x")), Reason.BLOCK_DELETED),
        (
            (Delete(topic=A), Place(topic=BlockRef(2, 0), centroid=np.ones(3))),
            Reason.BLOCK_DELETED,
        ),
        (
            (Delete(topic=A), Place(topic=A, label="x", remove_centroid=True)),
            Reason.BLOCK_DELETED,
        ),
        ((Place(topic=A, centroid=np.ones(4)),), Reason.BAD_SHAPE),
    ],
)
def test_a_place_that_cannot_be_is_refused(
    rig: ShardRig, steps: tuple[Step, ...], reason: Reason
) -> None:
    with pytest.raises(MembankError) as caught:
        apply(rig, *steps)
    assert caught.value.reason is reason
    assert rig.log.committed.revision == 0


def test_a_bank_without_a_retriever_gets_labels_and_no_centroids(tmp_path: Path) -> None:
    rig = ShardRig(tmp_path / "bare", tree=TreeDocument(labels={A: "iron"}))
    with pytest.raises(FailedPreconditionError) as caught:
        apply(rig, Place(topic=B, centroid=np.ones(3)))
    assert caught.value.reason is Reason.NO_TREE
    apply(rig, Place(topic=B, label="steel", remove_centroid=True), request_id="r2")
    assert tree(rig).labels == {A: "iron", B: "steel"}
    rig.close()


# ---- the record, retries and failures


def test_the_audit_log_tells_the_steps_and_no_label(rig: ShardRig) -> None:
    apply(rig, Combine(ref=A, keep=0.5, other=B, add=0.5), request_id="r1")
    apply(rig, Delete(topic=C), Place(topic=D, label="steel"), request_id="r2")
    mixed, combined = rig.operations.audit(2)
    assert (combined.operation, mixed.operation) == ("combine", "transaction")
    assert combined.detail["steps"] == [
        {
            "step": "combine",
            "block": "1/0",
            "keep": 0.5,
            "other": "1/1",
            "other_version": 1,
            "add": 0.5,
        }
    ]
    assert mixed.detail["steps"] == [
        {"step": "delete", "topic": "1/2"},
        {"step": "place", "topic": "1/3"},
    ]
    assert "steel" not in str(mixed.detail)
    assert "tree_changes" not in mixed.detail


STEPS = (
    copy(A, B),
    Combine(ref=A, keep=-1, other=D, add=2),
    Delete(topic=C),
    Withhold(topic=LEAF),
    Place(topic=D, label="steel"),
)


def _after(rig: ShardRig) -> tuple[object, ...]:
    return rig.state(), dict(tree(rig).labels), rig.log.committed.revision


@pytest.fixture
def before_and_after(tmp_path: Path) -> tuple[object, object]:
    twin = ShardRig(tmp_path / "twin")
    train(twin)
    before = _after(twin)
    apply(twin, *STEPS)
    after = _after(twin)
    twin.close()
    return before, after


@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize(
    "step", ["prepare shard-0", "prepare shard-1", "put trees", "put_if_absent revisions"]
)
def test_a_failure_changes_all_or_nothing_and_a_retry_does_it_once(
    rig: ShardRig, before_and_after: tuple[object, object], step: str, when: When
) -> None:
    before, after = before_and_after
    rig.faults.arm(step, when, UnavailableError)
    try:
        apply(rig, *STEPS)
    except UnavailableError:
        assert _after(rig) == before
        retried = rig.operations.apply(asked("r1"), STEPS).report
        # An attempt that was given up may have used a number.
        assert retried.revision == rig.log.committed.revision
        assert _after(rig)[:2] == after[:2]  # type: ignore[index]
    else:
        assert _after(rig) == after
    assert not rig.faults.is_armed
    done = _after(rig)
    rig.operations.apply(asked("r1"), STEPS)
    assert _after(rig) == done


@pytest.mark.parametrize("step", ["commit shard-0", "commit shard-1", "delete trees"])
def test_who_dies_after_the_record_finds_it_done(
    rig: ShardRig, before_and_after: tuple[object, object], step: str
) -> None:
    rig.faults.arm(step, When.BEFORE, UnavailableError)
    with pytest.raises(UnavailableError):
        apply(rig, *STEPS)
    rig.kill_shards()
    rig.open_shards()
    rig.start_coordinator()
    assert _after(rig) == before_and_after[1]
    report = rig.operations.apply(asked("r1"), STEPS).report
    assert (report.revision, len(report.changes)) == (1, 6)
