"""From a corpus to a tree, its retriever and its labels, in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from membank.client.retriever import Embedder, LsaEmbedder, Retriever
from membank.trainer.corpus import Corpus
from membank.trainer.tree._fit import Progress, TopicTree, TreeConfig, fit_tree
from membank.trainer.tree._labels import topic_labels
from membank.trainer.tree._lsa import LsaConfig, fit_lsa
from membank.trainer.tree._minilm import MiniLmEmbedder
from membank.wire.errors import InvalidArgumentError
from membank.wire.format import TreeDocument
from membank.wire.spec import BlockRef

PREFIX_SHARES = (1.0, 0.75, 0.6)
"""Parts of a document, from its start, by which it is placed in the tree.

A question is the beginning of the text that answers it, so a document is placed where its own
beginnings are routed. No question need be known for that.
"""


@dataclass(frozen=True)
class BuiltTree:
    """A tree with its retriever and labels.

    Parameters
    ----------
    tree
        Centroids, and the leaf of each document.
    retriever
        Routes texts into `tree`.
    labels
        Label of each cluster that holds documents.
    """

    tree: TopicTree
    retriever: Retriever
    labels: Mapping[BlockRef, str]

    def document(self) -> TreeDocument:
        """Return what a bank keeps of it."""
        num_documents = {
            BlockRef(level, cluster): int(size)
            for level in range(1, self.tree.num_levels + 1)
            for cluster, size in enumerate(self.tree.sizes(level).tolist())
            if size
        }
        return TreeDocument(
            labels=dict(self.labels),
            num_documents=num_documents,
            centroids=self.tree.centroids,
            embedder=self.retriever.embedder.config,
            arrays=self.retriever.embedder.arrays,
        )


def build_tree(
    corpus: Corpus,
    config: TreeConfig | None = None,
    *,
    embedder: Embedder | LsaConfig | None = None,
    progress: Progress | None = None,
) -> BuiltTree:
    """Fit the topic tree of a corpus.

    Parameters
    ----------
    corpus
        The corpus; leaves are in the order of its documents.
    config
        Shape and seed of the tree; None takes the defaults.
    embedder
        A fitted embedder, or how to fit ``lsa``; None fits ``lsa`` with its defaults.
    progress
        Called as the tree grows.

    Raises
    ------
    InvalidArgumentError
        The corpus is too small to fit anything.
    """
    config = config or TreeConfig()
    if embedder is None or isinstance(embedder, LsaConfig):
        embedder = fit_lsa(corpus.documents, embedder or LsaConfig())
    documents = corpus.documents
    views = [
        embedder.embed([prefix_of(document.text, share) for document in documents])
        for share in PREFIX_SHARES
    ]
    # Centroids see each text with its title too, so that a topic is more than a form of sentence.
    titled = embedder.embed([document.embed_text for document in documents])
    tree = fit_tree(np.concatenate([titled, views[0]]), config, placed_by=views, progress=progress)
    labels = topic_labels(documents, tree)
    return BuiltTree(tree, Retriever(embedder, tree.centroids), labels)


def prefix_of(text: str, share: float) -> str:
    """Return the first part of a text's words: `share` of them, rounded up, at least one."""
    words = text.split()
    return " ".join(words[: max(1, math.ceil(len(words) * share))])


def embedder_from_config(document: TreeDocument) -> Embedder:
    """Return the embedder that a tree document names, of whatever kind.

    Raises
    ------
    InvalidArgumentError
        The kind is not known here.
    """
    match document.embedder.get("kind"):
        case "lsa":
            return LsaEmbedder.from_parts(document.embedder, document.arrays)
        case "minilm":
            return MiniLmEmbedder(str(document.embedder["model"]))
        case kind:
            msg = f"unknown embedder {kind!r}; known: lsa, minilm"
            raise InvalidArgumentError(msg)
