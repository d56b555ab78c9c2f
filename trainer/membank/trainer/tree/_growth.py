"""Room in a tree that is served, and centroids for topics that are put there.

Shape letters: N documents, C dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from membank.client.retriever import Embedder, head, unit
from membank.trainer.corpus import Document
from membank.trainer.tree._build import PREFIX_SHARES, prefix_of
from membank.trainer.tree._kmeans import KMeansConfig, balanced_kmeans, nearest
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.format import TreeDocument
from membank.wire.records import Topic
from membank.wire.spec import BankSpec, BlockRef, BlockState


def free_child(
    spec: BankSpec, tree: TreeDocument, topics: Mapping[BlockRef, Topic], parent: BlockRef | None
) -> BlockRef:
    """Return a child of `parent` that nothing is known of: the first one.

    A cluster is free if it and all under it are deleted, or were never changed and have no centroid.

    Parameters
    ----------
    spec
        Spec of the bank.
    tree
        Its tree document.
    topics
        What is known of the topics under `parent`.
    parent
        The topic; None = the root.

    Raises
    ------
    FailedPreconditionError
        If there is none (TREE_FULL).
    InvalidArgumentError
        If nothing can be under `parent`.
    """
    level = 1 if parent is None else parent.level + 1
    if level > spec.num_levels:
        raise InvalidArgumentError(
            f"topic {parent} is a leaf: levels are 1..{spec.num_levels}; name the topic above it"
        )
    fan_out = spec.levels[level - 1].fan_out
    first = 0 if parent is None else parent.cluster * fan_out
    for cluster in range(first, first + fan_out):
        child = BlockRef(level, cluster)
        if all(_is_free(tree, topics[ref]) for ref in spec.subtree(child)):
            return child
    where = "the root" if parent is None else f"topic {parent}"
    raise FailedPreconditionError(
        f"all {fan_out} clusters under {where} are taken; delete or retire one of them, grow under "
        "another topic, or create a bank with room: membank tree --reserve",
        reason=Reason.TREE_FULL,
        metadata={"topic": "" if parent is None else str(parent), "fan_out": str(fan_out)},
    )


def has_centroid(tree: TreeDocument, ref: BlockRef) -> bool:
    """Return whether texts can find a topic."""
    if ref.level > len(tree.centroids):
        return False
    return not bool(np.isnan(tree.centroids[ref.level - 1][ref.cluster]).any())


def views_of(
    embedder: Embedder, documents: Sequence[Document], dims: int
) -> tuple[NDArray[np.float32], ...]:
    """Return what documents are placed by: each (N, C) float32, of beginnings of their texts.

    Parameters
    ----------
    embedder
        The bank's.
    documents
        The N documents.
    dims
        First dimensions C that the level reads.
    """
    return tuple(
        head(embedder.embed([prefix_of(document.text, share) for document in documents]), dims)
        for share in PREFIX_SHARES
    )


def centroid_of(views: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the (C,) centroid of documents, of length 1: the mean of all their views.

    Raises
    ------
    InvalidArgumentError
        If the embedder knows no word of them.
    """
    row = unit(np.concatenate(list(views)).mean(axis=0))
    if not row.any():
        raise InvalidArgumentError("the bank's retriever knows no word of the documents")
    return row


def halves_of(
    views: Sequence[NDArray[np.float32]], seed: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return two (C,) centroids of documents, (2, C), and (N,) which of them each is nearest to.

    Raises
    ------
    InvalidArgumentError
        If the documents do not differ, or all are nearest to one of them.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    centroids = balanced_kmeans(np.concatenate(list(views)), 2, KMeansConfig(), rng)
    half_N = nearest(views[0], centroids) if len(centroids) == 2 else np.zeros(1, np.int64)
    if len(np.unique(half_N)) < 2:
        raise InvalidArgumentError(
            "the documents are too much alike to be told apart by the bank's retriever; give more "
            "of them, or others"
        )
    return centroids, half_N


def _is_free(tree: TreeDocument, topic: Topic) -> bool:
    if topic.state is BlockState.DELETED:
        return True
    return topic.version == 0 and not has_centroid(tree, topic.ref)
