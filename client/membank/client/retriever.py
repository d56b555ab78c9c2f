"""The retriever of a bank: from a text to a path, with numpy alone.

A retriever is an embedder and one centroid per cluster. A text becomes a vector, and the vector
descends the tree: at each level it goes to the nearest child (L2). Where no child leads on (all
their centroids are NaN: never filled, or deleted), the path ends.

Shape letters: N texts, C dimensions of the embedding, V terms of the vocabulary, K children.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
    """Return a 64-bit BLAKE2b hash of each term, the form in which a bank keeps its vocabulary."""
    digests = [hashlib.blake2b(term.encode(), digest_size=8).digest() for term in terms]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


class LsaEmbedder:
    """Latent semantic analysis: TF-IDF with sublinear counts, projected, normalised.

    Only the rows of the projection whose terms occur in a text are read.

    Parameters
    ----------
    term_hashes
        (V,) uint64, ascending, from `hash_terms`.
    idf
        (V,) float32, weight of each term.
    projection
        (V, C) float32, C-contiguous.
    stop_words
        Words that are not terms.

    Raises
    ------
    CorruptionError
        The arrays do not fit each other.

    Notes
    -----
    Immutable, and safe to share between threads.
    """

    def __init__(
        self,
        term_hashes: NDArray[np.uint64],
        idf: NDArray[np.float32],
        projection: NDArray[np.float32],
        stop_words: frozenset[str] = STOP_WORDS,
    ) -> None:
        fits = (
            projection.ndim == 2
            and len(projection)
            and term_hashes.shape == idf.shape == projection.shape[:1]
            and bool(np.all(term_hashes[1:] > term_hashes[:-1]))
        )
        if not fits:
            raise CorruptionError(
                f"retriever: term_hashes {term_hashes.shape}, idf {idf.shape} and projection "
                f"{projection.shape} do not fit, or terms are not ascending; write the tree anew",
                reason=Reason.SPEC_CORRUPT,
            )
        self._term_hashes = term_hashes
        self._idf = idf
        self._projection = projection
        self._stop_words = stop_words

    @property
    def config(self) -> Mapping[str, object]:
        """Kind, dimensions and stop words."""
        return {"kind": "lsa", "dims": self.dims, "stop_words": sorted(self._stop_words)}

    @property
    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """``term_hashes``, ``idf`` and ``projection``."""
        return {
            "term_hashes": self._term_hashes,
            "idf": self._idf,
            "projection": self._projection,
        }

    @property
    def dims(self) -> int:
        """Dimensions C of the embedding."""
        return int(self._projection.shape[1])

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
            stop_words = config["stop_words"]
            if not isinstance(stop_words, list):
                raise TypeError("stop_words is not a list")
            return cls(
                np.asarray(arrays["term_hashes"], dtype=np.uint64),
                np.asarray(arrays["idf"], dtype=np.float32),
                np.asarray(arrays["projection"], dtype=np.float32),
                frozenset(str(word) for word in stop_words),
            )
        except (KeyError, TypeError, ValueError) as err:
            if isinstance(err, CorruptionError):
                raise
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
        counts = Counter(words_of(text, self._stop_words))
        if not counts:
            return np.zeros(self.dims, dtype=np.float32)
        hashes = hash_terms(counts)
        places = np.minimum(np.searchsorted(self._term_hashes, hashes), len(self._term_hashes) - 1)
        known = self._term_hashes[places] == hashes
        rows = places[known]
        tf = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))[known]
        weights = (1 + np.log(tf)) * self._idf[rows]
        # The L2 norm of the TF-IDF row would cancel in the normalisation below.
        vector = weights @ self._projection[rows]
        norm = float(np.linalg.norm(vector))
        return np.asarray(vector / norm if norm else vector, dtype=np.float32)


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
        Per level, (clusters, C) float32; the children of cluster c are c * K, ..., c * K + K - 1.
        A row of NaN is a cluster that leads nowhere.

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
            distances = _distances(vectors[rows], children, parents)
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
            for distance, clusters, ended in kept:
                parent = np.array([clusters[-1] if clusters else 0])
                steps = _distances(vector, children, parent)[0]
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
