"""Fitting a topic tree: hierarchical balanced k-means over the views of documents.

Shape letters: N documents, W views of a document, C dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from membank.client.retriever import head
from membank.trainer.tree._kmeans import KMeansConfig, balanced_kmeans, nearest
from membank.wire.errors import InvalidArgumentError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeConfig:
    """Shape of a topic tree and how it is fitted."""

    fan_outs: tuple[int, ...] = (16, 16)
    """Children of a cluster that are fitted at each level, coarsest first."""
    reserve: int = 0
    """Children of every cluster, and of the root, beside those: they stay free for topics to come."""
    kmeans: KMeansConfig = field(default_factory=KMeansConfig)
    """How the children of one node are found."""
    seed: int = 0
    """Seed of all randomness."""

    def __post_init__(self) -> None:
        if not self.fan_outs or min(self.fan_outs) < 1:
            msg = f"fan_outs={self.fan_outs}: must name at least one level, each with >= 1 children"
            raise ValueError(msg)
        if self.reserve < 0:
            msg = f"reserve={self.reserve}: must be >= 0"
            raise ValueError(msg)

    @property
    def all_fan_outs(self) -> tuple[int, ...]:
        """Children of a cluster at each level, the free ones among them."""
        return tuple(fan_out + self.reserve for fan_out in self.fan_outs)

    def num_clusters(self, level: int) -> int:
        """Return the clusters of `level` (1 = coarsest), the free ones among them."""
        return math.prod(self.all_fan_outs[:level])


@dataclass(frozen=True)
class TopicTree:
    """A fitted tree."""

    fan_outs: tuple[int, ...]
    """Children of a cluster at each level, coarsest first."""
    centroids: tuple[NDArray[np.float32], ...]
    """Per level, (clusters, C or fewer) float32; NaN where a cluster holds nothing."""
    leaf_N: NDArray[np.int64]
    """(N,) int64, leaf cluster of each document."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentViews:
    """Vectors of the same N documents, each (N, C) float32 with L2-normalised rows."""

    coarse: tuple[NDArray[np.float32], ...]
    """What the centroids of level 1 are fitted on."""
    fine: tuple[NDArray[np.float32], ...]
    """What the centroids below level 1 are fitted on."""
    placing: tuple[NDArray[np.float32], ...]
    """By what documents are placed: each goes where most of these are routed, the earlier one
    where they are even."""

    def __post_init__(self) -> None:
        views = (*self.coarse, *self.fine, *self.placing)
        if not self.coarse or not self.fine or not self.placing or not len(views[0]):
            raise InvalidArgumentError("a topic tree needs at least one document and view")
        if any(view.shape != views[0].shape for view in views):
            msg = f"views differ in shape: {[view.shape for view in views]}"
            raise InvalidArgumentError(msg)


def fit_tree(
    views: DocumentViews | NDArray[np.float32],
    config: TreeConfig,
    *,
    level_dims: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> TopicTree:
    """Fit a topic tree and place every document in it.

    Parameters
    ----------
    views
        Vectors of the documents; an (N, C) array serves as the only view.
    config
        Shape and seed.
    level_dims
        First dimensions that each level reads, from level 1; the last holds for all below. None
        lets all levels read all.
    progress
        Called after each node.

    Raises
    ------
    InvalidArgumentError
        There is no document, or views differ in shape.

    Notes
    -----
    Balance holds while centroids are fitted. A document is placed by distance alone, as any text
    will be routed later: a document moved for balance's sake could not be found again.
    """
    if isinstance(views, np.ndarray):
        views = DocumentViews(coarse=(views,), fine=(views,), placing=(views,))
    num_dims = views.placing[0].shape[1]
    rng = np.random.Generator(np.random.PCG64(config.seed))
    num_nodes = sum(config.num_clusters(level) for level in range(len(config.fan_outs)))
    centroids: list[NDArray[np.float32]] = []
    cluster_of = np.zeros(len(views.placing[0]), dtype=np.int64)
    done = 0
    for level, (fan_out, children) in enumerate(
        zip(config.fan_outs, config.all_fan_outs, strict=True)
    ):
        dims = level_dims[min(level, len(level_dims) - 1)] if level_dims else num_dims
        fitted_on = [head(view, dims) for view in (views.fine if level else views.coarse)]
        placing = [head(view, dims) for view in views.placing]
        num_parents = config.num_clusters(level)
        fitted = np.full((num_parents, children, dims), np.nan, dtype=np.float32)
        below = np.zeros_like(cluster_of)
        for parent in range(num_parents):
            members = np.flatnonzero(cluster_of == parent)
            if len(members):
                vectors = np.concatenate([view[members] for view in fitted_on])
                found = balanced_kmeans(vectors, fan_out, config.kmeans, rng)
                child_of = _place([view[members] for view in placing], found)
                fitted[parent, : len(found)] = found
                below[members] = parent * children + child_of
            done += 1
            if progress is not None:
                progress("topic tree", done, num_nodes)
        centroids.append(fitted.reshape(num_parents * children, dims))
        cluster_of = below
    return TopicTree(config.all_fan_outs, tuple(centroids), cluster_of)


def _place(
    views: Sequence[NDArray[np.float32]], centroids: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return the child of each document; a child that stays without any is set to NaN."""
    while True:
        closed = np.isnan(centroids[:, 0])
        # Closed children are infinitely far; some child is always open.
        open_ones = np.where(closed[:, None], np.float32(1e9), centroids)
        child_of = _majority(np.stack([nearest(view, open_ones) for view in views]))
        empty = np.bincount(child_of, minlength=len(centroids)) == 0
        if not (empty & ~closed).any():
            return child_of
        centroids[empty] = np.nan


def _majority(votes_WN: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the most frequent row of each column, the earliest where several are."""
    support_WN = (votes_WN[:, None, :] == votes_WN[None, :, :]).sum(axis=1)
    chosen_N = votes_WN[np.argmax(support_WN, axis=0), np.arange(votes_WN.shape[1])]
    return np.asarray(chosen_N, dtype=np.int64)
