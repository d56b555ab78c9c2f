import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membank.trainer.tree import KMeansConfig, balanced_kmeans, rebalance
from membank.trainer.tree._kmeans import largest_allowed, nearest


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def blobs(
    num_blobs: int, size: int, *, dims: int = 8, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return L2-normalised points around separate directions, and the blob of each."""
    source = rng(seed)
    centers = np.linalg.qr(source.normal(size=(dims, dims)))[0][:num_blobs]
    truth = np.repeat(np.arange(num_blobs), size)
    points = centers[truth] + 0.05 * source.normal(size=(len(truth), dims))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return points.astype(np.float32), truth


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 7), min_size=1, max_size=200),
    st.sampled_from([1.0, 1.5, 3.0]),
    st.integers(0, 3),
)
def test_no_cluster_exceeds_the_bound(assigned: list[int], balance: float, seed: int) -> None:
    before = np.array(assigned, dtype=np.int64)
    after = rebalance(before, 8, balance, rng(seed))
    bound = largest_allowed(len(before), 8, balance)
    assert np.bincount(after, minlength=8).max() <= bound
    # The input is the caller's, and what was within the bound stays as it was.
    assert before.tolist() == assigned
    if np.bincount(before, minlength=8).max() <= bound:
        assert after.tolist() == assigned


def test_the_bound_is_the_papers() -> None:
    # 1.5 / 16 = 0.094 of the assignments of a step of 6,400.
    assert largest_allowed(6400, 16, 1.5) == 600
    # An even share is always allowed, or few vectors could not be placed at all.
    assert largest_allowed(5, 16, 1.5) == 1


def test_a_large_cluster_shares_with_the_smallest_alone() -> None:
    before = np.repeat([0, 1, 2], [80, 15, 5])
    after = rebalance(before, 3, 1.5, rng())
    counts = np.bincount(after, minlength=3)
    assert counts.tolist() == [43, 15, 42]
    assert (after[before == 1] == 1).all()


def test_planted_clusters_are_found() -> None:
    points, truth = blobs(4, 100)
    centroids = balanced_kmeans(points, 4, KMeansConfig(), rng())
    found = nearest(points, centroids)
    for blob in range(4):
        assert len(set(found[truth == blob].tolist())) == 1
    assert len(set(found.tolist())) == 4


def test_a_large_blob_is_split_where_plain_kmeans_would_not() -> None:
    large, _ = blobs(1, 400, seed=1)
    small, _ = blobs(4, 20, seed=2)
    points = np.concatenate([large, small])
    centroids = balanced_kmeans(points, 4, KMeansConfig(), rng())
    sizes = np.bincount(nearest(points, centroids), minlength=4)
    assert sizes.max() < 400


def test_each_step_reads_no_more_than_it_may() -> None:
    points, _ = blobs(4, 500)
    centroids = balanced_kmeans(points, 4, KMeansConfig(step_vectors=64), rng())
    assert centroids.shape == (4, 8)
    assert np.isfinite(centroids).all()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_fewer_vectors_than_clusters_give_fewer_clusters(size: int) -> None:
    points, _ = blobs(size, 1)
    centroids = balanced_kmeans(points, 16, KMeansConfig(), rng())
    assert len(centroids) == size
    assert sorted(nearest(points, centroids).tolist()) == list(range(size))


def test_equal_vectors_are_one_cluster() -> None:
    points = np.full((50, 4), 0.5, dtype=np.float32)
    assert len(balanced_kmeans(points, 8, KMeansConfig(), rng())) == 1


def test_centroids_lie_on_the_sphere_unless_told_otherwise() -> None:
    points, truth = blobs(4, 100)
    lengths = np.linalg.norm(balanced_kmeans(points, 4, KMeansConfig(), rng()), axis=1)
    assert lengths == pytest.approx(np.ones(4))
    means = balanced_kmeans(points, 4, KMeansConfig(normalise=False), rng())
    wanted = [points[truth == blob].mean(axis=0) for blob in range(4)]
    found = nearest(np.array(wanted, dtype=np.float32), means)
    assert means[found] == pytest.approx(np.array(wanted), abs=1e-6)


def test_it_is_deterministic_under_a_seed() -> None:
    points, _ = blobs(5, 50)
    first = balanced_kmeans(points, 8, KMeansConfig(), rng(3))
    assert np.array_equal(first, balanced_kmeans(points, 8, KMeansConfig(), rng(3)))
    assert not np.array_equal(first, balanced_kmeans(points, 8, KMeansConfig(), rng(4)))


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="num_steps"):
        KMeansConfig(num_steps=0)
    with pytest.raises(ValueError, match="step_vectors"):
        KMeansConfig(step_vectors=0)
    with pytest.raises(ValueError, match="balance"):
        KMeansConfig(balance=0.5)
