"""Byte-level BPE trained from a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from membank.wire.errors import InvalidArgumentError

END_OF_TEXT = "<|endoftext|>"
"""Token that ends each document."""

_NUM_BYTES = 256


class Tokenizer:
    """A byte-level BPE vocabulary; every text is encodable and decodes to itself.

    Parameters
    ----------
    backend
        The tokenizer of the library; it must know `END_OF_TEXT`.

    Raises
    ------
    InvalidArgumentError
        The vocabulary holds no end-of-text token.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        eot_id = backend.token_to_id(END_OF_TEXT)
        if eot_id is None:
            msg = f"the tokenizer has no token {END_OF_TEXT}"
            raise InvalidArgumentError(msg)
        self._backend = backend
        self._eot_id = int(eot_id)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the end-of-text token included."""
        return int(self._backend.get_vocab_size())

    @property
    def eot_id(self) -> int:
        """Id of the token that ends each document."""
        return self._eot_id

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the serialised tokenizer; equal means equal encodings."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without an end-of-text token."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text."""
        return [
            list(found.ids)
            for found in self._backend.encode_batch(list(texts), add_special_tokens=False)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; end-of-text tokens give nothing."""
        return str(self._backend.decode(list(ids), skip_special_tokens=True))

    def to_json(self) -> str:
        """Return the content of ``tokenizer.json``."""
        return str(self._backend.to_str())

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Build from the content of ``tokenizer.json``.

        Raises
        ------
        InvalidArgumentError
            The text is no such file, or holds no end-of-text token.
        """
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as err:  # the library raises bare Exception
            msg = f"not a tokenizer.json: {err}"
            raise InvalidArgumentError(msg) from err
        return cls(backend)

    def save(self, path: Path) -> None:
        """Write ``tokenizer.json`` to `path`."""
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Read ``tokenizer.json`` from `path`."""
        return cls.from_json(path.read_text(encoding="utf-8"))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, split_digits: bool = True
) -> Tokenizer:
    """Train a byte-level BPE vocabulary.

    Parameters
    ----------
    texts
        Texts to count; the order does not matter.
    vocab_size
        Number of tokens, end-of-text included; at least 257. Fewer come out when the texts hold
        too few pairs.
    split_digits
        True makes each digit a token of its own, so that a number is spelled the same way wherever
        it stands and a small model meets ten symbols instead of hundreds of rare ones.

    Raises
    ------
    InvalidArgumentError
        `vocab_size` is below 257.
    """
    if vocab_size <= _NUM_BYTES:
        msg = f"vocab_size={vocab_size}: must be at least {_NUM_BYTES + 1}"
        raise InvalidArgumentError(msg)
    backend = tokenizers.Tokenizer(models.BPE())
    steps: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    if split_digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return Tokenizer(backend)
