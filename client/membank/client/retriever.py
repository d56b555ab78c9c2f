"""The retriever of a bank: from a text to a path, with numpy alone.

A retriever is an embedder and one centroid per cluster. A text becomes a vector, and the vector
descends the tree: at each level it goes to the nearest child (L2). Where no child leads on (all
their centroids are NaN: never filled, or deleted), the path ends.

The first dimensions of an embedding tell the most. A level whose centroids are shorter than the
embedding reads only so many of them, normalised anew.

Shape letters: N texts, C dimensions of the embedding, V terms of the vocabulary, K children.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from membank.wire.errors import CorruptionError, FailedPreconditionError, Reason
from membank.wire.format import TreeDocument
from membank.wire.spec import BlockRef, Path

ENDED = -1
"""Cluster of a level that a path does not reach."""

_STOP_WORDS = """
a about after all also an and any are as at be been before being between both but by can could did do does down
during each for from had has have he her his how i if in into is it its may more most no nor not of off on one only
or other our out over own same she should so some such than that the their them then there these they this those
through to under until up upon was we were what when where which while who why will with would you your
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Words that carry no topic; the template of a sentence consists of them more than of others."""

_WORD = re.compile(r"[^\W\d_]{2,}")

_DIGEST_BYTES = 64


class Embedder(Protocol):
    """Turns texts into vectors whose distances tell how near the topics are."""

    @property
    def config(self) -> Mapping[str, object]:
        """Kind and configuration, JSON-able; ``kind`` names the embedder."""
        ...

    @property
    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """Arrays that rebuild it together with `config`."""
        ...

    @property
    def level_dims(self) -> tuple[int, ...]:
        """First dimensions that each level reads, from level 1; the last holds for all below."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return (N, C) float32 with L2-normalised rows; a row of zeros for an unknown text."""
        ...


def words_of(text: str, stop_words: frozenset[str] = STOP_WORDS) -> list[str]:
    """Split a text into the words that tell its topic.

    Parameters
    ----------
    text
        Any text.
    stop_words
        Words to leave out.

    Returns
    -------
    list[str]
        Words of two letters or more, in lower case and without accents, in order, repeated as they
        stand. Digits are left out: a number is what is asked for, not what is asked about.
    """
    plain = unicodedata.normalize("NFKD", text.lower())
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    return [word for word in _WORD.findall(plain) if word not in stop_words]


def hash_terms(terms: Iterable[str]) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each term, the form in which a bank keeps its vocabulary."""
    return np.frombuffer(b"".join(digest[:8] for digest in _digests(terms)), dtype="<u8").astype(
        np.uint64
    )


def term_signs(terms: Iterable[str], dims: int) -> NDArray[np.float32]:
    """Return a row of `dims` signs for each term, fixed by the term alone.

    Sums of such rows keep angles nearly (a random projection that nobody has to store).
    """
    bits = np.frombuffer(b"".join(_digests(terms)), dtype=np.uint8)
    signs = np.unpackbits(bits.reshape(-1, _DIGEST_BYTES), axis=1)[:, :dims]
    return np.asarray(2.0 * signs - 1.0, dtype=np.float32)


def _digests(terms: Iterable[str]) -> Iterator[bytes]:
    return (hashlib.blake2b(term.encode(), digest_size=_DIGEST_BYTES).digest() for term in terms)


@dataclass(frozen=True, kw_only=True, slots=True)
class LsaSettings:
    """How an `LsaEmbedder` puts its parts together."""

    coarse_dims: int = 24
    """First dimensions of the topic part, which level 1 reads alone."""
    subject_dims: int = 256
    """Dimensions of the subject part, 1..512."""
    topic_share: float = 0.7
    """Length of the topic part where that of the subject part is 1, > 0."""
    stop_words: frozenset[str] = STOP_WORDS
    """Words that are not terms."""

    def __post_init__(self) -> None:
        for name, ok, accepted in (
            ("coarse_dims", self.coarse_dims >= 1, ">= 1"),
            ("subject_dims", 1 <= self.subject_dims <= 8 * _DIGEST_BYTES, "in 1..512"),
            ("topic_share", self.topic_share > 0, "> 0"),
        ):
            if not ok:
                msg = f"{name}={getattr(self, name)}: must be {accepted}"
                raise ValueError(msg)


class LsaEmbedder:
    """Latent semantic analysis, with the subject of a text beside its topic.

    The vector of a text has two parts, each normalised. *Topic*: TF-IDF with sublinear counts,
    projected by a truncated SVD. *Subject*: the same counts with weights that single out what a
    page is about, as a sum of one row of signs per term. Topics gather; subjects tell apart what
    a topic gathers, so that questions about one thing stay together however they are put.

    Parameters
    ----------
    term_hashes
        (V,) uint64, ascending, from `hash_terms`.
    topic_projection
        (V, topic dims) float32, C-contiguous; weights of terms included.
    subject_weights
        (V,) float32.
    settings
        How the parts are put together.

    Raises
    ------
    CorruptionError
        The arrays do not fit each other.

    Notes
    -----
    Immutable, and safe to share between threads. Of the projection only the rows whose terms occur
    in a text are read.
    """

    def __init__(
        self,
        term_hashes: NDArray[np.uint64],
        topic_projection: NDArray[np.float32],
        subject_weights: NDArray[np.float32],
        settings: LsaSettings,
    ) -> None:
        fits = (
            topic_projection.ndim == 2
            and len(topic_projection)
            and term_hashes.shape == subject_weights.shape == topic_projection.shape[:1]
            and bool(np.all(term_hashes[1:] > term_hashes[:-1]))
        )
        if not fits:
            raise CorruptionError(
                f"retriever: term_hashes {term_hashes.shape}, topic_projection "
                f"{topic_projection.shape} and subject_weights {subject_weights.shape} do not fit, "
                "or terms are not ascending; write the tree anew",
                reason=Reason.SPEC_CORRUPT,
            )
        self._term_hashes = term_hashes
        self._topic_projection = topic_projection
        self._subject_weights = subject_weights
        self.settings = settings

    @property
    def config(self) -> Mapping[str, object]:
        """Kind and settings."""
        return {
            "kind": "lsa",
            "coarse_dims": self.settings.coarse_dims,
            "subject_dims": self.settings.subject_dims,
            "topic_share": self.settings.topic_share,
            "stop_words": sorted(self.settings.stop_words),
        }

    @property
    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """``term_hashes``, ``topic_projection`` and ``subject_weights``."""
        return {
            "term_hashes": self._term_hashes,
            "topic_projection": self._topic_projection,
            "subject_weights": self._subject_weights,
        }

    @property
    def topic_dims(self) -> int:
        """Dimensions of the topic part, which comes first."""
        return int(self._topic_projection.shape[1])

    @property
    def dims(self) -> int:
        """Dimensions C of the embedding."""
        return self.topic_dims + self.settings.subject_dims

    @property
    def level_dims(self) -> tuple[int, ...]:
        """Level 1 reads the first dimensions of the topic, the levels below read everything."""
        return (min(self.settings.coarse_dims, self.topic_dims), self.dims)

    @classmethod
    def from_parts(
        cls, config: Mapping[str, object], arrays: Mapping[str, NDArray[np.generic]]
    ) -> LsaEmbedder:
        """Rebuild from `config` and `arrays`.

        Raises
        ------
        CorruptionError
            A part is missing or the parts do not fit each other.
        """
        try:
            return cls(
                np.asarray(arrays["term_hashes"], dtype=np.uint64),
                np.asarray(arrays["topic_projection"], dtype=np.float32),
                np.asarray(arrays["subject_weights"], dtype=np.float32),
                _settings(config),
            )
        except (KeyError, TypeError, ValueError) as err:
            raise CorruptionError(
                f"retriever: a part of the lsa embedder is missing or damaged: {err}",
                reason=Reason.SPEC_CORRUPT,
            ) from err

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return (N, C) float32 with L2-normalised rows; a row of zeros for an unknown text."""
        vectors = np.zeros((len(texts), self.dims), dtype=np.float32)
        for row, text in enumerate(texts):
            vectors[row] = self._embed_one(text)
        return vectors

    def _embed_one(self, text: str) -> NDArray[np.float32]:
        counts = Counter(words_of(text, self.settings.stop_words))
        if not counts:
            return np.zeros(self.dims, dtype=np.float32)
        hashes = hash_terms(counts)
        places = np.minimum(np.searchsorted(self._term_hashes, hashes), len(self._term_hashes) - 1)
        known = self._term_hashes[places] == hashes
        rows = places[known]
        terms = [term for term, is_known in zip(counts, known, strict=True) if is_known]
        tf = 1 + np.log(np.array([counts[term] for term in terms], dtype=np.float32))
        topic = unit(tf @ self._topic_projection[rows])
        signs = term_signs(terms, self.settings.subject_dims)
        subject = unit((tf * self._subject_weights[rows]) @ signs)
        return unit(np.concatenate([self.settings.topic_share * topic, subject]))


def _settings(config: Mapping[str, object]) -> LsaSettings:
    coarse_dims, subject_dims = config["coarse_dims"], config["subject_dims"]
    topic_share, stop_words = config["topic_share"], config["stop_words"]
    if not isinstance(coarse_dims, int) or not isinstance(subject_dims, int):
        raise TypeError("coarse_dims and subject_dims must be integers")
    if not isinstance(topic_share, int | float) or not isinstance(stop_words, list):
        raise TypeError("topic_share must be a number and stop_words a list")
    return LsaSettings(
        coarse_dims=coarse_dims,
        subject_dims=subject_dims,
        topic_share=float(topic_share),
        stop_words=frozenset(str(word) for word in stop_words),
    )


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return vectors, the last axis normalised to length 1; zeros stay zeros."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.asarray(vectors / np.where(norms == 0, 1, norms), dtype=np.float32)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredPath:
    """One of several paths for a text."""

    path: Path
    """The path."""
    distance: float
    """Sum over its levels of the squared L2 distance to the centroids; smaller is nearer."""


class Retriever:
    """Finds the path of a text.

    Parameters
    ----------
    embedder
        Turns texts into vectors.
    centroids
        Per level, (clusters, C or fewer) float32; the children of cluster c are c * K, ...,
        c * K + K - 1. A row of NaN is a cluster that leads nowhere.

    Raises
    ------
    CorruptionError
        The number of clusters of a level is no multiple of the level above.

    Notes
    -----
    Immutable, and safe to share between threads where the embedder is.
    """

    def __init__(self, embedder: Embedder, centroids: Sequence[NDArray[np.float32]]) -> None:
        self.embedder = embedder
        self.centroids = tuple(centroids)
        self.fan_outs = _fan_outs(self.centroids)
        self._children = tuple(
            level.reshape(-1, fan_out, level.shape[1])
            for level, fan_out in zip(self.centroids, self.fan_outs, strict=True)
        )

    @classmethod
    def from_tree(cls, tree: TreeDocument, *, embedder: Embedder | None = None) -> Retriever:
        """Build the retriever that a tree document holds.

        Parameters
        ----------
        tree
            The document.
        embedder
            The embedder to use; None builds the document's own, which works for ``lsa``.

        Raises
        ------
        FailedPreconditionError
            The tree holds no retriever, or its embedder needs packages of an extra; the message
            names it.
        CorruptionError
            Parts are missing or do not fit each other.
        """
        if not tree.centroids:
            raise FailedPreconditionError(
                "this bank holds no retriever; create it with a tree, or name paths yourself",
                reason=Reason.NO_TREE,
            )
        if embedder is None:
            kind = tree.embedder.get("kind")
            if kind != "lsa":
                raise FailedPreconditionError(
                    f"routing with the embedder {kind!r} needs more than the client: "
                    f"pip install 'membank[minilm]', and pass "
                    f"membank.trainer.tree.embedder_from_config(...) as `embedder`",
                    reason=Reason.MISSING_EXTRA,
                    metadata={"embedder": str(kind), "extra": "minilm"},
                )
            embedder = LsaEmbedder.from_parts(tree.embedder, tree.arrays)
        centroids = [np.asarray(level, dtype=np.float32) for level in tree.centroids]
        return cls(embedder, centroids)

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return len(self.centroids)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the vectors of texts, (N, C) float32, L2-normalised."""
        return self.embedder.embed(texts)

    def route(self, text: str) -> Path:
        """Return the path of one text, from level 1 down; shorter where the tree ends."""
        return _path(self.route_vectors(self.embed([text]))[0])

    def route_all(self, texts: Sequence[str]) -> list[Path]:
        """Return the path of each text."""
        return [_path(clusters) for clusters in self.route_vectors(self.embed(texts))]

    def route_vectors(self, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the cluster at each level for vectors.

        Parameters
        ----------
        vectors
            (N, C) float32, L2-normalised.

        Returns
        -------
        NDArray[np.int64]
            (N, levels); `ENDED` from where the path ends.
        """
        found = np.full((len(vectors), self.num_levels), ENDED, dtype=np.int64)
        rows = np.arange(len(vectors))
        parents = np.zeros(len(vectors), dtype=np.int64)
        for level, children in enumerate(self._children):
            distances = _distances(head(vectors[rows], children.shape[2]), children, parents)
            nearest = np.argmin(distances, axis=1)
            leads_on = np.isfinite(distances[np.arange(len(rows)), nearest])
            rows, nearest, parents = rows[leads_on], nearest[leads_on], parents[leads_on]
            parents = parents * self.fan_outs[level] + nearest
            found[rows, level] = parents
        return found

    def route_beam(self, text: str, beams: int) -> list[ScoredPath]:
        """Return up to `beams` paths of one text, nearest first.

        Parameters
        ----------
        text
            The text.
        beams
            Paths to keep at each level, at least 1; 1 gives the path of `route`.
        """
        vector = self.embed([text])
        kept: list[tuple[float, tuple[int, ...], bool]] = [(0.0, (), False)]
        for level, children in enumerate(self._children):
            grown: list[tuple[float, tuple[int, ...], bool]] = []
            part = head(vector, children.shape[2])
            for distance, clusters, ended in kept:
                parent = np.array([clusters[-1] if clusters else 0])
                steps = _distances(part, children, parent)[0]
                if ended or not np.isfinite(steps).any():
                    grown.append((distance, clusters, True))
                    continue
                grown += [
                    (
                        distance + float(steps[j]),
                        (*clusters, int(parent[0]) * self.fan_outs[level] + int(j)),
                        False,
                    )
                    for j in np.flatnonzero(np.isfinite(steps))
                ]
            kept = sorted(grown)[: max(1, beams)]
        return [
            ScoredPath(path=_path(np.array(clusters, dtype=np.int64)), distance=distance)
            for distance, clusters, _ in kept
        ]


def head(vectors: NDArray[np.float32], dims: int) -> NDArray[np.float32]:
    """Return the first `dims` dimensions of (N, C) vectors, normalised anew if there are more."""
    return vectors if vectors.shape[1] == dims else unit(vectors[:, :dims])


def _distances(
    vectors: NDArray[np.float32], children: NDArray[np.float32], parents: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return (N, K) squared L2 distances to the children of each parent; infinite for NaN."""
    distances = np.empty((len(vectors), children.shape[1]), dtype=np.float32)
    # Texts of one parent together: one matrix product each, instead of gathering K rows per text.
    for parent in np.unique(parents):
        rows = parents == parent
        block = children[parent]
        distances[rows] = (block * block).sum(axis=1) - 2 * vectors[rows] @ block.T
    distances += (vectors * vectors).sum(axis=1, keepdims=True)
    distances[np.isnan(distances)] = np.inf
    return distances


def _path(clusters: NDArray[np.int64]) -> Path:
    return tuple(
        BlockRef(level, int(cluster))
        for level, cluster in enumerate(clusters, start=1)
        if cluster != ENDED
    )


def _fan_outs(centroids: Sequence[NDArray[np.float32]]) -> tuple[int, ...]:
    fan_outs = []
    above = 1
    for number, level in enumerate(centroids, start=1):
        if level.ndim != 2 or not len(level) or len(level) % above:
            raise CorruptionError(
                f"retriever: level {number} has centroids of shape {level.shape} under {above} "
                "clusters; write the tree anew",
                reason=Reason.SPEC_CORRUPT,
            )
        fan_outs.append(len(level) // above)
        above = len(level)
    return tuple(fan_outs)
