"""Scores of a tree: against true topics, and for routing questions to what answers them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import normalized_mutual_info_score

from membank.client.retriever import Retriever
from membank.trainer.corpus import Corpus, Document, Fact
from membank.trainer.tree._fit import TopicTree


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelScore:
    """How one level of a tree agrees with one level of true labels."""

    level: int
    """Level of the tree, 1 = coarsest."""
    label_depth: int
    """Depth of the labels, 1 = coarsest."""
    nmi: float
    """Normalised mutual information, 0 to 1."""
    purity: float
    """Share of documents whose label is the most frequent one of their cluster, 0 to 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingScore:
    """Where the questions about one relation are routed."""

    relation: str
    """Name of the relation."""
    num_facts: int
    """Number of facts."""
    prompts: tuple[float, ...]
    """Share of prompts routed to the cluster of their document, per level, 0 to 1."""
    paraphrases: tuple[float, ...]
    """The same for paraphrases; empty where there are none."""


def topic_scores(documents: Sequence[Document], tree: TopicTree) -> list[LevelScore]:
    """Compare each level of a tree with each depth of the true labels.

    Documents without a label of a depth are left out there; a depth without any is left out.
    """
    depth = max((len(document.labels) for document in documents), default=0)
    scores = []
    for level in range(1, tree.num_levels + 1):
        clusters = tree.clusters(level)
        for i in range(depth):
            rows = [n for n, document in enumerate(documents) if len(document.labels) > i]
            truth = [documents[n].labels[i] for n in rows]
            found = clusters[rows]
            scores.append(
                LevelScore(
                    level=level,
                    label_depth=i + 1,
                    nmi=float(normalized_mutual_info_score(truth, found)),
                    purity=_purity(truth, found),
                )
            )
    return scores


def routing_report(
    retriever: Retriever, tree: TopicTree, corpus: Corpus, facts: Sequence[Fact] | None = None
) -> list[RoutingScore]:
    """Measure how often a question is routed to the cluster that holds its document.

    Parameters
    ----------
    retriever
        Routes the questions.
    tree
        Where the documents are.
    corpus
        Documents in the order that `tree` was fitted on.
    facts
        Facts to ask; None takes all of the corpus.

    Returns
    -------
    list[RoutingScore]
        One per relation, in order of appearance.
    """
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in corpus.facts if facts is None else facts:
        by_relation[fact.relation].append(fact)
    truth = np.stack([tree.clusters(level) for level in range(1, tree.num_levels + 1)], axis=1)
    scores = []
    for relation, group in by_relation.items():
        asked = [(fact.prompt, corpus.index[fact.doc_id]) for fact in group]
        reworded = [(p, corpus.index[fact.doc_id]) for fact in group for p in fact.paraphrases]
        scores.append(
            RoutingScore(
                relation=relation,
                num_facts=len(group),
                prompts=_hits(retriever, asked, truth),
                paraphrases=_hits(retriever, reworded, truth),
            )
        )
    return scores


def _hits(
    retriever: Retriever, asked: Sequence[tuple[str, int]], truth: NDArray[np.int64]
) -> tuple[float, ...]:
    if not asked:
        return ()
    found = retriever.route_vectors(retriever.embed([text for text, _ in asked]))
    right = found == truth[[document for _, document in asked]]
    return tuple(float(share) for share in right.mean(axis=0))


def _purity(truth: Sequence[str], found: NDArray[np.int64]) -> float:
    members: dict[int, Counter[str]] = defaultdict(Counter)
    for label, cluster in zip(truth, found.tolist(), strict=True):
        members[cluster][label] += 1
    return sum(max(counts.values()) for counts in members.values()) / len(truth)
