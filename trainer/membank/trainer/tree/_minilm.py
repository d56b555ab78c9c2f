"""The ``minilm`` embedder: a sentence encoder, with long texts embedded whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""Name under which the model is published."""


class MiniLmEmbedder:
    """Embeds with a sentence encoder such as all-MiniLM-L6-v2.

    The encoder reads a limited number of word pieces (256) and would silently drop the rest. Here a
    longer text is cut at word piece bounds, its pieces are embedded, averaged by their length, and
    normalised.

    Parameters
    ----------
    model
        Name of a published model, or path of a local one.
    batch_size
        Pieces that are encoded at once.

    Raises
    ------
    FailedPreconditionError
        The extra ``minilm`` is not installed.
    InvalidArgumentError
        The model is not to be had: neither at this path nor, with the network, by this name.
    """

    def __init__(self, model: str = DEFAULT_MODEL, *, batch_size: int = 64) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as err:
            raise FailedPreconditionError(
                "the minilm embedder needs more packages: pip install 'membank[minilm]'",
                reason=Reason.MISSING_EXTRA,
                metadata={"extra": "minilm"},
            ) from err
        try:
            self._encoder: Any = SentenceTransformer(model, device="cpu")
        except (OSError, ValueError) as err:
            msg = f"cannot load the sentence encoder {model!r}; give a local path: {err}"
            raise InvalidArgumentError(msg) from err
        self._model = model
        self._batch_size = batch_size

    @property
    def config(self) -> Mapping[str, object]:
        """Kind and model."""
        return {"kind": "minilm", "model": self._model}

    @property
    def arrays(self) -> Mapping[str, NDArray[np.generic]]:
        """Nothing: the model is named, not carried."""
        return {}

    @property
    def level_dims(self) -> tuple[int, ...]:
        """All levels read all dimensions."""
        return (int(self._encoder.get_sentence_embedding_dimension()),)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return (N, C) float32 with L2-normalised rows."""
        pieces: list[str] = []
        owners: list[int] = []
        lengths: list[int] = []
        for owner, text in enumerate(texts):
            for piece, length in self._cut(text):
                pieces.append(piece)
                owners.append(owner)
                lengths.append(length)
        encoded = self._encoder.encode(
            pieces,
            batch_size=self._batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        return pool_pieces(np.asarray(encoded, dtype=np.float32), owners, lengths, len(texts))

    def _cut(self, text: str) -> list[tuple[str, int]]:
        """Return pieces that the encoder reads whole, with their lengths in word pieces."""
        # The encoder's own limit counts a first and a last marker.
        room = int(self._encoder.max_seq_length) - 2
        spans = self._encoder.tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            truncation=False,
            verbose=False,
        )["offset_mapping"]
        if len(spans) <= room:
            return [(text, max(1, len(spans)))]
        cut = []
        for start in range(0, len(spans), room):
            part = spans[start : start + room]
            cut.append((text[part[0][0] : part[-1][1]], len(part)))
        return cut


def pool_pieces(
    vectors: NDArray[np.float32], owners: Sequence[int], lengths: Sequence[int], num_texts: int
) -> NDArray[np.float32]:
    """Average the vectors of each text's pieces by their lengths, and normalise.

    Parameters
    ----------
    vectors
        (pieces, C) float32.
    owners
        Text of each piece.
    lengths
        Weight of each piece, > 0.
    num_texts
        Texts N.

    Returns
    -------
    NDArray[np.float32]
        (N, C), L2-normalised; zeros for a text without pieces.
    """
    pooled = np.zeros((num_texts, vectors.shape[1]), dtype=np.float32)
    weights = np.asarray(lengths, dtype=np.float32)[:, None]
    np.add.at(pooled, np.asarray(owners, dtype=np.int64), vectors * weights)
    norms = np.linalg.norm(pooled, axis=1, keepdims=True)
    return np.asarray(pooled / np.where(norms == 0, 1, norms), dtype=np.float32)
