"""The paths that each condition fetches."""

from __future__ import annotations

import pytest

from membank.trainer.evaluation import Condition, ConditionMemory, EvaluationPaths, random_paths
from membank.trainer.training import InProcessMemory, generic_spec, leaf_path
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BankSpec, BlockRef, LevelSpec

SPEC = BankSpec(
    name="tiny",
    num_layers=1,
    width=4,
    levels=(LevelSpec(fan_out=3, block_width=1), LevelSpec(fan_out=3, block_width=2)),
)


def _paths(leaves: tuple[int, ...], routed: tuple[int, ...] | None = None) -> EvaluationPaths:
    return EvaluationPaths(
        routed=tuple(leaf_path(SPEC, leaf) for leaf in routed or leaves),
        holding=tuple(leaf_path(SPEC, leaf) for leaf in leaves),
        leaves=tuple(range(9)),
    )


def test_random_leaves_are_of_other_topics_and_the_same_each_time() -> None:
    paths = _paths((0, 1, 4, 8) * 10)
    found = random_paths(SPEC, paths, seed=3)
    assert found == random_paths(SPEC, paths, seed=3)
    assert found != random_paths(SPEC, paths, seed=4)
    assert all(path[0] != holding[0] for path, holding in zip(found, paths.holding, strict=True))
    assert len(set(found)) > 3


@pytest.mark.parametrize(("leaves", "expected"), [((0, 1), {1}), ((0,), {0}), ((0, 1, 8), {8})])
def test_a_random_leaf_is_the_farthest_that_was_trained(
    leaves: tuple[int, ...], expected: set[int]
) -> None:
    paths = EvaluationPaths(
        routed=(leaf_path(SPEC, 0),), holding=(leaf_path(SPEC, 0),), leaves=leaves
    )
    assert {random_paths(SPEC, paths, seed)[0][-1].cluster for seed in range(5)} == expected


def test_the_share_routed_right_counts_levels_and_short_paths() -> None:
    paths = EvaluationPaths(
        routed=(leaf_path(SPEC, 0), leaf_path(SPEC, 1), leaf_path(SPEC, 3)[:1], ()),
        holding=(leaf_path(SPEC, 0), leaf_path(SPEC, 0), leaf_path(SPEC, 3), leaf_path(SPEC, 4)),
        leaves=(0,),
    )
    assert paths.routed_share(2) == (0.75, 0.25)


def test_every_condition_has_its_blocks() -> None:
    paths = _paths((0, 4, 8), routed=(0, 5, 8))
    memory = InProcessMemory(SPEC)
    generic = InProcessMemory(generic_spec(SPEC))
    conditions = ConditionMemory(memory, generic, paths)
    assert conditions.conditions == (
        Condition.ANCHOR,
        Condition.GENERIC,
        Condition.FETCHED,
        Condition.ORACLE,
        Condition.RANDOM,
    )
    assert conditions.batch(Condition.ANCHOR, [0, 1, 2]) is None
    whole = conditions.batch(Condition.FETCHED, [0, 1, 2])
    assert whole is not None
    blocks = whole.levels[1].blocks_KLPRD
    expected = memory.fetch([BlockRef(2, leaf) for leaf in (0, 5, 8)]).weights
    for row, leaf in zip(whole.levels[1].index_B.tolist(), (0, 5, 8), strict=True):
        assert bool((blocks[row] == expected[BlockRef(2, leaf)]).all())
    without = conditions.batch(Condition.FETCHED, [0, 1, 2], without_level=1)
    assert without is not None
    assert [level.blocks_KLPRD.shape[3] for level in without.levels] == [2]
    one = conditions.batch(Condition.GENERIC, [0, 1, 2])
    assert one is not None
    assert [len(level.blocks_KLPRD) for level in one.levels] == [1, 1]
    assert ConditionMemory(memory, None, paths).conditions[1] is Condition.FETCHED


def test_paths_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="both"):
        EvaluationPaths(routed=((),), holding=(), leaves=(0,))
    with pytest.raises(InvalidArgumentError, match="leaf"):
        EvaluationPaths(routed=(), holding=(), leaves=())
