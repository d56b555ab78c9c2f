"""Training blocks anew on what remains, by the recipe of stage 2, from their initial content.

Everything that decides the result is here: the remaining documents are packed apart, the number of
steps is such that each of their sequences is seen as often as stage 2 saw its own, order, schedule
and optimizer are those of stage 2. Nothing of the present content of these blocks takes part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from membank.trainer.corpus import NO_LEAF, PackedSequences, pack_sequences
from membank.trainer.deletion.plan import DeletionPlan
from membank.trainer.deletion.staged import StagedMemory
from membank.trainer.model import Anchor
from membank.trainer.run import RunConfig
from membank.trainer.training import (
    Fetched,
    InProcessCheckpoint,
    InProcessMemory,
    MemoryStageConfig,
    PrefetchConfig,
    ProgressCallback,
    StageResult,
    train_memories,
)
from membank.trainer.training.anchor_stage import run_fingerprint
from membank.wire.spec import BankSpec

_PROBE_STEPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Retraining:
    """What blocks are trained anew on, and how."""

    sequences: PackedSequences
    """The remaining documents, each sequence of one leaf."""
    config: MemoryStageConfig
    """The recipe of stage 2, at the length that these sequences take."""

    @property
    def fingerprint(self) -> str:
        """Digest of both; equal means equal training."""
        return run_fingerprint(self.config, self.sequences)

    @property
    def num_steps(self) -> int:
        """Training steps."""
        return self.config.num_steps(self.sequences.seq_len)


def plan_retraining(
    plan: DeletionPlan,
    leaf_N: NDArray[np.int64],
    tokens: Sequence[Sequence[int]],
    *,
    eot_id: int,
    run: RunConfig,
    run_leaf_N: NDArray[np.int64],
) -> Retraining:
    """Return what the plan's blocks are trained anew on.

    Parameters
    ----------
    plan
        The plan; it names at least one block to train.
    leaf_N
        (documents,) leaf of each document of the corpus.
    tokens
        Tokens of each document, without end-of-text.
    eot_id
        Token that ends a document.
    run
        The run's configuration.
    run_leaf_N
        (sequences,) leaf of each sequence that stage 2 was trained on, which says how often it saw
        each.
    """
    masked_N = np.full(len(leaf_N), NO_LEAF, dtype=np.int64)
    remaining = list(plan.remaining)
    masked_N[remaining] = leaf_N[remaining]
    sequences = pack_sequences(
        tokens, seq_len=run.seq_len, eot_id=eot_id, leaves=masked_N, seed=run.seed
    )
    length = run.stage2.run_length
    seen = run.stage2.num_steps(run.seq_len) * run.stage2.batch_size
    passes = seen / _dealt_per_pass(run_leaf_N, length)
    num_dealt = math.ceil(passes * _dealt_per_pass(sequences.leaf_N, length))
    config = replace(
        run.stage2,
        num_tokens=num_dealt * run.seq_len,
        # Nothing travels here: threads would only be in the way. The result is the same.
        prefetch=PrefetchConfig(depth=0),
    )
    return Retraining(sequences=sequences, config=config)


def _dealt_per_pass(leaf_N: NDArray[np.int64], run_length: int) -> int:
    """Return how many sequences one pass deals: those of a leaf are filled up to whole runs."""
    _, counts = np.unique(leaf_N, return_counts=True)
    return int((-(-counts // run_length)).sum()) * run_length


def retrain(
    anchor: Anchor,
    spec: BankSpec,
    plan: DeletionPlan,
    retraining: Retraining,
    fixed: Fetched,
    *,
    file: Path,
    losses: Path,
    every_steps: int,
    on_progress: ProgressCallback | None = None,
) -> tuple[InProcessMemory, StageResult]:
    """Train the plan's blocks anew, or go on where it was stopped.

    Parameters
    ----------
    anchor
        The run's anchor; it is frozen.
    spec
        The bank: its seed gives the initial content.
    plan
        Which blocks.
    retraining
        On what, and how.
    fixed
        Every other block of these paths.
    file
        Where the blocks are kept, with the position; a file of another job is refused.
    losses
        Where the losses are kept.
    every_steps
        Steps between two states that are kept.
    on_progress
        Told about twice a second.

    Returns
    -------
    tuple
        The trained blocks, and what this process did.

    Raises
    ------
    FailedPreconditionError
        `file` is of another job.
    InternalError
        The loss is not finite.
    """
    trained = InProcessMemory(spec)
    result = train_memories(
        anchor,
        StagedMemory(trained, plan.retrained_refs, fixed),
        retraining.sequences,
        retraining.config,
        checkpoint=InProcessCheckpoint(file, trained, every_steps=every_steps),
        losses=losses,
        on_progress=on_progress,
    )
    return trained, result


def seconds_per_step(anchor: Anchor, spec: BankSpec, retraining: Retraining) -> float:
    """Return what a step takes on this machine now, measured on a copy that is thrown away."""
    memory = InProcessMemory(spec)
    length = retraining.config.batch_size * retraining.sequences.seq_len

    def run(num_steps: int) -> float:
        config = replace(retraining.config, num_tokens=num_steps * length)
        return train_memories(anchor, memory, retraining.sequences, config).seconds / num_steps

    run(1)  # the first one of a process takes longer
    return run(_PROBE_STEPS)
