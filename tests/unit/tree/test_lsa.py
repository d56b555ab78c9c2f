import numpy as np
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from membank.client.retriever import LsaEmbedder, words_of
from membank.trainer.corpus import Document, load_corpus
from membank.trainer.tree import LsaConfig, fit_lsa
from membank.wire.errors import InvalidArgumentError

DOCUMENTS = load_corpus("fast").documents[:600]


def page_texts() -> list[str]:
    pages: dict[str, list[str]] = {}
    for document in DOCUMENTS:
        pages.setdefault(document.title, []).append(document.text)
    return [" ".join(texts) for texts in pages.values()]


@pytest.mark.parametrize("power", [1.0, 0.25])
def test_the_client_embeds_as_scikit_learn_does(power: float) -> None:
    config = LsaConfig(dims=16, idf_power=power)
    vectorizer = TfidfVectorizer(analyzer=words_of, sublinear_tf=True, min_df=3)
    vectorizer.fit(document.embed_text for document in DOCUMENTS)
    vectorizer.idf_ = vectorizer.idf_**power
    svd = TruncatedSVD(16, random_state=0).fit(vectorizer.transform(page_texts()))
    texts = [document.text for document in DOCUMENTS[:200]] + ["iron iron gold, GOLD; café 12"]
    wanted = normalize(svd.transform(vectorizer.transform(texts)))
    found = fit_lsa(DOCUMENTS, config).embed(texts)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_vectors_have_length_one_and_unknown_texts_none() -> None:
    embedder = fit_lsa(DOCUMENTS, LsaConfig(dims=8))
    vectors = embedder.embed(["the chemical symbol of gold", "xyzzy plugh", "", "12 345 the of"])
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 0, 0, 0], abs=1e-6)


def test_rebuilt_from_its_parts_it_embeds_bit_identically() -> None:
    embedder = fit_lsa(DOCUMENTS, LsaConfig(dims=8))
    rebuilt = LsaEmbedder.from_parts(embedder.config, embedder.arrays)
    texts = [document.text for document in DOCUMENTS[:20]]
    assert np.array_equal(rebuilt.embed(texts), embedder.embed(texts))


def test_fitting_is_deterministic() -> None:
    first, again = (fit_lsa(DOCUMENTS, LsaConfig(dims=8)) for _ in range(2))
    assert np.array_equal(first.arrays["projection"], again.arrays["projection"])


def test_the_vocabulary_is_not_kept_in_words() -> None:
    embedder = fit_lsa(DOCUMENTS, LsaConfig(dims=8))
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
    assert 1 <= embedder.dims < 6


@pytest.mark.parametrize("texts", [(), ("one",), ("the of", "12", "and")])
def test_a_corpus_that_tells_nothing_is_refused(texts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgumentError, match="cannot fit lsa"):
        fit_lsa(documents_of(*texts), LsaConfig())


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="dims"):
        LsaConfig(dims=0)
    with pytest.raises(ValueError, match="idf_power"):
        LsaConfig(idf_power=2.0)
