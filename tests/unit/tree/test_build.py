"""The tree of a real corpus: topics are topics, and questions find what answers them."""

import json

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
@pytest.mark.parametrize(("fan_outs", "seed"), [((8, 32), 0), ((8, 32), 1), ((16, 16), 0)])
def test_questions_reach_the_leaf_that_answers_them(fan_outs: tuple[int, ...], seed: int) -> None:
    corpus = load_corpus("demo")
    built = build_tree(corpus, TreeConfig(fan_outs=fan_outs, seed=seed))
    scores = routing_report(built.retriever, built.tree, corpus)
    report = {score.relation: score for score in scores}
    for relation in ("atomic_number", "symbol", "capital"):
        assert report[relation].prompts[-1] >= 0.95
        # However they are put: leaves hold subjects, not forms of sentences ...
        assert report[relation].paraphrases[-1] >= 0.9
    # ... so that no leaf has to learn the numbers of too many elements.
    numbers = [corpus.index[fact.doc_id] for fact in corpus.facts_of("atomic_number")]
    capitals = [corpus.index[fact.doc_id] for fact in corpus.facts_of("capital")]
    assert np.bincount(built.tree.leaf_N[numbers]).max() <= 30

    # Deleting the cluster that knows atomic numbers takes no capital along, and little else.
    coarse = built.tree.clusters(1)
    (elements,) = set(coarse[numbers].tolist())
    assert elements not in coarse[capitals]
    topics = np.array([document.labels[0] for document in corpus.documents])
    assert np.mean(topics[coarse == elements] == "elements") >= 0.95
    if fan_outs == (8, 32):
        # An eighth of the corpus is room enough for a whole topic.
        assert np.mean(coarse[topics == "elements"] == elements) >= 0.95


def test_the_embedder_may_be_configured(small: Corpus) -> None:
    built = build_tree(small, TreeConfig(fan_outs=(4, 2)), embedder=LsaConfig(topic_dims=6))
    assert [level.shape for level in built.tree.centroids] == [(4, 6), (8, 6 + 256)]
