"""The ``lsa`` embedder, fitted with scikit-learn and handed to the client as plain arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from membank.client.retriever import LsaEmbedder, LsaSettings, hash_terms, words_of
from membank.trainer.corpus import Document
from membank.wire.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class LsaConfig:
    """How the ``lsa`` embedder is fitted."""

    topic_dims: int = 64
    """Dimensions of the topic part; fewer come out of a corpus with fewer pages or terms."""
    min_documents: int = 3
    """Documents that a term must occur in; rarer ones cannot place anything."""
    max_terms: int = 50_000
    """Terms to keep, the most frequent ones."""
    idf_power: float = 0.25
    """Power of the inverse document frequency in the topic part. 1 is plain TF-IDF, in which a rare
    subject outweighs what is asked of it; 0 weighs all terms alike."""
    settings: LsaSettings = field(default_factory=LsaSettings)
    """How topic and subject are put together."""
    seed: int = 0
    """Seed of the randomised decomposition."""

    def __post_init__(self) -> None:
        for name in ("topic_dims", "min_documents", "max_terms"):
            if getattr(self, name) < 1:
                msg = f"{name}={getattr(self, name)}: must be >= 1"
                raise ValueError(msg)
        if not 0 <= self.idf_power <= 1:
            msg = f"idf_power={self.idf_power}: must be in 0..1"
            raise ValueError(msg)


def fit_lsa(documents: Sequence[Document], config: LsaConfig) -> LsaEmbedder:
    """Fit the ``lsa`` embedder on documents and their pages.

    Parameters
    ----------
    documents
        Documents of the corpus.
    config
        Dimensions, terms and weights.

    Raises
    ------
    InvalidArgumentError
        No term occurs in enough documents, or fewer than two do.

    Notes
    -----
    Documents of one page (see `pages_of`) are about one thing. Two things are learned from that.
    Which terms belong together is learned from pages, not from single documents: in those, the
    words of a template ("the ... of X is") go together more often than X goes with what is said of
    it, and topics would be templates. And a term that stands in most documents of its page is what
    the page is about; one that stands in few is what is said there. The former weigh more in the
    subject part.
    """
    stop_words = config.settings.stop_words
    vectorizer = TfidfVectorizer(
        analyzer=lambda text: words_of(text, stop_words),
        sublinear_tf=True,
        min_df=min(config.min_documents, len(documents)) if documents else 1,
        max_features=config.max_terms,
        dtype=np.float64,
    )
    try:
        vectorizer.fit(document.embed_text for document in documents)
    except ValueError as err:
        msg = f"cannot fit lsa on {len(documents)} documents: {err}"
        raise InvalidArgumentError(msg) from err
    idf = vectorizer.idf_.copy()
    subject_weights = idf * _consistency(vectorizer, documents)
    vectorizer.idf_ = idf**config.idf_power
    components = _components(vectorizer, documents, config)
    hashes = hash_terms(vectorizer.get_feature_names_out())
    order = np.argsort(hashes)
    projection = vectorizer.idf_[:, None] * components.T
    return LsaEmbedder(
        hashes[order],
        np.ascontiguousarray(projection[order], dtype=np.float32),
        subject_weights[order].astype(np.float32),
        config.settings,
    )


def pages_of(documents: Sequence[Document]) -> NDArray[np.int64]:
    """Return the page of each document, (N,) int64 from 0 on.

    Documents with the same source and title are one page; one without a title is a page alone.
    """
    numbers: dict[tuple[str, str], int] = {}
    keys = ((d.source, d.title or f"\0{d.doc_id}") for d in documents)
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)


def _components(
    vectorizer: TfidfVectorizer, documents: Sequence[Document], config: LsaConfig
) -> NDArray[np.float64]:
    """Return (dims, V) singular vectors of the pages."""
    texts: dict[int, list[str]] = defaultdict(list)
    for page, document in zip(pages_of(documents).tolist(), documents, strict=True):
        texts[page].append(document.text)
    pages = vectorizer.transform(" ".join(found) for found in texts.values())
    dims = min(config.topic_dims, *(size - 1 for size in pages.shape))
    if dims < 1:
        msg = f"cannot fit lsa on {pages.shape[0]} pages with {pages.shape[1]} terms: too few"
        raise InvalidArgumentError(msg)
    svd = TruncatedSVD(dims, random_state=config.seed).fit(pages)
    return np.asarray(svd.components_, dtype=np.float64)


def _consistency(vectorizer: TfidfVectorizer, documents: Sequence[Document]) -> NDArray[np.float64]:
    """Return (V,): how large a part of its page's documents a term stands in, where it does.

    Pages are weighted by that very part, so that a mention elsewhere does not count against the
    page that a term is the subject of. Pages of one document tell nothing; a term that stands on no
    other gets the mean.
    """
    occurs = (vectorizer.transform(document.text for document in documents) > 0).astype(float)
    page_of = pages_of(documents)
    sizes = np.bincount(page_of)
    shape = (len(sizes), len(documents))
    member = csr_matrix((1.0 / sizes[page_of], (page_of, np.arange(len(documents)))), shape=shape)
    shares = (member[sizes > 1] @ occurs).tocsc()
    weight = np.asarray(shares.sum(axis=0)).ravel()
    squares = np.asarray(shares.multiply(shares).sum(axis=0)).ravel()
    known = weight > 0
    if not known.any():
        return np.ones(len(weight))
    consistency = np.zeros(len(weight), dtype=np.float64)
    consistency[known] = squares[known] / weight[known]
    consistency[~known] = consistency[known].mean()
    return consistency
