from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membank.trainer.corpus import END_OF_TEXT, Tokenizer, train_tokenizer
from membank.wire.errors import InvalidArgumentError

TEXTS = ["The atomic number of hafnium is 72.", "The capital of France is Paris.", "naïve café"] * 5
TOKENIZER = train_tokenizer(TEXTS, 300)


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_any_text_decodes_to_itself(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_a_batch_encodes_as_its_texts_do() -> None:
    assert TOKENIZER.encode_batch(TEXTS) == [TOKENIZER.encode(text) for text in TEXTS]


def test_texts_never_encode_to_the_end_of_text() -> None:
    assert TOKENIZER.eot_id not in TOKENIZER.encode("the end")
    assert TOKENIZER.decode([TOKENIZER.eot_id]) == ""


def test_digits_stand_alone_by_default() -> None:
    digits = TOKENIZER.encode("72")
    assert len(digits) == 2
    assert TOKENIZER.encode(" 27")[-2:] == digits[::-1]
    # Enough repetition would merge them otherwise.
    whole = train_tokenizer(["is 72"] * 50, 300, split_digits=False)
    assert len(whole.encode("72")) == 1


def test_an_answer_continues_its_prompt() -> None:
    prompt, answer = "The atomic number of hafnium is", " 72"
    joined = TOKENIZER.encode(prompt + answer)
    assert TOKENIZER.encode(prompt) + TOKENIZER.encode(answer) == joined


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode(TEXTS[0]) == TOKENIZER.encode(TEXTS[0])


def test_training_is_deterministic_and_the_fingerprint_tells_vocabularies_apart() -> None:
    assert train_tokenizer(TEXTS, 300).fingerprint == TOKENIZER.fingerprint
    assert train_tokenizer(TEXTS, 290).fingerprint != TOKENIZER.fingerprint


def test_the_vocabulary_has_the_size_asked_for() -> None:
    assert TOKENIZER.vocab_size == 300


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="257"):
        train_tokenizer(TEXTS, 256)
    with pytest.raises(InvalidArgumentError, match="not a tokenizer"):
        Tokenizer.from_json("{}")
    without = TOKENIZER.to_json().replace(END_OF_TEXT, "<|other|>")
    with pytest.raises(InvalidArgumentError, match="no token"):
        Tokenizer.from_json(without)
