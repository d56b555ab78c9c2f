"""Fitting a topic tree: hierarchical balanced k-means over the views of documents.

Shape letters: N documents, W views of a document, C dimensions, L levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from membank.trainer.tree._kmeans import KMeansConfig, balanced_kmeans, nearest
from membank.wire.errors import InvalidArgumentError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeConfig:
    """Shape of a topic tree and how it is fitted."""

    fan_outs: tuple[int, ...] = (16, 16)
    """Children of a cluster at each level, coarsest first."""
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    """How the children of one node are found."""
    seed: int = 0
    """Seed of all randomness."""

    def __post_init__(self) -> None:
        if not self.fan_outs or min(self.fan_outs) < 1:
            msg = f"fan_outs={self.fan_outs}: must name at least one level, each with >= 1 children"
            raise ValueError(msg)

    def num_clusters(self, level: int) -> int:
        """Return the clusters of `level` (1 = coarsest)."""
        return math.prod(self.fan_outs[:level])


@dataclass(frozen=True)
class TopicTree:
    """A fitted tree.

    Parameters
    ----------
    fan_outs
        Children of a cluster at each level, coarsest first.
    centroids
        Per level, (clusters, C) float32; NaN where a cluster holds nothing.
    leaf_N
        (N,) int64, leaf cluster of each document.
    """

    fan_outs: tuple[int, ...]
    centroids: tuple[NDArray[np.float32], ...]
    leaf_N: NDArray[np.int64]

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.fan_outs)

    def clusters(self, level: int) -> NDArray[np.int64]:
        """Return (N,) int64, the cluster of `level` (1 = coarsest) that holds each document."""
        return self.leaf_N // math.prod(self.fan_outs[level:])

    def sizes(self, level: int) -> NDArray[np.int64]:
        """Return the number of documents in each cluster of `level`, (clusters,) int64."""
        count = math.prod(self.fan_outs[:level])
        return np.bincount(self.clusters(level), minlength=count).astype(np.int64)


def fit_tree(
    vectors: NDArray[np.float32],
    config: TreeConfig,
    *,
    placed_by: Sequence[NDArray[np.float32]] | None = None,
    progress: Progress | None = None,
) -> TopicTree:
    """Fit a topic tree and place every document in it.

    Parameters
    ----------
    vectors
        (M, C) float32 with L2-normalised rows, to fit centroids on; one document may give several.
    config
        Shape and seed.
    placed_by
        Views of the N documents, each (N, C) float32. A document goes to the leaf that most of its
        views are routed to, that of the earlier view where they are even. None places `vectors`.
    progress
        Called after each node.

    Raises
    ------
    InvalidArgumentError
        There is nothing to fit or to place, or views differ in shape.

    Notes
    -----
    Balance holds while centroids are fitted. A document is placed by distance alone, as any text
    will be routed later: a document moved for balance's sake could not be found again.
    """
    views = [vectors] if placed_by is None else list(placed_by)
    if not len(vectors) or not views or not len(views[0]):
        raise InvalidArgumentError("a topic tree needs at least one document")
    if any(view.shape != views[0].shape for view in views):
        msg = f"placed_by: views differ in shape: {[view.shape for view in views]}"
        raise InvalidArgumentError(msg)
    centroids = _fit_centroids(vectors, config, progress)
    while True:
        leaf_N = _majority(np.stack([_descend(view, centroids, config) for view in views]))
        if not _close_empty(centroids, leaf_N, config):
            return TopicTree(config.fan_outs, tuple(centroids), leaf_N)


def _fit_centroids(
    vectors: NDArray[np.float32], config: TreeConfig, progress: Progress | None
) -> list[NDArray[np.float32]]:
    rng = np.random.Generator(np.random.PCG64(config.seed))
    num_nodes = sum(config.num_clusters(level) for level in range(len(config.fan_outs)))
    done = 0
    centroids: list[NDArray[np.float32]] = []
    cluster_of = np.zeros(len(vectors), dtype=np.int64)
    for level, fan_out in enumerate(config.fan_outs):
        num_parents = config.num_clusters(level)
        fitted = np.full((num_parents * fan_out, vectors.shape[1]), np.nan, dtype=np.float32)
        below = np.zeros_like(cluster_of)
        for parent in range(num_parents):
            members = np.flatnonzero(cluster_of == parent)
            if len(members):
                first = parent * fan_out
                found = balanced_kmeans(vectors[members], fan_out, config.kmeans, rng)
                fitted[first : first + len(found)] = found
                below[members] = first + nearest(vectors[members], found)
            done += 1
            if progress is not None:
                progress("topic tree", done, num_nodes)
        centroids.append(fitted)
        cluster_of = below
    return centroids


def _descend(
    vectors: NDArray[np.float32], centroids: Sequence[NDArray[np.float32]], config: TreeConfig
) -> NDArray[np.int64]:
    """Return the leaf that each vector is routed to, as the client routes it."""
    clusters = np.zeros(len(vectors), dtype=np.int64)
    for level, fan_out in zip(centroids, config.fan_outs, strict=True):
        children = level.reshape(-1, fan_out, level.shape[1])
        below = np.zeros_like(clusters)
        for parent in np.unique(clusters):
            members = np.flatnonzero(clusters == parent)
            # A closed child is infinitely far. Some child is open: every open node has one.
            block = np.where(np.isnan(children[parent]), np.float32(1e9), children[parent])
            below[members] = parent * fan_out + nearest(vectors[members], block)
        clusters = below
    return clusters


def _majority(votes_WN: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the most frequent row of each column, the earliest where several are."""
    support_WN = (votes_WN[:, None, :] == votes_WN[None, :, :]).sum(axis=1)
    chosen_N = votes_WN[np.argmax(support_WN, axis=0), np.arange(votes_WN.shape[1])]
    return np.asarray(chosen_N, dtype=np.int64)


def _close_empty(
    centroids: list[NDArray[np.float32]], leaf_N: NDArray[np.int64], config: TreeConfig
) -> bool:
    """Set centroids of clusters without documents to NaN; return whether there were any new."""
    changed = False
    for level, fitted in enumerate(centroids, start=1):
        below = math.prod(config.fan_outs[level:])
        sizes = np.bincount(leaf_N // below, minlength=len(fitted))
        empty = (sizes == 0) & ~np.isnan(fitted[:, 0])
        fitted[empty] = np.nan
        changed |= bool(empty.any())
    return changed
