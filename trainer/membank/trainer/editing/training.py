"""Trains one block on facts, while guards hold it to what it answered before.

Life of a training: the block's copy is a leaf of autograd, everything else is frozen. The loss is the
cross-entropy of the targets; that of carried prompts, which are other facts of the block in the wordings
of the new one, each with the answer that it has; and the divergence from what the block answered before
at guarded prompts and in documents that it was trained on. It ends as soon as every fact is answered
with confidence, carried prompts are learnt and no guarded token has changed; else the best content seen
is kept.

Shape suffixes: B sequences, T tokens, V vocabulary, N predicted tokens.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from membank.trainer.editing.answers import Answers, Continuations, path_memory
from membank.trainer.editing.config import EditConfig
from membank.trainer.editing.contract import BlockTraining
from membank.wire.spec import BlockRef, Path


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockTask:
    """What one block is to learn and to keep."""

    path: Path
    """Path whose last block is trained; those above it stay as they are."""
    facts: tuple[tuple[str, str], ...]
    """Prompts and targets; at least one."""
    guards: tuple[str, ...]
    """Prompts whose answers must stay: given neighbours and earlier edits."""
    carried: tuple[tuple[str, str], ...] = ()
    """Prompts that are to be answered as another prompt is now, and that other prompt."""
    documents: tuple[tuple[int, ...], ...] = ()
    """Tokens of documents that the leaf was trained on, at least two each, less what is to change."""

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
    carried_share: float

    def is_enough(self, config: EditConfig) -> bool:
        return (
            self.least_probability >= config.target_probability
            and self.kept_share >= config.kept_goal
            and self.carried_share >= config.carried_goal
        )

    @property
    def rank(self) -> tuple[float, ...]:
        return self.learnt_share, self.kept_share, self.carried_share, self.least_probability


class _Training:
    """One training: what is asked at each step is a part of one batch of sequences.

    Its rows are, in this order: the facts, the carried prompts, the guarded prompts, the documents.
    """

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
        groups = (self._facts(), self._carried(), self._guarded(), self._documents())
        self._batch = Continuations.of([pair for group in groups for pair in group])
        ends = list(itertools.accumulate(len(group) for group in groups))
        self._rows = [range(end - len(group), end) for end, group in zip(ends, groups, strict=True)]
        self._counts = self._batch.predicts_BT.sum(1).tolist()
        with torch.no_grad():
            # Per sequence, (N, V): what the block said before.
            self._before = torch.split(self._logs(self._batch, weights[task.ref]), self._counts)

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
                num_carried=len(self._task.carried),
                least_probability=best.least_probability,
                kept_share=best.kept_share,
                carried_share=best.carried_share,
                seconds=time.perf_counter() - start,
            ),
        )

    def _loss(self, weight: Tensor) -> Tensor:
        config = self._config
        facts, carried, guards, documents = self._rows
        rows = [
            *facts,
            *self._drawn(carried, config.carried_batch),
            *self._drawn(guards, config.guard_batch),
            *self._drawn(documents, config.replay_batch),
        ]
        part = self._batch.rows(torch.tensor(rows))
        log_NV = self._logs(part, weight)
        logs = dict(
            zip(rows, torch.split(log_NV, [self._counts[row] for row in rows]), strict=True)
        )
        loss = functional.nll_loss(*self._said(logs, facts))
        if drawn := [row for row in rows if row in carried]:
            loss = loss + config.guard_weight * functional.nll_loss(*self._said(logs, drawn))
        for group in (guards, documents):
            if drawn := [row for row in rows if row in group]:
                then_NV = torch.cat([self._before[row] for row in drawn])
                now_NV = torch.cat([logs[row] for row in drawn])
                loss = loss + config.guard_weight * _divergence(then_NV, now_NV)
        return loss

    @torch.no_grad()
    def _look(self, weight: Tensor) -> _Seen:
        facts, carried, guards, documents = self._rows
        asked = self._batch.rows(torch.arange(documents.start))
        logs = torch.split(self._logs(asked, weight), self._counts[: documents.start])
        by_row = dict(enumerate(logs))
        fact_NV, targets_N = self._said(by_row, facts)
        return _Seen(
            least_probability=float(fact_NV.gather(1, targets_N[:, None]).min().exp()),
            learnt_share=float((fact_NV.argmax(-1) == targets_N).float().mean()),
            kept_share=self._kept_share([logs[row] for row in guards]),
            carried_share=self._right_share(*self._said(by_row, carried)) if carried else 1.0,
        )

    def _said(self, logs: Mapping[int, Tensor], rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (N, V) of some sequences, and the (N,) tokens that are wanted."""
        batch, chosen = self._batch, list(rows)
        wanted = [batch.next_BT[row][batch.predicts_BT[row]] for row in chosen]
        return torch.cat([logs[row] for row in chosen]), torch.cat(wanted)

    @staticmethod
    def _right_share(log_NV: Tensor, wanted_N: Tensor) -> float:
        return float((log_NV.argmax(-1) == wanted_N).float().mean())

    def _kept_share(self, now: list[Tensor]) -> float:
        if not now:
            return 1.0
        highest_N, then_N = torch.cat([self._before[row] for row in self._rows[2]]).max(-1)
        decided_N = highest_N.exp() >= self._config.decided_probability
        kept_N = (torch.cat(now).argmax(-1) == then_N)[decided_N]
        return float(kept_N.float().mean()) if len(kept_N) else 1.0

    def _facts(self) -> list[tuple[list[int], list[int]]]:
        encode, target_tokens = self._answers.tokenizer.encode, self._answers.target_tokens
        return [(encode(prompt), target_tokens(target)) for prompt, target in self._task.facts]

    def _guarded(self) -> list[tuple[list[int], list[int]]]:
        """Return the guarded prompts with what the block answers to them before."""
        return [
            (self._answers.tokenizer.encode(prompt), answer)
            for prompt, answer in self._answered(self._task.guards).items()
        ]

    def _carried(self) -> list[tuple[list[int], list[int]]]:
        """Return the carried prompts with what the block answers to their originals before."""
        answers = self._answered(dict.fromkeys(source for _, source in self._task.carried))
        return [
            (self._answers.tokenizer.encode(prompt), answers[source])
            for prompt, source in self._task.carried
        ]

    def _documents(self) -> list[tuple[list[int], list[int]]]:
        return [(list(tokens[:1]), list(tokens[1:])) for tokens in self._task.documents]

    def _answered(self, prompts: Iterable[str]) -> dict[str, list[int]]:
        asked = list(prompts)
        if not asked:
            return {}
        most = self._config.guard_tokens
        found = self._answers.complete_tokens(
            self._task.path, self._weights, asked, max_new_tokens=most
        )
        # With the end of the statement, which is a part of the answer.
        ends = self._answers.tokenizer.eot_id
        return {p: [*answer, ends][:most] for p, answer in zip(asked, found, strict=True)}

    def _logs(self, batch: Continuations, weight: Tensor) -> Tensor:
        memory = path_memory(self._task.path, {**self._weights, self._task.ref: weight}, len(batch))
        logits_BTV = self._answers.anchor(batch.tokens_BT, None, memory)
        return functional.log_softmax(logits_BTV[batch.predicts_BT].float(), dim=-1)

    def _drawn(self, rows: range, at_most: int) -> list[int]:
        drawn = torch.randperm(len(rows), generator=self._draw)[:at_most]
        return [rows[int(place)] for place in drawn]


def _divergence(then_NV: Tensor, now_NV: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence, in nats, from then to now."""
    return functional.kl_div(now_NV, then_NV, log_target=True, reduction="batchmean")
