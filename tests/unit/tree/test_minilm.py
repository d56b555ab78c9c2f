import sys
from collections.abc import Mapping, Sequence
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from membank.trainer.tree import MiniLmEmbedder, embedder_from_config, pool_pieces
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError
from membank.wire.format import TreeDocument


class WordEncoder:
    """Stands in for a sentence encoder: 6 word pieces at most, a vector per known word."""

    max_seq_length = 6
    axes: Mapping[str, int] = {"red": 0, "green": 1, "blue": 2}

    def __init__(self, model: str, device: str) -> None:
        if model == "absent":
            raise OSError("no such model")
        assert device == "cpu"
        self.longest = 0

    def tokenizer(self, text: str, **_: object) -> dict[str, list[tuple[int, int]]]:
        spans = []
        start = 0
        for word in text.split():
            start = text.index(word, start)
            spans.append((start, start + len(word)))
            start += len(word)
        return {"offset_mapping": spans}

    def get_sentence_embedding_dimension(self) -> int:
        return 3

    def encode(self, pieces: Sequence[str], **_: object) -> np.ndarray:
        vectors = np.zeros((len(pieces), 3), dtype=np.float32)
        for row, piece in enumerate(pieces):
            words = piece.split()
            self.longest = max(self.longest, len(words))
            for word in words[: self.max_seq_length - 2]:
                vectors[row, self.axes[word]] += 1
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.where(norms == 0, 1, norms)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(SentenceTransformer=WordEncoder)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)


@pytest.mark.usefixtures("encoder")
def test_a_long_text_is_embedded_whole() -> None:
    embedder = MiniLmEmbedder("words")
    short, long = embedder.embed(["red red", "red " * 4 + "green " * 4 + "blue blue"])
    assert short == pytest.approx([1, 0, 0])
    # Pieces of 4, 4 and 2 words, weighted by length: a cut encoder would have seen red alone.
    assert long == pytest.approx(np.array([4, 4, 2]) / 6, abs=1e-6)


@pytest.mark.usefixtures("encoder")
def test_every_piece_fits_the_encoder() -> None:
    embedder = MiniLmEmbedder("words")
    embedder.embed(["red " * 103, "blue"])
    assert embedder._encoder.longest == WordEncoder.max_seq_length - 2


@pytest.mark.usefixtures("encoder")
def test_an_empty_text_has_a_row_of_its_own() -> None:
    vectors = MiniLmEmbedder("words").embed(["", "green"])
    assert vectors.tolist() == [[0, 0, 0], [0, 1, 0]]


@pytest.mark.usefixtures("encoder")
def test_it_is_rebuilt_from_a_tree_document() -> None:
    embedder = MiniLmEmbedder("words")
    assert embedder.arrays == {}
    assert embedder.level_dims == (3,)
    rebuilt = embedder_from_config(TreeDocument(embedder=embedder.config))
    assert rebuilt.config == embedder.config


@pytest.mark.usefixtures("encoder")
def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="'absent'"):
        MiniLmEmbedder("absent")


def test_without_its_packages_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: ModuleType | None = None
    monkeypatch.setitem(sys.modules, "sentence_transformers", missing)
    with pytest.raises(FailedPreconditionError, match=r"pip install 'membank\[minilm\]'"):
        MiniLmEmbedder()


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="'word2vec'"):
        embedder_from_config(TreeDocument(embedder={"kind": "word2vec"}))


def test_pieces_are_pooled_by_length() -> None:
    vectors = np.array([[1, 0], [0, 1], [0, 1]], dtype=np.float32)
    pooled = pool_pieces(vectors, [0, 0, 2], [3, 4, 1], 3)
    wanted = np.array([[0.6, 0.8], [0, 0], [0, 1]], dtype=np.float32)
    np.testing.assert_allclose(pooled, wanted, atol=1e-6)
