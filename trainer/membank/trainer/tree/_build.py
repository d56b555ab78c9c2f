"""From a corpus to a tree, its retriever and its labels, in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from membank.client.retriever import Embedder, LsaEmbedder, Retriever, unit
from membank.trainer.corpus import Corpus
from membank.trainer.tree._fit import DocumentViews, Progress, TopicTree, TreeConfig, fit_tree
from membank.trainer.tree._labels import topic_labels
from membank.trainer.tree._lsa import LsaConfig, fit_lsa, pages_of
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
    """A tree with its retriever and labels."""

    tree: TopicTree
    """Centroids, and the leaf of each document."""
    retriever: Retriever
    """Routes texts into `tree`."""
    labels: Mapping[BlockRef, str]
    """Label of each cluster that holds documents."""

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
    prefixes = tuple(
        embedder.embed([prefix_of(document.text, share) for document in documents])
        for share in PREFIX_SHARES
    )
    titled = embedder.embed([document.embed_text for document in documents])
    views = DocumentViews(
        # With its title a text shows its topic, not only the form of its sentence.
        coarse=(titled, prefixes[0]),
        # A page stays together, so that a leaf holds all about few things, and not one sort of
        # sentence about all of them: that would be more than a leaf block can learn.
        fine=(_page_means(prefixes[0], pages_of(documents)),),
        placing=prefixes,
    )
    tree = fit_tree(views, config, level_dims=embedder.level_dims, progress=progress)
    labels = topic_labels(documents, tree)
    return BuiltTree(tree, Retriever(embedder, tree.centroids), labels)


def _page_means(vectors: NDArray[np.float32], page_of: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return for each document the normalised mean over the documents of its page."""
    sums = np.zeros((int(page_of.max()) + 1, vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, page_of, vectors)
    return unit(sums)[page_of]


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
