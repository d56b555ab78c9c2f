"""The ``lsa`` embedder, fitted with scikit-learn and handed to the client as plain arrays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from membank.client.retriever import LsaEmbedder, hash_terms, words_of
from membank.trainer.corpus import Document
from membank.wire.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class LsaConfig:
    """How the ``lsa`` embedder is fitted."""

    dims: int = 24
    """Dimensions of the embedding; fewer come out of a corpus with fewer pages or terms."""
    min_documents: int = 3
    """Documents that a term must occur in; rarer ones cannot place anything."""
    max_terms: int = 50_000
    """Terms to keep, the most frequent ones."""
    idf_power: float = 0.25
    """Power of the inverse document frequency. 1 is plain TF-IDF, in which a rare subject outweighs
    what is asked of it; 0 weighs all terms alike, and templates outweigh the subject."""
    seed: int = 0
    """Seed of the randomised decomposition."""

    def __post_init__(self) -> None:
        for name in ("dims", "min_documents", "max_terms"):
            if getattr(self, name) < 1:
                msg = f"{name}={getattr(self, name)}: must be >= 1"
                raise ValueError(msg)
        if not 0 <= self.idf_power <= 1:
            msg = f"idf_power={self.idf_power}: must be in 0..1"
            raise ValueError(msg)


def fit_lsa(documents: Sequence[Document], config: LsaConfig) -> LsaEmbedder:
    """Fit TF-IDF on documents and its projection on their pages.

    Documents with the same source and title make a page. Which terms belong together is learned
    from pages: within single documents, the words of a template ("the ... of X is") go together
    more often than a subject goes with what is said of it, and topics would be templates.

    Parameters
    ----------
    documents
        Documents of the corpus.
    config
        Dimensions and terms.

    Raises
    ------
    InvalidArgumentError
        No term occurs in enough documents, or fewer than two do.
    """
    vectorizer = TfidfVectorizer(
        analyzer=words_of,
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
    vectorizer.idf_ = vectorizer.idf_**config.idf_power
    pages = vectorizer.transform(_pages(documents))
    dims = min(config.dims, *(size - 1 for size in pages.shape))
    if dims < 1:
        msg = f"cannot fit lsa on {pages.shape[0]} pages with {pages.shape[1]} terms: too few"
        raise InvalidArgumentError(msg)
    svd = TruncatedSVD(dims, random_state=config.seed).fit(pages)
    hashes = hash_terms(vectorizer.get_feature_names_out())
    order = np.argsort(hashes)
    return LsaEmbedder(
        hashes[order],
        vectorizer.idf_[order].astype(np.float32),
        np.ascontiguousarray(svd.components_.T[order], dtype=np.float32),
    )


def _pages(documents: Sequence[Document]) -> list[str]:
    pages: dict[tuple[str, str], list[str]] = defaultdict(list)
    for document in documents:
        # A document without title is a page of its own.
        key = (document.source, document.title or f"\0{document.doc_id}")
        pages[key].append(document.text)
    return [" ".join(texts) for texts in pages.values()]
