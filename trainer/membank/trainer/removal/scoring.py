"""Token by token: how likely a model finds a continuation, with the memory it would fetch for it.

Shape suffixes: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from membank.trainer.evaluation.token_losses import padded
from membank.trainer.model import Anchor, MemoryBatch, generate
from membank.trainer.training import Fetched, distinct_blocks, join
from membank.wire.spec import BankSpec, BlockRef, Path

_BATCH_SIZE = 64


class Blocks(Protocol):
    """Where the blocks of a model under test come from; a `MemorySource` is one."""

    @property
    def spec(self) -> BankSpec:
        """What the bank is."""
        ...

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        """Return blocks, none asked for twice."""
        ...


class ZeroedBlocks:
    """The same bank with the blocks of some topics zero: emptied, not deleted.

    Parameters
    ----------
    blocks
        The bank.
    topics
        Topics whose blocks are zero, with everything below them.
    """

    def __init__(self, blocks: Blocks, topics: Collection[BlockRef]) -> None:
        self._blocks = blocks
        self._topics = frozenset(topics)

    @property
    def spec(self) -> BankSpec:
        # docstring inherited
        return self._blocks.spec

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        # docstring inherited
        found = self._blocks.fetch(refs)
        weights = {
            ref: weight
            if self._topics.isdisjoint(self.spec.path_to(ref))
            else torch.zeros_like(weight)
            for ref, weight in found.weights.items()
        }
        return replace(found, weights=weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model under test: a transformer, and the bank it fetches from."""

    anchor: Anchor
    """The transformer; for a dense model, all of it."""
    bank: Blocks | None = None
    """Where blocks come from; None = no memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """A text to be scored, in two parts."""

    prompt: tuple[int, ...]
    """Tokens that are given, at least one."""
    tokens: tuple[int, ...]
    """Tokens that are scored, at least one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScores:
    """What a model gives the T tokens of a continuation."""

    log_probs: NDArray[np.float64]
    """(T,) log-probability of each token, in nats."""
    hits: NDArray[np.bool_]
    """(T,) whether it is the most likely one."""

    @property
    def loss(self) -> float:
        """Mean loss, in nats per token."""
        return -float(self.log_probs.mean())


@torch.inference_mode()
def score(
    model: Model, texts: Sequence[Continuation], paths: Sequence[Path] | None = None
) -> list[TokenScores]:
    """Return the scores of each continuation, given its prompt.

    Parameters
    ----------
    model
        The model.
    texts
        What to score.
    paths
        Path of each text; None = no memory for any. A path ends at a block that is deleted.

    Returns
    -------
    list[TokenScores]
        In the order of `texts`.
    """
    found: list[TokenScores | None] = [None] * len(texts)
    for rows, memory in _batches(model, len(texts), paths):
        tokens_BT = padded([(*texts[row].prompt, *texts[row].tokens) for row in rows])
        log_probs_BTV = model.anchor(tokens_BT, None, memory)[:, :-1].float().log_softmax(-1)
        likeliest_BT = log_probs_BTV.argmax(-1)
        log_probs_BT = log_probs_BTV.gather(2, tokens_BT[:, 1:, None])[:, :, 0]
        hits_BT = likeliest_BT == tokens_BT[:, 1:]
        for i, row in enumerate(rows):
            # Position t predicts the token after it.
            first = len(texts[row].prompt) - 1
            part = slice(first, first + len(texts[row].tokens))
            found[row] = TokenScores(
                log_probs=log_probs_BT[i, part].double().numpy(), hits=hits_BT[i, part].numpy()
            )
    return [scores for scores in found if scores is not None]


@torch.inference_mode()
def last_logits(
    model: Model, prompts: Sequence[Sequence[int]], paths: Sequence[Path]
) -> list[Tensor]:
    """Return the logits after each prompt, (V,) float32, each prompt computed alone.

    Alone, because the bits of a sum may depend on what else is in the batch.
    """
    refs = distinct_blocks(paths)
    fetched = model.bank.fetch(refs) if model.bank is not None else None
    found = []
    for prompt, path in zip(prompts, paths, strict=True):
        memory = _memory(model, [path], fetched)
        found.append(model.anchor(torch.tensor([list(prompt)]), None, memory)[0, -1].clone())
    return found


def complete(
    model: Model,
    prompts: Sequence[Sequence[int]],
    paths: Sequence[Path] | None,
    *,
    max_new_tokens: int,
    stop_token: int,
) -> list[list[int]]:
    """Return the greedy completion of each prompt, in their order."""
    found: list[list[int]] = [[] for _ in prompts]
    for rows, memory in _batches(model, len(prompts), paths):
        completions = generate(
            model.anchor, [prompts[row] for row in rows], memory,
            max_new_tokens=max_new_tokens, stop_token=stop_token,
        )  # fmt: skip
        for row, completion in zip(rows, completions, strict=True):
            found[row] = completion
    return found


def _batches(
    model: Model, count: int, paths: Sequence[Path] | None
) -> Iterator[tuple[list[int], MemoryBatch | None]]:
    if model.bank is None or paths is None:
        order, fetched = list(range(count)), None
    else:
        # Texts of one path beside each other: its weights are then read once for all of them.
        order = sorted(range(count), key=lambda row: paths[row])
        fetched = model.bank.fetch(distinct_blocks(paths))
    for start in range(0, count, _BATCH_SIZE):
        rows = order[start : start + _BATCH_SIZE]
        chosen = [paths[row] for row in rows] if paths is not None else []
        yield rows, _memory(model, chosen, fetched)


def _memory(model: Model, paths: Sequence[Path], fetched: Fetched | None) -> MemoryBatch | None:
    if model.bank is None or fetched is None:
        return None
    return join(model.bank.spec, paths, fetched).memory
