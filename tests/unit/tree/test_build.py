"""The tree of a real corpus: topics are topics, and questions find what answers them."""

import json
from collections import Counter

import numpy as np
import pytest

from membank.client.retriever import Retriever
from membank.trainer.corpus import CarriedSelection, Corpus, load_corpus
from membank.trainer.tree import (
    BuiltTree,
    LsaConfig,
    TreeConfig,
    build_tree,
    prefix_of,
    routing_report,
    topic_scores,
)
from membank.wire.format import decode_tree, encode_tree
from membank.wire.spec import BlockRef

SMALL = CarriedSelection(
    element_sections=("number", "uses"),
    factbook_fields=("Capital / name", "Climate"),
    books=(),
    wordnet_every=None,
)


@pytest.fixture(scope="module")
def small() -> Corpus:
    return load_corpus("small", SMALL)


@pytest.fixture(scope="module")
def built(small: Corpus) -> BuiltTree:
    return build_tree(small, TreeConfig(fan_outs=(4, 4)))


def test_the_document_of_a_tree_survives_encoding(small: Corpus, built: BuiltTree) -> None:
    document = decode_tree(encode_tree(built.document()), key="test")
    assert document.labels == dict(built.labels)
    assert sum(document.num_documents[ref] for ref in document.num_documents if ref.level == 1) == (
        len(small.documents)
    )
    prompts = [fact.prompt for fact in small.facts]
    served = Retriever.from_tree(document)
    assert served.route_all(prompts) == built.retriever.route_all(prompts)


def test_the_configuration_of_an_embedder_is_json(built: BuiltTree) -> None:
    config = built.document().embedder
    assert json.loads(json.dumps(config)) == config


def test_every_cluster_with_documents_has_a_label_unique_among_siblings(built: BuiltTree) -> None:
    for level in (1, 2):
        filled = np.flatnonzero(built.tree.sizes(level)).tolist()
        assert {ref.cluster for ref in built.labels if ref.level == level} == set(filled)
    for parent in range(4):
        names = [built.labels.get(BlockRef(2, 4 * parent + j)) for j in range(4)]
        named = [name for name in names if name is not None]
        assert len(set(named)) == len(named)


def test_building_is_deterministic(small: Corpus, built: BuiltTree) -> None:
    again = build_tree(small, TreeConfig(fan_outs=(4, 4)))
    assert np.array_equal(again.tree.leaf_N, built.tree.leaf_N)
    assert again.labels == built.labels


def test_a_prefix_holds_the_share_of_words_rounded_up() -> None:
    text = "one two three four five"
    assert prefix_of(text, 1.0) == text
    assert prefix_of(text, 0.5) == "one two three"
    assert prefix_of(text, 0.01) == "one"
    assert prefix_of("", 0.5) == ""


def test_scores_of_a_perfect_tree_are_perfect(small: Corpus, built: BuiltTree) -> None:
    topics = sorted({document.labels[0] for document in small.documents})
    leaf_N = np.array([4 * topics.index(d.labels[0]) for d in small.documents], dtype=np.int64)
    perfect = BuiltTree(
        type(built.tree)((4, 4), built.tree.centroids, leaf_N), built.retriever, built.labels
    )
    scores = {(s.level, s.label_depth): s for s in topic_scores(small.documents, perfect.tree)}
    assert scores[1, 1].nmi == pytest.approx(1)
    assert scores[1, 1].purity == 1
    assert scores[1, 2].purity < 1


def test_a_routing_report_counts_hits_per_level(small: Corpus, built: BuiltTree) -> None:
    report = {score.relation: score for score in routing_report(built.retriever, built.tree, small)}
    numbers = small.facts_of("atomic_number")
    clusters = built.tree.clusters(2)
    hits = [
        built.retriever.route(fact.prompt)[-1].cluster == clusters[small.index[fact.doc_id]]
        for fact in numbers
    ]
    score = report["atomic_number"]
    assert score.num_facts == len(numbers)
    assert score.prompts[1] == pytest.approx(np.mean(hits))
    assert score.prompts[0] >= score.prompts[1]
    assert len(score.paraphrases) == 2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("fan_outs", [(16, 16), (8, 8, 8)])
def test_questions_reach_the_leaf_that_answers_them(fan_outs: tuple[int, ...], seed: int) -> None:
    corpus = load_corpus("demo")
    built = build_tree(corpus, TreeConfig(fan_outs=fan_outs, seed=seed))
    report = {
        score.relation: score for score in routing_report(built.retriever, built.tree, corpus)
    }
    assert report["atomic_number"].prompts[-1] >= 0.95
    assert report["symbol"].prompts[-1] >= 0.95
    assert report["capital"].prompts[-1] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_elements_and_capitals_are_different_topics(seed: int) -> None:
    corpus = load_corpus("demo")
    tree = build_tree(corpus, TreeConfig(seed=seed)).tree
    coarse = tree.clusters(1)
    topics = np.array([document.labels[0] for document in corpus.documents])
    numbers = {int(coarse[corpus.index[f.doc_id]]) for f in corpus.facts_of("atomic_number")}
    capitals = Counter(int(coarse[corpus.index[f.doc_id]]) for f in corpus.facts_of("capital"))
    # Deleting the clusters that know atomic numbers takes no capital along ...
    assert len(numbers) == 1
    assert not numbers & set(capitals)
    # ... and little else: they are nearly all about elements, and hold most of what is about them.
    inside = np.isin(coarse, list(numbers))
    assert np.mean(topics[inside] == "elements") >= 0.95
    assert np.mean(inside[topics == "elements"]) >= 0.7
    assert capitals.most_common(1)[0][1] >= 0.8 * capitals.total()


def test_the_embedder_may_be_configured(small: Corpus) -> None:
    built = build_tree(small, TreeConfig(fan_outs=(4,)), embedder=LsaConfig(dims=6))
    assert built.tree.centroids[0].shape == (4, 6)
