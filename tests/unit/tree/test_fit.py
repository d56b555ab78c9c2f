import numpy as np
import pytest

from membank.client.retriever import Embedder, LsaEmbedder, LsaSettings, Retriever
from membank.trainer.tree import DocumentViews, TopicTree, TreeConfig, fit_tree
from membank.wire.errors import InvalidArgumentError

CONFIG = TreeConfig(fan_outs=(4, 3))


def vectors(count: int, seed: int = 0) -> np.ndarray:
    found = np.random.Generator(np.random.PCG64(seed)).normal(size=(count, 6))
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return np.asarray(found, dtype=np.float32)


def retriever(tree: TopicTree) -> Retriever:
    # Vectors are routed here, so that any embedder will do.
    embedder: Embedder = LsaEmbedder(
        np.array([1], dtype=np.uint64),
        np.ones((1, 6), dtype=np.float32),
        np.ones(1, dtype=np.float32),
        LsaSettings(),
    )
    return Retriever(embedder, tree.centroids)


def test_clusters_are_nested() -> None:
    tree = fit_tree(vectors(300), CONFIG)
    assert [len(level) for level in tree.centroids] == [4, 12]
    assert np.array_equal(tree.clusters(1), tree.clusters(2) // 3)
    assert np.array_equal(tree.clusters(2), tree.leaf_N)
    assert tree.sizes(1).tolist() == tree.sizes(2).reshape(4, 3).sum(axis=1).tolist()
    assert tree.sizes(2).sum() == 300


def test_documents_are_placed_where_they_are_routed() -> None:
    points = vectors(300)
    tree = fit_tree(points, CONFIG)
    assert np.array_equal(retriever(tree).route_vectors(points)[:, -1], tree.leaf_N)


def test_a_reserve_stays_free_and_changes_nothing_else() -> None:
    points = vectors(300)
    tree = fit_tree(points, CONFIG)
    roomy = fit_tree(points, TreeConfig(fan_outs=CONFIG.fan_outs, reserve=2))
    assert roomy.fan_outs == (6, 5)
    first, second = (level.reshape(-1, 6) for level in roomy.centroids)
    assert np.isnan(first[4:]).all()
    np.testing.assert_array_equal(first[:4], tree.centroids[0])
    children = second.reshape(6, 5, 6)
    assert np.isnan(children[4:]).all()
    assert np.isnan(children[:, 3:]).all()
    np.testing.assert_array_equal(children[:4, :3].reshape(12, 6), tree.centroids[1])
    # Every document is in the same leaf, by its other name.
    np.testing.assert_array_equal(tree.leaf_N // 3, roomy.leaf_N // 5)
    np.testing.assert_array_equal(tree.leaf_N % 3, roomy.leaf_N % 5)


def test_subtrees_follow_the_planted_hierarchy() -> None:
    source = np.random.Generator(np.random.PCG64(5))
    axes = np.eye(12)
    coarse = np.repeat(np.arange(3), 90)
    fine = np.tile(np.repeat(np.arange(3), 30), 3)
    points = axes[coarse] + 0.4 * axes[3 + 3 * coarse + fine]
    points += 0.02 * source.normal(size=points.shape)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    tree = fit_tree(points.astype(np.float32), TreeConfig(fan_outs=(3, 3)))
    pairs = set(zip(coarse.tolist(), tree.clusters(1).tolist(), strict=True))
    assert len(pairs) == 3
    leaves = set(zip((3 * coarse + fine).tolist(), tree.leaf_N.tolist(), strict=True))
    assert len(leaves) == 9


def views(fitted: np.ndarray, *placing: np.ndarray) -> DocumentViews:
    return DocumentViews(coarse=(fitted,), fine=(fitted,), placing=placing)


def test_a_document_goes_where_most_of_its_views_go() -> None:
    points = vectors(200)
    tree = fit_tree(points, TreeConfig(fan_outs=(12,)))
    strange = np.roll(points, 1, axis=0)
    outvoted = fit_tree(views(points, strange, points, points), TreeConfig(fan_outs=(12,)))
    assert np.array_equal(outvoted.leaf_N, tree.leaf_N)
    # Where the views disagree altogether, the first one counts.
    first = fit_tree(views(points, strange, points), TreeConfig(fan_outs=(12,)))
    assert np.array_equal(first.leaf_N, np.roll(tree.leaf_N, 1))


def test_levels_are_fitted_on_their_own_views() -> None:
    points = vectors(200)
    equal = np.repeat(points[:1], 200, axis=0)
    flat = fit_tree(DocumentViews(coarse=(equal,), fine=(points,), placing=(points,)), CONFIG)
    assert np.count_nonzero(flat.sizes(1)) == 1
    assert np.count_nonzero(flat.sizes(2)) == 3
    low = fit_tree(DocumentViews(coarse=(points,), fine=(equal,), placing=(points,)), CONFIG)
    assert np.count_nonzero(low.sizes(1)) == 4
    assert np.count_nonzero(low.sizes(2)) == 4


def test_a_level_reads_its_own_dimensions() -> None:
    points = vectors(200)
    tree = fit_tree(points, CONFIG, level_dims=(2, 6))
    assert [level.shape for level in tree.centroids] == [(4, 2), (12, 6)]
    # What level 1 does not read cannot change it.
    other = points.copy()
    other[:, 2:] = other[::-1, 2:]
    routed = retriever(tree).route_vectors(points)
    assert np.array_equal(routed[:, -1], tree.leaf_N)
    assert np.array_equal(retriever(tree).route_vectors(other)[:, 0], routed[:, 0])


def test_clusters_without_documents_are_closed_and_never_routed_to() -> None:
    points = vectors(300)
    tree = fit_tree(views(points, points[:1].repeat(300, axis=0)), CONFIG)
    for level in (1, 2):
        empty = tree.sizes(level) == 0
        assert empty.any()
        assert np.array_equal(np.isnan(tree.centroids[level - 1]).all(axis=1), empty)
    routed = retriever(tree).route_vectors(points)
    assert set(routed[:, -1].tolist()) == set(tree.leaf_N.tolist())


@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_documents_make_a_smaller_tree(count: int) -> None:
    points = vectors(count)
    tree = fit_tree(points, TreeConfig(fan_outs=(16, 16)))
    assert len(tree.leaf_N) == count
    assert np.array_equal(retriever(tree).route_vectors(points)[:, -1], tree.leaf_N)


def test_a_tree_may_be_flat_or_deep() -> None:
    points = vectors(120)
    assert fit_tree(points, TreeConfig(fan_outs=(5,))).num_levels == 1
    deep = fit_tree(points, TreeConfig(fan_outs=(2, 3, 2, 2)))
    assert [len(level) for level in deep.centroids] == [2, 6, 12, 24]
    assert np.array_equal(deep.clusters(3), deep.clusters(4) // 2)


def test_it_is_deterministic_under_a_seed() -> None:
    points = vectors(200)
    first, again = fit_tree(points, CONFIG), fit_tree(points, CONFIG)
    for one, other in zip(first.centroids, again.centroids, strict=True):
        assert np.array_equal(one, other, equal_nan=True)
    assert np.array_equal(first.leaf_N, again.leaf_N)
    other_seed = fit_tree(points, TreeConfig(fan_outs=(4, 3), seed=1))
    assert not np.array_equal(first.leaf_N, other_seed.leaf_N)


def test_progress_reaches_the_end() -> None:
    seen: list[tuple[str, int, int]] = []
    fit_tree(vectors(100), CONFIG, progress=lambda *step: seen.append(step))
    assert [done for _, done, _ in seen] == [1, 2, 3, 4, 5]
    assert {total for _, _, total in seen} == {5}


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one"):
        fit_tree(vectors(0), CONFIG)
    with pytest.raises(InvalidArgumentError, match="shape"):
        views(vectors(9), vectors(9), vectors(8))
    with pytest.raises(ValueError, match="fan_outs"):
        TreeConfig(fan_outs=())
