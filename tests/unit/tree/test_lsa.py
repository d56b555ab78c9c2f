import dataclasses
from collections import Counter

import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from membank.client.retriever import LsaEmbedder, LsaSettings, hash_terms, unit, words_of
from membank.trainer.corpus import Document, load_corpus
from membank.trainer.tree import LsaConfig, fit_lsa, pages_of
from membank.wire.errors import InvalidArgumentError

DOCUMENTS = load_corpus("fast").documents[:600]


def page_texts() -> list[str]:
    pages: dict[str, list[str]] = {}
    for document in DOCUMENTS:
        pages.setdefault(document.title, []).append(document.text)
    return [" ".join(texts) for texts in pages.values()]


@pytest.mark.parametrize("power", [1.0, 0.25])
def test_the_topic_part_is_that_of_scikit_learn(power: float) -> None:
    vectorizer = TfidfVectorizer(analyzer=words_of, sublinear_tf=True, min_df=3)
    vectorizer.fit(document.embed_text for document in DOCUMENTS)
    vectorizer.idf_ = vectorizer.idf_**power
    svd = TruncatedSVD(16, random_state=0).fit(vectorizer.transform(page_texts()))
    texts = [document.text for document in DOCUMENTS[:200]] + ["iron iron gold, GOLD; café 12"]
    wanted = normalize(svd.transform(vectorizer.transform(texts)))
    embedder = fit_lsa(DOCUMENTS, LsaConfig(topic_dims=16, idf_power=power))
    np.testing.assert_allclose(unit(embedder.embed(texts)[:, :16]), wanted, atol=1e-5)


def test_the_subject_part_keeps_angles_of_the_weighted_counts() -> None:
    config = LsaConfig(topic_dims=8, settings=LsaSettings(subject_dims=512, topic_share=1e-6))
    embedder = fit_lsa(DOCUMENTS, config)
    hashes = embedder.arrays["term_hashes"].tolist()
    weights = embedder.arrays["subject_weights"]
    texts = [document.text for document in DOCUMENTS[:40]]
    rows = np.zeros((len(texts), len(hashes)))
    for row, text in enumerate(texts):
        for term, count in Counter(words_of(text)).items():
            (found,) = hash_terms([term]).tolist()
            if found in hashes:
                place = hashes.index(found)
                rows[row, place] = (1 + np.log(count)) * weights[place]
    exact = normalize(rows) @ normalize(rows).T
    vectors = embedder.embed(texts)
    # A projection to 512 dimensions errs by about 1/sqrt(512) = 0.044.
    assert np.abs(vectors @ vectors.T - exact).max() < 0.2
    assert np.abs(vectors @ vectors.T - exact).mean() < 0.05


def test_what_a_page_is_about_weighs_more_than_what_is_said_there() -> None:
    embedder = fit_lsa(DOCUMENTS, LsaConfig(topic_dims=8))
    weights = dict(
        zip(
            embedder.arrays["term_hashes"].tolist(),
            embedder.arrays["subject_weights"].tolist(),
            strict=True,
        )
    )
    subject, said = (weights[hash_terms([term]).tolist()[0]] for term in ("hafnium", "atomic"))
    assert subject > 3 * said


def test_documents_of_one_source_and_title_are_a_page() -> None:
    def document(source: str, title: str) -> Document:
        return Document(
            doc_id=f"{source}{title}", source=source, labels=(), title=title, text="", embed_text=""
        )

    documents = [document("a", "x"), document("a", "y"), document("a", "x"), document("b", "x")]
    untitled = [dataclasses.replace(document("a", ""), doc_id=str(i)) for i in range(2)]
    assert pages_of(documents + untitled).tolist() == [0, 1, 0, 2, 3, 4]


def test_vectors_have_length_one_and_unknown_texts_none() -> None:
    embedder = fit_lsa(DOCUMENTS, LsaConfig(topic_dims=8))
    vectors = embedder.embed(["the chemical symbol of gold", "xyzzy plugh", "", "12 345 the of"])
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 0, 0, 0], abs=1e-6)


def test_rebuilt_from_its_parts_it_embeds_bit_identically() -> None:
    embedder = fit_lsa(DOCUMENTS, LsaConfig(topic_dims=8))
    rebuilt = LsaEmbedder.from_parts(embedder.config, embedder.arrays)
    texts = [document.text for document in DOCUMENTS[:20]]
    assert np.array_equal(rebuilt.embed(texts), embedder.embed(texts))


def test_fitting_is_deterministic() -> None:
    first, again = (fit_lsa(DOCUMENTS, LsaConfig(topic_dims=8)) for _ in range(2))
    assert np.array_equal(first.arrays["topic_projection"], again.arrays["topic_projection"])


def test_the_vocabulary_is_not_kept_in_words() -> None:
    embedder = fit_lsa(DOCUMENTS, LsaConfig(topic_dims=8))
    assert embedder.arrays["term_hashes"].dtype == np.uint64
    assert "hafnium" not in str(dict(embedder.config))


def documents_of(*texts: str) -> list[Document]:
    return [
        Document(doc_id=str(i), source="s", labels=(), title="", text=text, embed_text=text)
        for i, text in enumerate(texts)
    ]


def test_a_small_corpus_gets_fewer_dimensions() -> None:
    texts = ["red apple", "green apple", "blue sky", "red sky", "green grass", "blue grass"]
    embedder = fit_lsa(documents_of(*texts), LsaConfig(min_documents=1))
    assert 1 <= embedder.topic_dims < 6


@pytest.mark.parametrize("texts", [(), ("one",), ("the of", "12", "and")])
def test_a_corpus_that_tells_nothing_is_refused(texts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot fit lsa"):
        fit_lsa(documents_of(*texts), LsaConfig())


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="topic_dims"):
        LsaConfig(topic_dims=0)
    with pytest.raises(ValueError, match="subject_dims"):
        LsaSettings(subject_dims=513)
    with pytest.raises(ValueError, match="idf_power"):
        LsaConfig(idf_power=2.0)
