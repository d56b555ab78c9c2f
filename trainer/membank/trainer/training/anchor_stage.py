"""Stage 1: train the anchor on packed sequences, documents masked from each other.

A plain function of this process. Stage 1 has one model and one optimizer; at the sizes that fit a
few cores, threads share the work of a step better than processes that would average gradients of
the whole anchor, so the caller sets the number of threads and Ray is not needed.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from membank.trainer.corpus import PackedSequences
from membank.trainer.model import Anchor, next_token_loss
from membank.trainer.training.checkpoint import AnchorCheckpoint
from membank.trainer.training.order import SequenceOrder
from membank.trainer.training.progress import (
    Clock,
    LossLog,
    LossRecord,
    Meter,
    ProgressCallback,
    StageResult,
)
from membank.trainer.training.schedule import check_range, cosine_scale
from membank.trainer.training.sequences import batch_tensors
from membank.wire.errors import InternalError


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorStageConfig:
    """How the anchor is trained; the paper's optimizer, section A.1, at sizes of one's own."""

    num_tokens: int
    """Positions to train on, filling included; rounded up to whole batches."""
    batch_size: int = 16
    """Sequences of a batch, at least 1."""
    learning_rate: float = 3e-3
    """Peak learning rate, > 0."""
    final_scale: float = 0.1
    """Learning rate at the end, as a part of the peak, 0 to 1."""
    warmup_fraction: float = 0.03
    """Part of the run that warms up, in [0, 1)."""
    weight_decay: float = 0.05
    """Decoupled weight decay, on matrices alone; >= 0."""
    beta1: float = 0.9
    """Decay of AdamW's first moment, in [0, 1)."""
    beta2: float = 0.95
    """Decay of AdamW's second moment, in [0, 1)."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient, > 0."""
    seed: int = 0
    """Seed of the order of sequences, >= 0. The anchor's own start is the caller's."""
    checkpoint_every_s: float = 15.0
    """Seconds between checkpoints, >= 0; 0 writes one at every step."""

    def __post_init__(self) -> None:
        for name in ("num_tokens", "batch_size"):
            check_range(name, getattr(self, name), 1, float("inf"), open_high=True)
        for name in ("learning_rate", "grad_clip"):
            check_range(name, getattr(self, name), 1e-12, float("inf"), open_high=True)
        for name in ("weight_decay", "seed", "checkpoint_every_s"):
            check_range(name, getattr(self, name), 0, float("inf"), open_high=True)
        for name in ("warmup_fraction", "beta1", "beta2"):
            check_range(name, getattr(self, name), 0, 1, open_high=True)
        check_range("final_scale", self.final_scale, 0, 1, open_high=False)

    def num_steps(self, seq_len: int) -> int:
        """Return the steps that `num_tokens` take with sequences of `seq_len` tokens."""
        return -(-self.num_tokens // (self.batch_size * seq_len))


def train_anchor(
    anchor: Anchor,
    sequences: PackedSequences,
    config: AnchorStageConfig,
    *,
    checkpoint: Path | None = None,
    losses: Path | None = None,
    on_progress: ProgressCallback | None = None,
    clock: Clock = time.monotonic,
) -> StageResult:
    """Train an anchor in place.

    Parameters
    ----------
    anchor
        The anchor, on any device; its present weights are the start, unless `checkpoint` holds a
        later state.
    sequences
        Packed documents of all topics.
    config
        How to train.
    checkpoint
        File to keep the state in and to go on from; None keeps none.
    losses
        File of JSON lines for the loss of every step; None keeps none.
    on_progress
        Told about twice a second.
    clock
        Time, in seconds.

    Returns
    -------
    StageResult
        What this process did.

    Raises
    ------
    FailedPreconditionError
        `checkpoint` belongs to other sequences or another configuration.
    InternalError
        The loss is not finite; lower the learning rate.

    Notes
    -----
    The same steps after a resume give the same losses as without it, on the same machine and
    number of threads.
    """
    num_steps = config.num_steps(sequences.seq_len)
    optimizer = _optimizer(anchor, config)
    run = run_fingerprint(config, sequences)
    store = None if checkpoint is None else AnchorCheckpoint(path=checkpoint)
    first = 0 if store is None else store.load(anchor, optimizer, run=run)
    # Leaves do not matter here: all sequences are dealt as one.
    order = SequenceOrder(
        np.zeros(len(sequences), np.int64), batch_size=config.batch_size, seed=config.seed
    )
    meter = Meter(
        "anchor", first_step=first, num_steps=num_steps, callback=on_progress, clock=clock
    )
    device = anchor.embedding.weight.device
    saved_at = clock()
    with LossLog(losses, first_step=first) as log:
        for step in range(first, num_steps):
            tokens_BT, segments_BT = batch_tensors(sequences, order.rows(step), device)
            loss, num_scored = _step(anchor, optimizer, config, tokens_BT, segments_BT, step)
            log.add(LossRecord(step=step, loss=loss, num_tokens=num_scored, time_s=meter.elapsed_s))
            meter.add(step, loss, tokens_BT.numel())
            due = clock() - saved_at >= config.checkpoint_every_s or step + 1 == num_steps
            if store is not None and due:
                store.save(anchor, optimizer, step=step + 1, run=run)
                saved_at = clock()
    return meter.result()


def run_fingerprint(config: object, sequences: PackedSequences, *more: str) -> str:
    """Return a digest of all that decides the steps of a run: configuration, sequences, others."""
    body = json.dumps([repr(config), sequences.fingerprint, *more])
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def check_finite(loss: float, stage: str, step: int) -> None:
    """Raise `InternalError` if the loss of a step is not finite."""
    if not np.isfinite(loss):
        raise InternalError(
            f"the loss of stage {stage} is {loss} at step {step}; lower the learning rate"
        )


def _optimizer(anchor: Anchor, config: AnchorStageConfig) -> torch.optim.AdamW:
    # Norm weights are scales around 1; decay would pull them to 0.
    matrices = [p for p in anchor.parameters() if p.dim() > 1]
    scales = [p for p in anchor.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": scales, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def _step(
    anchor: Anchor,
    optimizer: torch.optim.AdamW,
    config: AnchorStageConfig,
    tokens_BT: Tensor,
    segments_BT: Tensor,
    step: int,
) -> tuple[float, int]:
    scale = cosine_scale(
        step,
        config.num_steps(tokens_BT.shape[1]),
        warmup_fraction=config.warmup_fraction,
        final_scale=config.final_scale,
    )
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate * scale
    loss, num_scored = next_token_loss(anchor(tokens_BT, segments_BT), tokens_BT, segments_BT)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(anchor.parameters(), config.grad_clip)
    optimizer.step()
    value = float(loss.detach())
    check_finite(value, "anchor", step)
    return value, num_scored
