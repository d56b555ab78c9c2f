"""The plan of a deletion: which topics go, which blocks are trained anew, on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from membank.trainer.deletion import (
    DeletionConfig,
    DeletionPlan,
    Scope,
    TrainedDocuments,
    plan_deletion,
)
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.spec import BankSpec, BlockRef, BlockState, LevelSpec

SPEC = BankSpec(
    name="plan",
    num_layers=1,
    width=4,
    levels=(LevelSpec(fan_out=2, block_width=1), LevelSpec(fan_out=3, block_width=1)),
)
# Leaf 0 has documents 0..3, leaf 1 has 4 and 5, leaf 3 has 6 and 7, none has 8.
LEAF_N = np.array([0, 0, 0, 0, 1, 1, 3, 3, -1])
TOKENS_N = np.array([10, 10, 10, 30, 5, 5, 7, 7, 100])
TOP, LEAF_0, LEAF_1 = BlockRef(1, 0), BlockRef(2, 0), BlockRef(2, 1)


def _plan(
    *removed: int,
    states: Mapping[BlockRef, BlockState] | None = None,
    leaf_N: np.ndarray[tuple[int], np.dtype[np.int64]] = LEAF_N,
    untouched: frozenset[BlockRef] = frozenset({BlockRef(2, 4), BlockRef(2, 5)}),
    **settings: object,
) -> DeletionPlan:
    blocks = {
        ref: (0 if ref in untouched else 7, (states or {}).get(ref, BlockState.ACTIVE))
        for ref in SPEC.blocks()
    }
    config = replace(DeletionConfig(), **settings)  # type: ignore[arg-type]  # a test's words
    trained = TrainedDocuments(leaf_N=leaf_N, num_tokens_N=TOKENS_N)
    return plan_deletion(SPEC, trained, removed, blocks, config)


def _refs(plan: DeletionPlan) -> list[BlockRef]:
    return [part.ref for part in plan.retrained]


def test_shared_leaves_and_what_is_above_are_trained_anew_on_what_remains() -> None:
    plan = _plan(0, 1)
    assert (plan.topics, plan.deleted) == ((), ())
    assert _refs(plan) == [TOP, LEAF_0]
    top, leaf = plan.retrained
    assert (leaf.num_documents, leaf.removed_documents) == (4, 2)
    assert (leaf.num_tokens, leaf.removed_tokens, leaf.version) == (60, 20, 7)
    assert (top.num_documents, top.num_tokens) == (6, 70)
    assert plan.remaining == (2, 3, 4, 5)


def test_a_leaf_that_they_dominate_by_tokens_goes_and_the_rest_trains_what_is_above() -> None:
    plan = _plan(3)  # one document of four, half of the tokens
    assert plan.topics == (LEAF_0,)
    assert plan.collateral_documents == 3
    assert _refs(plan) == [TOP]
    assert plan.remaining == (0, 1, 2, 4, 5)
    assert _plan(3, threshold=0.51).topics == ()


def test_a_leaf_of_which_nothing_is_left_goes_at_any_threshold() -> None:
    plan = _plan(4, 5, threshold=1.0)
    assert plan.topics == (LEAF_1,)
    assert _refs(plan) == [TOP]
    assert plan.remaining == (0, 1, 2, 3)


def test_a_topic_of_which_nothing_is_left_goes_as_a_whole() -> None:
    plan = _plan(6, 7, 0)
    assert plan.topics == (BlockRef(1, 1),)
    assert [part.ref for part in plan.deleted] == [BlockRef(1, 1), BlockRef(2, 3)]
    assert _refs(plan) == [TOP, LEAF_0]
    only = _plan(6, 7)
    assert (only.retrained, only.remaining) == ((), ())


def test_what_others_put_under_a_topic_that_goes_is_listed() -> None:
    plan = _plan(6, 7, untouched=frozenset({BlockRef(2, 4)}))
    assert plan.topics == (BlockRef(1, 1),)
    (other,) = (part for part in plan.deleted if not part.num_documents)
    assert (other.ref, other.version, other.share) == (BlockRef(2, 5), 7, 0.0)


def test_topics_train_all_blocks_under_the_level_1_topics_that_hold_something() -> None:
    plan = _plan(0, scope=Scope.TOPICS)
    assert _refs(plan) == [TOP, LEAF_0, LEAF_1]
    assert plan.remaining == (1, 2, 3, 4, 5)
    assert _refs(_plan(3, scope=Scope.TOPICS)) == [TOP, LEAF_1]


def test_documents_that_are_not_in_the_bank_are_no_part_of_it() -> None:
    assert _plan(8, 0).removed == (0,)
    with pytest.raises(InvalidArgumentError, match="nothing to delete"):
        _plan(8)


def test_deleted_blocks_are_left_alone() -> None:
    plan = _plan(0, states={LEAF_0: BlockState.DELETED})
    assert _refs(plan) == [TOP]
    assert plan.deleted == ()


@pytest.mark.parametrize(
    ("ref", "state", "reason", "words"),
    [
        (LEAF_0, BlockState.WITHHELD, Reason.BLOCK_WITHHELD, "restore 2/0"),
        (TOP, BlockState.WITHHELD, Reason.BLOCK_WITHHELD, "restore 1/0"),
        (TOP, BlockState.DELETED, Reason.BLOCK_DELETED, "membank delete 2/0"),
    ],
)
def test_a_block_that_cannot_be_trained_is_refused_with_what_to_do(
    ref: BlockRef, state: BlockState, reason: Reason, words: str
) -> None:
    with pytest.raises(FailedPreconditionError, match=words) as caught:
        _plan(0, states={ref: state})
    assert caught.value.reason is reason


@pytest.mark.parametrize("settings", [{"threshold": 0.0}, {"threshold": 1.5}])
def test_a_threshold_is_a_share(settings: dict[str, float]) -> None:
    with pytest.raises(InvalidArgumentError, match="threshold"):
        DeletionConfig(**settings)  # type: ignore[arg-type]  # a test's words


def test_a_plan_is_told_in_figures() -> None:
    told = _plan(3).to_json()
    assert told["deleted_topics"] == ["2/0"]
    assert told["removed_documents"] == 1
    assert told["collateral_documents"] == 3
    assert [(part.ref, part.share) for part in _plan(3).deleted] == [(LEAF_0, 0.5)]
