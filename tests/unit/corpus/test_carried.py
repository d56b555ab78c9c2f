from importlib.resources import files

import pytest

from membank.trainer.corpus import CARRIED, CarriedSelection, Corpus, load_corpus
from membank.wire.errors import InvalidArgumentError


@pytest.fixture(scope="module")
def demo() -> Corpus:
    return load_corpus("demo")


@pytest.mark.parametrize("name", ["fast", "demo"])
def test_facts_are_stated_in_their_documents(name: str) -> None:
    corpus = load_corpus(name)
    for fact in corpus.facts:
        text = corpus.documents[corpus.index[fact.doc_id]].text
        assert text.startswith(f"{fact.prompt} {fact.answer}"), fact


def test_each_fact_is_stated_once_and_no_paraphrase_is(demo: Corpus) -> None:
    # No flooding: what is asked stands in one document, in the words of the corpus.
    everything = "\n".join(document.text for document in demo.documents)
    for fact in (*demo.facts_of("atomic_number"), *demo.facts_of("capital")):
        assert everything.count(f"{fact.prompt} ") == 1, fact
        assert not any(phrase in everything for phrase in fact.paraphrases), fact


def test_asks_all_elements_and_the_capitals(demo: Corpus) -> None:
    numbers = demo.facts_of("atomic_number")
    assert sorted(int(fact.answer) for fact in numbers) == list(range(1, 119))
    assert len(demo.facts_of("symbol")) == 118
    capitals = {fact.subject: fact.answer for fact in demo.facts_of("capital")}
    assert len(capitals) > 200
    # One of each irregular form of the field: a note, several capitals, an accent, a spelling.
    assert capitals["Chile"] == "Santiago"
    assert capitals["South Africa"] == "Pretoria"
    assert capitals["Brazil"] == "Brasília"
    assert capitals["United States"] == "Washington, D.C."
    assert capitals["Moldova"] == "Chisinau"


def test_answers_are_not_given_away_by_the_question(demo: Corpus) -> None:
    for fact in demo.facts_of("capital"):
        assert fact.answer.lower() not in fact.prompt.lower()
        assert fact.subject.lower() not in fact.answer.lower()


def test_elements_and_capitals_are_topics_of_their_own(demo: Corpus) -> None:
    topics = {fact.relation: fact.topic for fact in demo.facts}
    assert topics["atomic_number"] == "elements"
    assert topics["capital"] == "capitals"
    for fact in demo.facts:
        assert demo.documents[demo.index[fact.doc_id]].labels[0] == fact.topic


def test_texts_are_clean(demo: Corpus) -> None:
    for document in demo.documents:
        assert document.text == document.text.strip()
        assert document.text
        assert "\n" not in document.text
        assert "&" not in document.text or ";" not in document.text.split("&", 1)[1][:8]
        assert "<p>" not in document.text


def test_sizes_are_ordered() -> None:
    fast, demo = load_corpus("fast"), load_corpus("demo")
    assert 250_000 < fast.text_bytes < 400_000
    assert 800_000 < demo.text_bytes < 1_200_000


@pytest.mark.slow
def test_the_full_corpus_holds_all_that_is_carried() -> None:
    full = load_corpus("full")
    assert full.text_bytes > 6_000_000
    assert {document.doc_id for document in load_corpus("demo").documents} <= set(full.index)


def test_loading_is_deterministic() -> None:
    assert load_corpus("fast").documents == load_corpus("fast").documents


def test_a_selection_of_ones_own() -> None:
    selection = CarriedSelection(
        element_sections=("number",), factbook_fields=(), books=(), wordnet_every=None
    )
    corpus = load_corpus("numbers", selection)
    assert corpus.name == "numbers"
    assert len(corpus.documents) == 118
    assert {fact.relation for fact in corpus.facts} == {"atomic_number"}


def test_an_unknown_name_tells_the_known_ones() -> None:
    with pytest.raises(InvalidArgumentError, match=", ".join(sorted(CARRIED))):
        load_corpus("everything")


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="Happiness"):
        load_corpus("x", CarriedSelection(factbook_fields=("Happiness",)))


def test_the_notice_names_every_carried_file() -> None:
    folder = files("membank.trainer").joinpath("data")
    notice = folder.joinpath("NOTICE").read_text()
    carried = [entry.name for entry in folder.iterdir() if entry.name.endswith(".gz")]
    assert len(carried) == 4
    assert all(name in notice for name in carried)
