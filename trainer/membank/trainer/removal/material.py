"""What is removed and what it is measured on: documents, facts with wrong answers, held-out texts.

Positions are those of the corpus's documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from membank.trainer.corpus import Corpus, Fact
from membank.trainer.removal.config import RemovalConfig
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import BlockRef

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A fact with the answers that are wrong for it."""

    fact: Fact
    """The fact."""
    wrong: tuple[str, ...]
    """Answers of its neighbours: other facts of the relation, the nearest in the corpus first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicMaterial:
    """One topic: what a removal of it takes away, and what that is measured on."""

    label: str
    """Coarsest label of its documents."""
    clusters: tuple[BlockRef, ...]
    """The level-1 topics of the bank that are deleted for it."""
    members: NDArray[np.int64]
    """(N,) documents that models are trained on: all of these clusters, whatever their label."""
    held_out: NDArray[np.int64]
    """(M,) documents of these clusters that no model is trained on."""
    questions: tuple[Question, ...]
    """The asked facts that the members state."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Material:
    """What one seed of the study trains and measures on."""

    corpus: Corpus
    """The corpus."""
    leaves: NDArray[np.int64]
    """(documents,) leaf of each document."""
    trained: NDArray[np.bool_]
    """(documents,) False where a document is held out."""
    topics: tuple[TopicMaterial, ...]
    """The topics to be removed, one at a time."""

    def topic(self, label: str) -> TopicMaterial:
        """Return a topic by its label."""
        return next(topic for topic in self.topics if topic.label == label)

    def blind(self) -> NDArray[np.bool_]:
        """Return what an anchor is trained on that never sees any of the topics, (documents,)."""
        kept = self.trained.copy()
        for topic in self.topics:
            kept[topic.members] = False
        return kept

    def without(self, label: str) -> NDArray[np.bool_]:
        """Return what is trained on where a topic is left out, (documents,)."""
        kept = self.trained.copy()
        kept[self.topic(label).members] = False
        return kept


def make_material(
    corpus: Corpus, leaves: NDArray[np.int64], config: RemovalConfig, *, seed: int
) -> Material:
    """Choose held-out documents and gather the topics.

    Parameters
    ----------
    corpus
        The corpus.
    leaves
        (documents,) leaf of each document, -1 = none.
    config
        The study.
    seed
        Seed of the choice.

    Raises
    ------
    InvalidArgumentError
        A topic has no cluster of its own, or no fact to ask.
    """
    rng = np.random.Generator(np.random.PCG64([seed, 17]))
    trained = rng.random(len(corpus.documents)) >= config.held_out_share
    below = math.prod(config.run.tree.fan_outs[1:])
    cluster_of = np.where(leaves >= 0, leaves // below, -1)
    labels = np.array([(doc.labels or ("",))[0] for doc in corpus.documents])
    topics = tuple(
        _topic(corpus, cluster_of, labels, trained, label, config) for label in config.topics
    )
    return Material(corpus=corpus, leaves=leaves, trained=trained, topics=topics)


def neighbours_answers(facts: Sequence[Fact], row: int, count: int) -> tuple[str, ...]:
    """Return answers of other facts of the same relation, the nearest ones in order first.

    Parameters
    ----------
    facts
        Facts of one relation, in corpus order.
    row
        The fact that they are to be wrong for.
    count
        How many to return at most; none twice, and never the right one.
    """
    found: list[str] = []
    for distance in range(1, len(facts)):
        for other in (row + distance, row - distance):
            if 0 <= other < len(facts) and len(found) < count:
                answer = facts[other].answer
                if answer != facts[row].answer and answer not in found:
                    found.append(answer)
    return tuple(found)


def spread(values: Sequence[Item], limit: int) -> tuple[Item, ...]:
    """Return at most so many values, evenly spread over all of them, in their order."""
    if len(values) <= limit:
        return tuple(values)
    return tuple(values[round(i)] for i in np.linspace(0, len(values) - 1, limit))


def _topic(
    corpus: Corpus,
    cluster_of: NDArray[np.int64],
    labels: NDArray[np.str_],
    trained: NDArray[np.bool_],
    label: str,
    config: RemovalConfig,
) -> TopicMaterial:
    clusters = [
        int(cluster)
        for cluster in np.unique(cluster_of[cluster_of >= 0])
        if np.mean(labels[cluster_of == cluster] == label) > 0.5
    ]
    inside = np.isin(cluster_of, clusters)
    questions = _questions(corpus, inside & trained, label, config.num_wrong)
    if not questions:
        raise InvalidArgumentError(
            f"topic {label!r} has no cluster with facts in corpus {corpus.name!r}; name others "
            f"of {', '.join(sorted({fact.topic for fact in corpus.facts}))}",
            reason=Reason.BAD_CONFIG,
        )
    return TopicMaterial(
        label=label,
        clusters=tuple(BlockRef(1, cluster) for cluster in clusters),
        members=np.flatnonzero(inside & trained),
        held_out=np.flatnonzero(inside & ~trained),
        questions=spread(questions, config.max_facts),
    )


def _questions(
    corpus: Corpus, trained: NDArray[np.bool_], label: str, num_wrong: int
) -> tuple[Question, ...]:
    relations = dict.fromkeys(fact.relation for fact in corpus.facts if fact.topic == label)
    questions: list[Question] = []
    for relation in relations:
        facts = corpus.facts_of(relation)
        questions += [
            Question(fact=fact, wrong=neighbours_answers(facts, row, num_wrong))
            for row, fact in enumerate(facts)
            if trained[corpus.index[fact.doc_id]]
        ]
    return tuple(questions)
