"""Labels of topics: the terms that tell a cluster from its siblings."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from membank.client.retriever import words_of
from membank.trainer.corpus import Document
from membank.trainer.tree._fit import TopicTree
from membank.wire.spec import BlockRef

_NUM_TERMS = 3


def topic_labels(documents: Sequence[Document], tree: TopicTree) -> dict[BlockRef, str]:
    """Name every cluster that holds documents.

    A term scores by the share of the cluster's documents that hold it, and by how much rarer it is
    among the siblings together (class-based TF-IDF).

    Parameters
    ----------
    documents
        The documents that `tree` was fitted on, in the same order.
    tree
        The tree.

    Returns
    -------
    dict[BlockRef, str]
        Labels such as ``atomic, element, metal``, unique among siblings.
    """
    words = [frozenset(words_of(document.embed_text)) for document in documents]
    labels: dict[BlockRef, str] = {}
    for level in range(1, tree.num_levels + 1):
        counts: dict[int, Counter[str]] = defaultdict(Counter)
        sizes: Counter[int] = Counter()
        for found, cluster in zip(words, tree.clusters(level).tolist(), strict=True):
            counts[cluster].update(found)
            sizes[cluster] += 1
        families: dict[int, list[int]] = defaultdict(list)
        for cluster in sorted(counts):
            families[cluster // tree.fan_outs[level - 1]].append(cluster)
        for family in families.values():
            named = _name_siblings(
                {cluster: counts[cluster] for cluster in family},
                {cluster: sizes[cluster] for cluster in family},
            )
            labels.update({BlockRef(level, cluster): label for cluster, label in named.items()})
    return labels


def _name_siblings(counts: Mapping[int, Counter[str]], sizes: Mapping[int, int]) -> dict[int, str]:
    total: Counter[str] = Counter()
    for found in counts.values():
        total.update(found)
    mean_size = sum(sizes.values()) / len(sizes)
    labels: dict[int, str] = {}
    for cluster, found in counts.items():
        scores = {
            term: count / sizes[cluster] * math.log(1 + mean_size / total[term])
            for term, count in found.items()
        }
        # Ties are broken by the term, so that a label does not hang on the order of documents.
        best = sorted(scores, key=lambda term: (-scores[term], term)) or ["untitled"]
        taken = set(labels.values())
        label = next(
            (
                label
                for num_terms in range(min(_NUM_TERMS, len(best)), len(best) + 1)
                if (label := ", ".join(best[:num_terms])) not in taken
            ),
            "",
        )
        number = 2
        while not label or label in taken:
            label = f"{', '.join(best[:_NUM_TERMS])} ({number})"
            number += 1
        labels[cluster] = label
    return labels
