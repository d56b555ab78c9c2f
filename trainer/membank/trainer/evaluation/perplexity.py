"""Perplexity of documents per topic, under every memory condition side by side.

Shape suffixes: N documents, B documents of a batch, T tokens.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from membank.trainer.corpus import Tokenizer
from membank.trainer.evaluation.conditions import Condition, ConditionMemory, EvaluationPaths
from membank.trainer.evaluation.token_losses import token_losses
from membank.trainer.model import Anchor
from membank.trainer.training import MemorySource
from membank.wire.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicPerplexity:
    """Perplexity of the documents of one topic."""

    topic: str
    """Name of the topic."""
    num_documents: int
    """Documents scored."""
    num_tokens: int
    """Tokens scored; the first of each document is not."""
    perplexity: Mapping[str, float]
    """exp of the mean loss per token, by condition."""
    without_level: tuple[float, ...]
    """The same with the fetched path less its block of each level, coarsest first. The highest of
    them is ``perplexity["withheld"]``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerplexityReport:
    """Perplexity of every topic."""

    topics: Mapping[str, TopicPerplexity]
    """By name of the topic."""

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON-able values."""
        return {"topics": {name: asdict(topic) for name, topic in self.topics.items()}}


def evaluate_perplexity(
    anchor: Anchor,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    topics: Sequence[str],
    *,
    memory: MemorySource,
    generic: MemorySource | None,
    paths: EvaluationPaths,
    seq_len: int = 64,
    max_documents_per_topic: int = 64,
    seed: int = 0,
    batch_size: int = 32,
) -> PerplexityReport:
    """Score documents with each kind of memory.

    Parameters
    ----------
    anchor, tokenizer
        The model and its vocabulary.
    texts
        Documents.
    topics
        Topic of each document.
    memory
        The bank, in process or served.
    generic
        The generic memory; None leaves that condition out.
    paths
        Paths of each document; `routed` from its own text, as in the paper.
    seq_len
        Tokens of a document that are scored at most, at least 2.
    max_documents_per_topic
        Documents drawn from each topic at most, at least 1.
    seed
        Seed of that draw and of the random leaves.
    batch_size
        Documents scored together, at least 1.

    Returns
    -------
    PerplexityReport
        Perplexity by topic and condition.

    Raises
    ------
    InvalidArgumentError
        `texts`, `topics` and `paths` differ in length.
    """
    if not len(texts) == len(topics) == len(paths.routed):
        raise InvalidArgumentError(
            f"{len(texts)} texts, {len(topics)} topics and {len(paths.routed)} paths; each text "
            "has one of both"
        )
    drawn = _draw(topics, max_documents_per_topic, seed)
    tokens = tokenizer.encode_batch([texts[row] for row in drawn])
    # A document of one token has nothing to be scored.
    long_enough = [i for i, ids in enumerate(tokens) if len(ids) > 1]
    ids_N = [tokens[i][:seq_len] for i in long_enough]
    rows = [drawn[i] for i in long_enough]
    device = anchor.embedding.weight.device
    memories = ConditionMemory(memory, generic, paths.select(rows), seed=seed, device=device)
    losses = {
        str(condition): _losses(anchor, ids_N, memories, condition, None, batch_size)
        for condition in memories.conditions
    }
    ablated = [
        _losses(anchor, ids_N, memories, Condition.FETCHED, level, batch_size)
        for level in range(1, memories.num_levels + 1)
    ]
    members: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        members[topics[row]].append(i)
    return PerplexityReport(
        topics={
            topic: _topic(topic, group, ids_N, losses, ablated)
            for topic, group in sorted(members.items())
        }
    )


def _topic(
    topic: str,
    group: Sequence[int],
    ids_N: Sequence[Sequence[int]],
    losses: Mapping[str, Sequence[float]],
    ablated: Sequence[Sequence[float]],
) -> TopicPerplexity:
    num_tokens = sum(len(ids_N[i]) - 1 for i in group)

    def perplexity(losses_N: Sequence[float]) -> float:
        return math.exp(sum(losses_N[i] for i in group) / num_tokens)

    without_level = tuple(perplexity(losses_N) for losses_N in ablated)
    return TopicPerplexity(
        topic=topic,
        num_documents=len(group),
        num_tokens=num_tokens,
        perplexity={
            **{name: perplexity(losses_N) for name, losses_N in losses.items()},
            str(Condition.WITHHELD): max(without_level),
        },
        without_level=without_level,
    )


def _draw(topics: Sequence[str], limit: int, seed: int) -> list[int]:
    rng = np.random.Generator(np.random.PCG64(seed))
    members: dict[str, list[int]] = defaultdict(list)
    for row, topic in enumerate(topics):
        members[topic].append(row)
    drawn: list[int] = []
    for topic in sorted(members):
        drawn += sorted(rng.permutation(members[topic])[:limit].tolist())
    return drawn


@torch.inference_mode()
def _losses(
    anchor: Anchor,
    ids_N: Sequence[Sequence[int]],
    memories: ConditionMemory,
    condition: Condition,
    without_level: int | None,
    batch_size: int,
) -> list[float]:
    """Return the summed loss of each document, nats."""
    losses_N = [0.0] * len(ids_N)
    order = memories.order(condition)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        memory = memories.batch(condition, rows, without_level=without_level)
        loss_BT = token_losses(anchor, [ids_N[row] for row in rows], memory)
        for row, value in zip(rows, loss_BT.sum(1).tolist(), strict=True):
            losses_N[row] = value
    return losses_N
