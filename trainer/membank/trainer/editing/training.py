"""Trains one block on facts, while guards hold it to what it answered before.

Life of a training: the block's copy is a leaf of autograd, everything else is frozen. The loss is the
cross-entropy of the targets, plus the divergence from what the block answered before at the guarded
prompts and in the training sequences of its own leaf. It ends as soon as every fact is answered with
confidence and no guarded token has changed; else the best content seen is kept.

Shape suffixes: B sequences, T tokens, V vocabulary, N predicted tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from membank.trainer.editing.answers import Answers, Continuations, path_memory
from membank.trainer.editing.config import EditConfig
from membank.trainer.editing.contract import BlockTraining
from membank.trainer.model import PADDING_SEGMENT
from membank.wire.spec import BlockRef, Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Training sequences of a leaf."""

    tokens_BT: Tensor
    """(B, T) int64."""
    segments_BT: Tensor
    """(B, T) int64: documents of each sequence, -1 = padding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTask:
    """What one block is to learn and to keep."""

    path: Path
    """Path whose last block is trained; those above it stay as they are."""
    facts: tuple[tuple[str, str], ...]
    """Prompts and targets; at least one."""
    guards: tuple[str, ...]
    """Prompts whose answers must stay: given neighbours and earlier edits."""
    replay: Replay | None
    """The leaf's own training sequences; None = not at hand."""

    @property
    def ref(self) -> BlockRef:
        """The block that is trained."""
        return self.path[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedBlock:
    """New content of a block, and how it came about."""

    weight: Tensor
    """(L, P, R, D) float32."""
    training: BlockTraining
    """How it went."""


def train_block(
    answers: Answers,
    task: BlockTask,
    weights: Mapping[BlockRef, Tensor],
    config: EditConfig,
    *,
    version: int,
) -> TrainedBlock:
    """Train a copy of one block.

    Parameters
    ----------
    answers
        Anchor and tokenizer.
    task
        What to learn and what to keep.
    weights
        (L, P, R, D) float32 of each block of the path; not changed.
    config
        How to train.
    version
        Version of the block, for the report.

    Returns
    -------
    TrainedBlock
        The first content with which everything is learnt and kept; without one, that with most
        facts learnt, of these the one that keeps most.

    Notes
    -----
    The same arguments give the same bits on the same machine with as many threads.
    """
    return _Training(answers, task, weights, config).run(version)


@dataclass(frozen=True, slots=True)
class _Seen:
    least_probability: float
    learnt_share: float
    kept_share: float

    def is_enough(self, config: EditConfig) -> bool:
        return self.least_probability >= config.target_probability and self.kept_share == 1.0

    @property
    def rank(self) -> tuple[float, float, float]:
        return self.learnt_share, self.kept_share, self.least_probability


class _Training:
    """One training: what is asked at each step is one batch, the facts first and then guards."""

    def __init__(
        self,
        answers: Answers,
        task: BlockTask,
        weights: Mapping[BlockRef, Tensor],
        config: EditConfig,
    ) -> None:
        self._answers = answers
        self._task = task
        self._weights = weights
        self._config = config
        self._draw = torch.Generator().manual_seed(config.seed)
        before = weights[task.ref]
        self._batch = Continuations.of([*self._facts(), *self._guarded()])
        self._num_fact_tokens = int(self._batch.predicts_BT[: len(task.facts)].sum())
        with torch.no_grad():
            log_NV = self._logs(self._batch, before)[self._num_fact_tokens :]
            counts = self._batch.predicts_BT[len(task.facts) :].sum(1).tolist()
            # Per guard, (N, V): what it answered before.
            self._guards_log = torch.split(log_NV, counts)
            self._replayed = self._replay_logs(before)

    def run(self, version: int) -> TrainedBlock:
        start = time.perf_counter()
        config = self._config
        weight = self._weights[self._task.ref].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([weight], lr=config.learning_rate, betas=(0.9, 0.95))
        best, best_weight, best_step = self._look(weight), weight.detach().clone(), 0
        for step in range(1, config.max_steps + 1):
            if best.is_enough(config):
                break
            optimizer.zero_grad()
            self._loss(weight).backward()
            optimizer.step()
            if step % config.check_every and step != config.max_steps:
                continue
            seen = self._look(weight)
            if seen.rank > best.rank:
                best, best_weight, best_step = seen, weight.detach().clone(), step
        return TrainedBlock(
            weight=best_weight,
            training=BlockTraining(
                ref=str(self._task.ref),
                version=version,
                steps=best_step,
                num_facts=len(self._task.facts),
                num_guards=len(self._task.guards),
                least_probability=best.least_probability,
                kept_share=best.kept_share,
                seconds=time.perf_counter() - start,
            ),
        )

    def _loss(self, weight: Tensor) -> Tensor:
        num_facts = len(self._task.facts)
        drawn = self._drawn(len(self._task.guards), self._config.guard_batch)
        part = self._batch.rows(torch.cat((torch.arange(num_facts), num_facts + drawn)))
        log_NV = self._logs(part, weight)
        fact_NV, guard_NV = log_NV[: self._num_fact_tokens], log_NV[self._num_fact_tokens :]
        loss = functional.nll_loss(fact_NV, self._targets_N())
        if len(guard_NV):
            then_NV = torch.cat([self._guards_log[int(row)] for row in drawn])
            loss = loss + self._config.guard_weight * _divergence(then_NV, guard_NV)
        if self._replayed is not None:
            loss = loss + self._config.guard_weight * self._replay_loss(self._replayed, weight)
        return loss

    def _replay_loss(self, replayed: _Replayed, weight: Tensor) -> Tensor:
        rows = self._drawn(len(replayed.tokens_BT), self._config.replay_batch)
        now_BTV = self._log_softmax(replayed.tokens_BT[rows], replayed.segments_BT[rows], weight)
        scored_BT = replayed.scored_BT[rows]
        if not bool(scored_BT.any()):
            return now_BTV.sum() * 0
        return _divergence(replayed.log_BTV[rows][scored_BT], now_BTV[scored_BT])

    @torch.no_grad()
    def _look(self, weight: Tensor) -> _Seen:
        log_NV = self._logs(self._batch, weight)
        fact_NV, guard_NV = log_NV[: self._num_fact_tokens], log_NV[self._num_fact_tokens :]
        targets_N = self._targets_N()
        right_N = fact_NV.argmax(-1) == targets_N
        return _Seen(
            least_probability=float(fact_NV.gather(1, targets_N[:, None]).min().exp()),
            learnt_share=float(right_N.float().mean()),
            kept_share=self._kept_share(guard_NV),
        )

    def _kept_share(self, now_NV: Tensor) -> float:
        if not len(now_NV):
            return 1.0
        highest_N, then_N = torch.cat(self._guards_log).max(-1)
        decided_N = highest_N.exp() >= self._config.decided_probability
        kept_N = (now_NV.argmax(-1) == then_N)[decided_N]
        return float(kept_N.float().mean()) if len(kept_N) else 1.0

    def _facts(self) -> list[tuple[list[int], list[int]]]:
        encode, target_tokens = self._answers.tokenizer.encode, self._answers.target_tokens
        return [(encode(prompt), target_tokens(target)) for prompt, target in self._task.facts]

    def _guarded(self) -> list[tuple[list[int], list[int]]]:
        """Return the guarded prompts with what the block answers to them before."""
        if not self._task.guards:
            return []
        most = self._config.guard_tokens
        found = self._answers.complete_tokens(
            self._task.path, self._weights, self._task.guards, max_new_tokens=most
        )
        tokenizer = self._answers.tokenizer
        return [
            # With the end of the statement, which is a part of the answer.
            (tokenizer.encode(prompt), [*answer, tokenizer.eot_id][:most])
            for prompt, answer in zip(self._task.guards, found, strict=True)
        ]

    def _replay_logs(self, weight: Tensor) -> _Replayed | None:
        replay = self._task.replay
        if replay is None or not self._config.replay_batch:
            return None
        after_BT = functional.pad(replay.segments_BT[:, 1:], (0, 1), value=PADDING_SEGMENT)
        scored_BT = (after_BT == replay.segments_BT) & (after_BT != PADDING_SEGMENT)
        for prompt, _ in self._task.facts:
            prompt_T = torch.tensor(self._answers.tokenizer.encode(prompt))
            _unscore(scored_BT, replay, prompt_T)
        return _Replayed(
            tokens_BT=replay.tokens_BT,
            segments_BT=replay.segments_BT,
            scored_BT=scored_BT,
            log_BTV=self._log_softmax(replay.tokens_BT, replay.segments_BT, weight),
        )

    def _targets_N(self) -> Tensor:
        return self._batch.next_BT[self._batch.predicts_BT][: self._num_fact_tokens]

    def _logs(self, batch: Continuations, weight: Tensor) -> Tensor:
        return self._log_softmax(batch.tokens_BT, None, weight)[batch.predicts_BT]

    def _log_softmax(self, tokens_BT: Tensor, segments_BT: Tensor | None, weight: Tensor) -> Tensor:
        memory = path_memory(
            self._task.path, {**self._weights, self._task.ref: weight}, len(tokens_BT)
        )
        return functional.log_softmax(
            self._answers.anchor(tokens_BT, segments_BT, memory).float(), dim=-1
        )

    def _drawn(self, count: int, at_most: int) -> Tensor:
        return torch.randperm(count, generator=self._draw)[:at_most]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Replayed:
    """Training sequences with what the block said of them before, and where that is to stay."""

    tokens_BT: Tensor
    segments_BT: Tensor
    scored_BT: Tensor
    log_BTV: Tensor


def _divergence(then_NV: Tensor, now_NV: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence, in nats, from then to now."""
    return functional.kl_div(now_NV, then_NV, log_target=True, reduction="batchmean")


def _unscore(scored_BT: Tensor, replay: Replay, prompt_T: Tensor) -> None:
    """Leave out what follows the prompt in its document: the fact's old statement."""
    length = len(prompt_T)
    if length > replay.tokens_BT.shape[1]:
        return
    found_BS = (replay.tokens_BT.unfold(1, length, 1) == prompt_T).all(-1)
    for row, start in found_BS.nonzero().tolist():
        last = start + length - 1
        same_T = replay.segments_BT[row] == replay.segments_BT[row, last]
        same_T[:last] = False
        scored_BT[row, same_T] = False
