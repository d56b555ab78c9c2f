"""Which sequences make up each batch: a pure function of seed, worker and step, so runs resume.

Shape letters: N sequences, B sequences of a batch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from membank.wire.errors import InvalidArgumentError


class SequenceOrder:
    """Orders sequences anew in every epoch and deals them to the workers.

    Sequences of one leaf come in runs of `run_length`: a batch of runs touches fewer blocks, and
    equal runs are computed together. Runs are shuffled over all leaves.

    Parameters
    ----------
    leaf_N
        (N,) int64, leaf of each sequence; all equal where leaves do not matter.
    batch_size
        Sequences of one batch of one worker; a multiple of `run_length`.
    run_length
        Sequences of a run. Where a leaf does not fill its last run, some of its sequences come
        twice in that epoch.
    seed
        Seed of every shuffle.
    rank, world_size
        Which of how many workers this is. The workers together take each run of an epoch once.

    Raises
    ------
    InvalidArgumentError
        A number is out of range.
    """

    def __init__(
        self,
        leaf_N: NDArray[np.int64],
        *,
        batch_size: int,
        run_length: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if not len(leaf_N):
            raise InvalidArgumentError("there are no sequences to train on")
        if run_length < 1 or batch_size < 1 or batch_size % run_length:
            raise InvalidArgumentError(
                f"batch_size is {batch_size} and run_length {run_length}; the first must be a "
                "positive multiple of the second"
            )
        if not 0 <= rank < world_size:
            raise InvalidArgumentError(f"rank is {rank}; it must be in 0..{world_size - 1}")
        self._members = [np.flatnonzero(leaf_N == leaf) for leaf in np.unique(leaf_N)]
        self._leaf_N = leaf_N
        self._run_length = run_length
        self._runs_per_batch = batch_size // run_length
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._runs_per_epoch = sum(-(-len(m) // run_length) for m in self._members)
        self._cached: dict[int, NDArray[np.int64]] = {}

    def rows(self, step: int) -> NDArray[np.int64]:
        """Return the sequences of batch `step` of this worker.

        Returns
        -------
        NDArray[np.int64]
            (B,), ordered by leaf, so that sequences of one path are neighbours.
        """
        first = (step * self._world_size + self._rank) * self._runs_per_batch
        runs = [self._run(first + i) for i in range(self._runs_per_batch)]
        rows_B = np.concatenate(runs)
        return rows_B[np.argsort(self._leaf_N[rows_B], kind="stable")]

    def _run(self, number: int) -> NDArray[np.int64]:
        epoch, place = divmod(number, self._runs_per_epoch)
        if epoch not in self._cached:
            # A batch may reach from one epoch into the next, hence two.
            self._cached = {e: runs for e, runs in self._cached.items() if e == epoch - 1}
            self._cached[epoch] = self._shuffled_runs(epoch)
        run: NDArray[np.int64] = self._cached[epoch][place]
        return run

    def _shuffled_runs(self, epoch: int) -> NDArray[np.int64]:
        rng = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        runs: list[NDArray[np.int64]] = []
        for members in self._members:
            order = rng.permutation(members)
            missing = -len(order) % self._run_length
            filled = np.concatenate([order, rng.choice(members, missing)])
            runs.append(filled.reshape(-1, self._run_length))
        return rng.permutation(np.concatenate(runs), axis=0)
