import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membank.client.retriever import (
    ENDED,
    LsaEmbedder,
    LsaSettings,
    Retriever,
    hash_terms,
    term_signs,
    unit,
    words_of,
)
from membank.wire.errors import CorruptionError, FailedPreconditionError, Reason
from membank.wire.format import TreeDocument
from membank.wire.spec import BlockRef

WORDS = ["iron", "gold", "cat", "dog"]

GOLD_HASH = 8534087734976713795
GOLD_SIGNS = [-1, 1, -1, -1, -1, -1, 1, 1]

SETTINGS = LsaSettings(coarse_dims=4, subject_dims=8)


def embedder() -> LsaEmbedder:
    """Give each of four words an axis of its own."""
    hashes = hash_terms(WORDS)
    order = np.argsort(hashes)
    projection = np.eye(4, dtype=np.float32)[order]
    return LsaEmbedder(hashes[order], projection, np.ones(4, dtype=np.float32), SETTINGS)


def centroids() -> list[np.ndarray]:
    """Metals, animals; under each its two."""
    coarse = np.array([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]], dtype=np.float32)
    return [coarse, embedder().embed(WORDS)]


def retriever() -> Retriever:
    return Retriever(embedder(), centroids())


def document() -> TreeDocument:
    source = retriever()
    return TreeDocument(
        centroids=tuple(centroids()),
        embedder=source.embedder.config,
        arrays=source.embedder.arrays,
    )


def path(*clusters: int) -> tuple[BlockRef, ...]:
    return tuple(BlockRef(level, cluster) for level, cluster in enumerate(clusters, start=1))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a bar of Iron", path(0, 0)),
        ("GOLD!", path(0, 1)),
        ("the cat's cat", path(1, 2)),
        ("dog, dog and cat", path(1, 3)),
    ],
)
def test_a_text_goes_to_the_nearest_child_at_each_level(
    text: str, wanted: tuple[BlockRef, ...]
) -> None:
    assert retriever().route(text) == wanted


def test_a_child_is_numbered_under_its_parent() -> None:
    for found in retriever().route_all(["iron", "gold", "cat", "dog", "unknown"]):
        assert found[1].cluster // 2 == found[0].cluster


def test_a_text_without_known_words_still_has_a_path() -> None:
    assert len(retriever().route("zebra")) == 2


def test_a_path_ends_above_children_that_lead_nowhere() -> None:
    coarse, fine = centroids()
    fine[2:] = np.nan
    shortened = Retriever(embedder(), [coarse, fine])
    assert shortened.route("cat") == path(1)
    assert shortened.route("iron") == path(0, 0)
    assert shortened.route_vectors(shortened.embed(["cat"])).tolist() == [[1, ENDED]]
    assert shortened.route_beam("cat", 1)[0].path == path(1)


def test_a_missing_child_is_passed_over() -> None:
    coarse, fine = centroids()
    fine[2] = np.nan
    assert Retriever(embedder(), [coarse, fine]).route("cat") == path(1, 3)


def test_a_tree_of_nothing_gives_an_empty_path() -> None:
    nothing = [np.full_like(level, np.nan) for level in centroids()]
    assert Retriever(embedder(), nothing).route("cat") == ()


def test_beams_come_nearest_first_and_one_beam_is_the_path() -> None:
    found = retriever()
    beams = found.route_beam("iron iron gold", 3)
    assert beams[0].path == found.route("iron iron gold") == path(0, 0)
    assert beams[1].path == path(0, 1)
    assert [beam.distance for beam in beams] == sorted(beam.distance for beam in beams)
    assert len({beam.path for beam in beams}) == 3
    assert [beam.path for beam in found.route_beam("iron iron gold", 1)] == [beams[0].path]
    assert len(found.route_beam("iron", 99)) == 4


@settings(max_examples=50)
@given(st.integers(0, 1000), st.sampled_from([(3, 4), (2, 2, 3), (5,)]))
def test_routing_is_brute_force_descent(seed: int, fan_outs: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    levels: list[np.ndarray] = []
    count = 1
    for fan_out in fan_outs:
        count *= fan_out
        # A level may read fewer dimensions than there are.
        levels.append(rng.normal(size=(count, 4 - len(levels) % 2)).astype(np.float32))
    vectors = unit(rng.normal(size=(7, 4)).astype(np.float32))
    found = Retriever(embedder(), levels).route_vectors(vectors)
    for vector, clusters in zip(vectors, found, strict=True):
        parent = 0
        for level, fan_out, cluster in zip(levels, fan_outs, clusters, strict=True):
            children = level[parent * fan_out : (parent + 1) * fan_out]
            part = vector[: level.shape[1]] / np.linalg.norm(vector[: level.shape[1]])
            nearest = int(np.argmin(((children - part) ** 2).sum(axis=1)))
            parent = parent * fan_out + nearest
            assert cluster == parent


def test_words_are_lower_case_plain_and_without_numbers() -> None:
    assert words_of("The São Tomé Iron-ore, x 1991 N'Djamena") == [
        "sao",
        "tome",
        "iron",
        "ore",
        "djamena",
    ]
    assert words_of("The iron", frozenset({"iron"})) == ["the"]


def test_repeated_words_count_by_their_logarithm() -> None:
    vector = unit(embedder().embed(["iron iron gold"])[0, :4])
    weight = 1 + np.log(2)
    assert vector[:2] == pytest.approx(np.array([weight, 1]) / np.hypot(weight, 1), abs=1e-6)


def test_a_vector_joins_topic_and_subject() -> None:
    vector = embedder().embed(["gold"])[0]
    assert np.linalg.norm(vector) == pytest.approx(1)
    topic, subject = vector[:4], vector[4:]
    assert np.linalg.norm(topic) / np.linalg.norm(subject) == pytest.approx(0.7)
    assert np.sign(subject).tolist() == term_signs(["gold"], 8)[0].tolist()


def test_hashes_and_signs_of_terms_never_change() -> None:
    # Banks keep hashes: other values would make every stored vocabulary unreadable.
    assert hash_terms(["gold"]).tolist() == [GOLD_HASH]
    assert term_signs(["gold"], 8).tolist() == [GOLD_SIGNS]


def test_rebuilt_from_a_tree_document_it_routes_the_same() -> None:
    rebuilt = Retriever.from_tree(document())
    assert rebuilt.route_all(WORDS) == retriever().route_all(WORDS)
    assert rebuilt.fan_outs == (2, 2)


def test_a_bank_without_retriever_says_so() -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        Retriever.from_tree(TreeDocument())
    assert caught.value.reason is Reason.NO_TREE


def test_an_embedder_that_the_client_lacks_names_its_extra() -> None:
    tree = TreeDocument(centroids=tuple(centroids()), embedder={"kind": "minilm", "model": "m"})
    with pytest.raises(FailedPreconditionError, match=r"membank\[minilm\]") as caught:
        Retriever.from_tree(tree)
    assert caught.value.reason is Reason.MISSING_EXTRA
    # The caller may bring one.
    assert Retriever.from_tree(tree, embedder=embedder()).route("gold") == path(0, 1)


@pytest.mark.parametrize("part", ["term_hashes", "topic_projection", "subject_weights"])
def test_a_missing_part_is_corruption(part: str) -> None:
    source = embedder()
    arrays = {name: array for name, array in source.arrays.items() if name != part}
    with pytest.raises(CorruptionError, match=part):
        LsaEmbedder.from_parts(source.config, arrays)


def test_parts_that_do_not_fit_are_corruption() -> None:
    source = embedder()
    short = dict(source.arrays) | {"subject_weights": np.ones(3, dtype=np.float32)}
    with pytest.raises(CorruptionError, match="do not fit"):
        LsaEmbedder.from_parts(source.config, short)
    unsorted = dict(source.arrays) | {"term_hashes": source.arrays["term_hashes"][::-1]}
    with pytest.raises(CorruptionError, match="ascending"):
        LsaEmbedder.from_parts(source.config, unsorted)
    with pytest.raises(CorruptionError, match="stop_words"):
        LsaEmbedder.from_parts(dict(source.config) | {"stop_words": "the"}, source.arrays)
    with pytest.raises(CorruptionError, match="subject_dims"):
        LsaEmbedder.from_parts(dict(source.config) | {"subject_dims": 0}, source.arrays)


def test_levels_that_do_not_nest_are_corruption() -> None:
    coarse, fine = centroids()
    with pytest.raises(CorruptionError, match="level 2"):
        Retriever(embedder(), [coarse, fine[:3]])


def test_routing_needs_numpy_alone() -> None:
    program = (
        "import sys, membank.client.retriever; "
        "heavy = {'torch', 'sklearn', 'scipy', 'ray', 'zarr', 'tokenizers'} & set(sys.modules); "
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
