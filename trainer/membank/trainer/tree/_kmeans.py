"""Balanced k-means: the step that is repeated at every node of a topic tree.

Shape letters: N vectors, C dimensions, K clusters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from membank.client.retriever import unit


@dataclass(frozen=True, kw_only=True, slots=True)
class KMeansConfig:
    """How the children of one node are found."""

    num_steps: int = 20
    """Steps of expectation and maximisation."""
    step_vectors: int = 6400
    """Vectors of a step, drawn afresh for each; all where a node has no more."""
    balance: float = 1.5
    """Largest share of a step's assignments that one cluster may take, as a multiple of 1/K."""
    normalise: bool = True
    """True scales centroids to length 1. False leaves them the means that they are: the shortest,
    that of the most mixed cluster, is then nearest to every vector that lies far from all, and that
    cluster outgrows the others."""

    def __post_init__(self) -> None:
        for name, ok, accepted in (
            ("num_steps", self.num_steps >= 1, ">= 1"),
            ("step_vectors", self.step_vectors >= 1, ">= 1"),
            ("balance", self.balance >= 1, ">= 1"),
        ):
            if not ok:
                msg = f"{name}={getattr(self, name)}: must be {accepted}"
                raise ValueError(msg)


def nearest(
    vectors_NC: NDArray[np.float32], centroids_KC: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Return the nearest centroid (L2) of each vector, (N,) int64."""
    # The vector's own norm is the same for all centroids.
    distances_NK = (centroids_KC * centroids_KC).sum(axis=1) - 2 * vectors_NC @ centroids_KC.T
    return np.asarray(np.argmin(distances_NK, axis=1), dtype=np.int64)


def largest_allowed(num_vectors: int, num_clusters: int, balance: float) -> int:
    """Return how many assignments one cluster may take; no less than an even share."""
    share = math.floor(balance * num_vectors / num_clusters)
    return max(share, math.ceil(num_vectors / num_clusters))


def rebalance(
    assigned_N: NDArray[np.int64], num_clusters: int, balance: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Move assignments from too large clusters to the smallest ones.

    A cluster above `largest_allowed` shares evenly, at random, with the smallest cluster, until
    none is above. Even halves of the two together, not of the large one alone: halves of the
    large one could push a middling "smallest" over the bound, and the rule would not end.

    Parameters
    ----------
    assigned_N
        (N,) int64 cluster of each vector; not changed.
    num_clusters
        Clusters K.
    balance
        The bound as a multiple of 1/K.
    rng
        Chooses which assignments move.

    Returns
    -------
    NDArray[np.int64]
        (N,) new assignments.
    """
    assigned_N = assigned_N.copy()
    counts_K = np.bincount(assigned_N, minlength=num_clusters)
    bound = largest_allowed(len(assigned_N), num_clusters, balance)
    while counts_K.max() > bound:
        large, small = int(np.argmax(counts_K)), int(np.argmin(counts_K))
        num_moved = (counts_K[large] - counts_K[small]) // 2
        moved = rng.choice(np.flatnonzero(assigned_N == large), size=num_moved, replace=False)
        assigned_N[moved] = small
        counts_K[large] -= num_moved
        counts_K[small] += num_moved
    return assigned_N


def balanced_kmeans(
    vectors_NC: NDArray[np.float32],
    num_clusters: int,
    config: KMeansConfig,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Find the centroids of clusters of similar size.

    Parameters
    ----------
    vectors_NC
        (N, C) float32, at least one row; not changed.
    num_clusters
        Clusters asked for; fewer come out where there are fewer different vectors.
    config
        Steps, vectors of a step, balance.
    rng
        Source of all randomness.

    Returns
    -------
    NDArray[np.float32]
        (K, C) centroids, the means of their vectors, normalised if so configured.
    """
    centroids_KC = _plus_plus(_draw(vectors_NC, config.step_vectors, rng), num_clusters, rng)
    num_clusters = len(centroids_KC)
    for _ in range(config.num_steps):
        step_NC = _draw(vectors_NC, config.step_vectors, rng)
        assigned_N = nearest(step_NC, centroids_KC)
        assigned_N = rebalance(assigned_N, num_clusters, config.balance, rng)
        for cluster in np.unique(assigned_N):
            mean_C = step_NC[assigned_N == cluster].mean(axis=0)
            centroids_KC[cluster] = unit(mean_C) if config.normalise else mean_C
    return centroids_KC


def _draw(
    vectors_NC: NDArray[np.float32], count: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    if len(vectors_NC) <= count:
        return vectors_NC
    return vectors_NC[rng.choice(len(vectors_NC), size=count, replace=False)]


def _plus_plus(
    vectors_NC: NDArray[np.float32], num_clusters: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Choose first centroids with k-means++: far vectors are likelier."""
    chosen = [int(rng.integers(len(vectors_NC)))]
    gaps_N = np.full(len(vectors_NC), np.inf)
    while len(chosen) < num_clusters:
        differences_NC = vectors_NC - vectors_NC[chosen[-1]]
        gaps_N = np.minimum(gaps_N, (differences_NC * differences_NC).sum(axis=1))
        # Rounding leaves a little between equal vectors; what is below it is no distance.
        gaps_N[gaps_N < 1e-12] = 0.0
        total = gaps_N.sum()
        if total == 0:
            break
        chosen.append(int(rng.choice(len(vectors_NC), p=gaps_N / total)))
    return vectors_NC[chosen].astype(np.float32)
