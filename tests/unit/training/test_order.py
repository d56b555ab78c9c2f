"""The order of sequences: a pure function of the step, each run once per epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from membank.trainer.training import SequenceOrder
from membank.wire.errors import InvalidArgumentError

LEAVES = np.repeat(np.arange(5), [4, 6, 2, 8, 4])


def test_an_epoch_takes_every_sequence_once_and_the_next_in_another_order() -> None:
    order = SequenceOrder(LEAVES, batch_size=4, seed=1)
    steps = len(LEAVES) // 4
    epochs = [
        np.concatenate([order.rows(step) for step in range(first, first + steps)])
        for first in (0, steps)
    ]
    for rows in epochs:
        assert sorted(rows) == list(range(len(LEAVES)))
    assert not np.array_equal(epochs[0], epochs[1])


def test_batches_are_runs_of_one_leaf_side_by_side() -> None:
    order = SequenceOrder(LEAVES, batch_size=6, run_length=2, seed=0)
    for step in range(8):
        leaves = LEAVES[order.rows(step)]
        assert np.array_equal(leaves, np.sort(leaves))
        assert all(count % 2 == 0 for count in Counter(leaves.tolist()).values())


def test_any_step_can_be_asked_for_first() -> None:
    def order() -> SequenceOrder:
        return SequenceOrder(LEAVES, batch_size=4, run_length=2, seed=5)

    straight = order()
    rows = [straight.rows(step) for step in range(20)]
    for step in (19, 0, 7):
        assert np.array_equal(order().rows(step), rows[step])


def test_workers_share_out_the_batches_of_one() -> None:
    one = SequenceOrder(LEAVES, batch_size=4, seed=2)
    many = [
        SequenceOrder(LEAVES, batch_size=4, seed=2, rank=rank, world_size=3) for rank in range(3)
    ]
    for step in range(9):
        assert np.array_equal(one.rows(step), many[step % 3].rows(step // 3))


def test_a_leaf_that_does_not_fill_its_runs_repeats_its_own_sequences() -> None:
    order = SequenceOrder(np.array([0, 0, 0, 1]), batch_size=2, run_length=2, seed=0)
    seen = [frozenset(order.rows(step).tolist()) for step in range(3)]
    assert {3} in seen
    assert set.union(*(set(rows) for rows in seen)) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("batch_size", "run_length", "rank"), [(3, 2, 0), (0, 1, 0), (4, 0, 0), (4, 2, 1)]
)
def test_impossible_orders_are_refused(batch_size: int, run_length: int, rank: int) -> None:
    with pytest.raises(InvalidArgumentError):
        SequenceOrder(LEAVES, batch_size=batch_size, run_length=run_length, rank=rank)
