"""Stage 2: train memories with the anchor frozen, each sequence with the blocks of its leaf.

Life of one step:

1. the batch's paths name its distinct blocks, which are *fetched* (perhaps ahead of time);
2. copies of them become leaves of autograd. The anchor is frozen, so gradients *stop* at its
   weights and flow through its activations alone;
3. where sequences share a block, autograd *accumulates* their gradients in the one distinct copy;
4. one gradient per distinct block is *sent* with the version it was computed on, and the copy is
   dropped. Moments and step counts are behind the source, beside the blocks.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from membank.trainer.corpus import PackedSequences
from membank.trainer.model import Anchor, next_token_loss
from membank.trainer.training.anchor_stage import check_finite, run_fingerprint
from membank.trainer.training.checkpoint import StageCheckpoint, anchor_fingerprint
from membank.trainer.training.order import SequenceOrder
from membank.trainer.training.paths import distinct_blocks, join, leaf_path
from membank.trainer.training.prefetch import PrefetchConfig, PrefetchingMemory
from membank.trainer.training.progress import (
    Clock,
    LossLog,
    LossRecord,
    Meter,
    Phase,
    PhaseTimes,
    ProgressCallback,
    StageResult,
)
from membank.trainer.training.schedule import check_range, cosine_scale
from membank.trainer.training.sequences import batch_tensors
from membank.trainer.training.source import Acknowledged, MemorySource
from membank.wire.errors import FailedPreconditionError, Reason
from membank.wire.spec import Path as BlockPath


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryStageConfig:
    """How memories are trained. Learning rates and optimizer are the bank's own (`BankSpec`)."""

    num_tokens: int
    """Positions to train on by all workers together, filling included; rounded up to batches."""
    batch_size: int = 16
    """Sequences of a batch of one worker; a multiple of `run_length`."""
    run_length: int = 2
    """Sequences of one leaf that come together: more touch fewer blocks per batch."""
    final_scale: float = 0.1
    """Factor on the learning rates at the end, 0 to 1."""
    warmup_fraction: float = 0.03
    """Part of the run that warms up, in [0, 1)."""
    seed: int = 0
    """Seed of the order of sequences, >= 0."""
    prefetch: PrefetchConfig = field(default_factory=PrefetchConfig)
    """How far blocks are fetched ahead; decides when they travel, not what is computed."""
    max_refused_share: float = 0.5
    """Largest share of refused gradients over about the last 1,000 before the stage gives up,
    0 to 1; 1 never does."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "batch_size", "run_length"):
            check_range(name, getattr(self, name), 1, float("inf"), open_high=True)
        check_range("seed", self.seed, 0, float("inf"), open_high=True)
        check_range("warmup_fraction", self.warmup_fraction, 0, 1, open_high=True)
        for name in ("final_scale", "max_refused_share"):
            check_range(name, getattr(self, name), 0, 1, open_high=False)

    def num_steps(self, seq_len: int, world_size: int = 1) -> int:
        """Return the steps of one worker that `num_tokens` take."""
        return -(-self.num_tokens // (self.batch_size * seq_len * world_size))


def train_memories(
    anchor: Anchor,
    source: MemorySource,
    sequences: PackedSequences,
    config: MemoryStageConfig,
    *,
    rank: int = 0,
    world_size: int = 1,
    checkpoint: StageCheckpoint | None = None,
    losses: Path | None = None,
    on_progress: ProgressCallback | None = None,
    clock: Clock = time.monotonic,
) -> StageResult:
    """Train the blocks of `source` on this worker's share of the sequences.

    Parameters
    ----------
    anchor
        The anchor, on any device; it is frozen here and left otherwise alone.
    source
        The bank. One with a single leaf (generic memory) gets every sequence, so that the control
        sees the same sequences in the same order.
    sequences
        Packed documents, each sequence of one leaf.
    config
        How to train.
    rank, world_size
        Which of how many workers this is; workers share nothing but the bank.
    checkpoint
        Where the position is kept and gone on from; None keeps none.
    losses
        File of JSON lines for the loss of every step; None keeps none.
    on_progress
        Told about twice a second.
    clock
        Time, in seconds.

    Returns
    -------
    StageResult
        What this process did. Refused gradients are counted in it: they changed nothing, and the
        next fetch of their block brings its new version or ends the path there.

    Raises
    ------
    FailedPreconditionError
        `checkpoint` is of another run, or too many gradients were refused: workers are further
        apart than the bank's `max_staleness` allows, or the blocks are withheld or deleted.
    InternalError
        The loss is not finite; lower the learning rates.
    MembankError
        The bank cannot answer.
    """
    anchor.requires_grad_(False)
    times = PhaseTimes(clock)
    trainer = _Trainer(anchor, source, sequences, config, rank, world_size, times)
    run = run_fingerprint(
        config, sequences, anchor_fingerprint(anchor), f"{source.spec!r} {rank}/{world_size}"
    )
    first = 0 if checkpoint is None else checkpoint.load(run)
    meter = Meter(
        "memories", first_step=first, num_steps=trainer.num_steps, callback=on_progress, clock=clock
    )
    refusals = RefusalCount(config.max_refused_share)

    def settle(acknowledged: Iterable[Acknowledged]) -> None:
        for push in acknowledged:
            refusals.count(push)
            if checkpoint is not None:
                checkpoint.acknowledge(push.step, run)

    with ExitStack() as stack:
        log = stack.enter_context(LossLog(losses, first_step=first))
        memory = source
        if config.prefetch.depth:
            refs = (distinct_blocks(trainer.paths(s)) for s in range(first, trainer.num_steps))
            memory = stack.enter_context(PrefetchingMemory(source, refs, config.prefetch))
        for step in range(first, trainer.num_steps):
            loss, num_scored, acknowledged = trainer.step(memory, step)
            settle(acknowledged)
            log.add(LossRecord(step=step, loss=loss, num_tokens=num_scored, time_s=meter.elapsed_s))
            meter.add(step, loss, trainer.positions_per_step, num_refused=refusals.total)
        settle(memory.flush())
    if checkpoint is not None:
        checkpoint.finish(run)
    return meter.result(refusals.by_reason, times.seconds)


class _Trainer:
    """Does single steps; holds no state that a resume would need."""

    def __init__(
        self,
        anchor: Anchor,
        source: MemorySource,
        sequences: PackedSequences,
        config: MemoryStageConfig,
        rank: int,
        world_size: int,
        times: PhaseTimes,
    ) -> None:
        self._anchor = anchor
        self._times = times
        self._spec = source.spec
        self._sequences = sequences
        self._config = config
        self._order = SequenceOrder(
            sequences.leaf_N,
            batch_size=config.batch_size,
            run_length=config.run_length,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
        )
        self.num_steps = config.num_steps(sequences.seq_len, world_size)
        self.positions_per_step = config.batch_size * sequences.seq_len

    def paths(self, step: int) -> list[BlockPath]:
        """Return the path of each sequence of a batch."""
        leaves_B = self._sequences.leaf_N[self._order.rows(step)]
        return [leaf_path(self._spec, int(leaf)) for leaf in leaves_B]

    def step(self, memory: MemorySource, step: int) -> tuple[float, int, tuple[Acknowledged, ...]]:
        device = self._anchor.embedding.weight.device
        spent_in = self._times.spent_in
        with spent_in(Phase.LOAD):
            rows_B = self._order.rows(step)
            tokens_BT, segments_BT = batch_tensors(self._sequences, rows_B, device)
            paths_B = self.paths(step)
        with spent_in(Phase.FETCH):
            fetched = memory.fetch(distinct_blocks(paths_B))
        with spent_in(Phase.JOIN):
            batch = join(self._spec, paths_B, fetched, trained=True, device=device)
        with spent_in(Phase.FORWARD):
            logits_BTV = self._anchor(tokens_BT, segments_BT, batch.memory)
            loss, num_scored = next_token_loss(logits_BTV, tokens_BT, segments_BT)
            value = float(loss.detach())
            check_finite(value, "memories", step)
        with spent_in(Phase.BACKWARD):
            # Without any block (all withheld) nothing depends on a leaf: there is nothing to push.
            if loss.requires_grad:
                loss.backward()
            gradients = batch.gradients()
        with spent_in(Phase.PUSH):
            acknowledged = memory.push(
                gradients,
                {ref: fetched.versions[ref] for ref in gradients},
                step=step,
                learning_rate_scale=self._scale(step),
            )
        return value, num_scored, acknowledged

    def _scale(self, step: int) -> float:
        return cosine_scale(
            step,
            self.num_steps,
            warmup_fraction=self._config.warmup_fraction,
            final_scale=self._config.final_scale,
        )


class RefusalCount:
    """Counts refused gradients, and gives up where too many of the recent ones were.

    Parameters
    ----------
    max_share
        Largest share of refused ones among the last `window`, 0 to 1; 1 never gives up.
    window
        Gradients looked back at; fewer are never too many.
    """

    def __init__(self, max_share: float, *, window: int = 1000) -> None:
        self._max_share = max_share
        self._recent: deque[bool] = deque(maxlen=window)
        self._window = window
        self.by_reason: Counter[str] = Counter()
        """Refused gradients by reason, since the beginning."""

    @property
    def total(self) -> int:
        """Refused gradients since the beginning."""
        return self.by_reason.total()

    def count(self, push: Acknowledged) -> None:
        """Count one push.

        Raises
        ------
        FailedPreconditionError
            Too many of the recent gradients were refused.
        """
        for result in push.results:
            self._recent.append(not result.accepted)
            if not result.accepted:
                self.by_reason[result.reason.value if result.reason else "UNSAID"] += 1
        share = sum(self._recent) / self._window
        if len(self._recent) == self._window and share > self._max_share:
            raise FailedPreconditionError(
                f"{share:.0%} of the last {self._window} gradients were refused "
                f"({dict(self.by_reason)}); use fewer workers or raise the bank's max_staleness",
                reason=Reason.STALE_VERSION,
            )
