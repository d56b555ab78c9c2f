"""Documents files: what they name, and which documents of a corpus that is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from membank.trainer.corpus import Corpus
from membank.trainer.finding import NamedDocument, read_documents
from membank.trainer.finding.matching import match_documents
from membank.wire.errors import InvalidArgumentError
from tiny_world import World


@pytest.fixture
def corpus(world: World) -> Corpus:
    return Corpus(name="tiny", documents=world.documents, facts=world.facts)


def test_a_file_names_documents_by_text_or_id(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "one", "title": "T"}\n\n{"id": "city/bob"}\n{"id": 7, "text": "x"}\n')
    assert read_documents(path) == (
        NamedDocument(line=1, text="one", embed_text="T. one"),
        NamedDocument(line=3, doc_id="city/bob"),
        NamedDocument(line=4, doc_id="7", text="x", embed_text="x"),
    )


def test_a_file_is_read_as_other_programs_write_it(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    # A mark of byte order, and a line separator within a string.
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "one\u2028two"}\n{"id": 0}\n'.encode())
    one, zero = read_documents(path)
    assert (one.text, zero.doc_id) == ("one\u2028two", "0")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "names no document"),
        ("{", "line 1 is not JSON"),
        ('{"text": "a"}\n{"title": "b"}', "line 2: expected"),
        ('{"text": 3}', "line 1: expected"),
        ("[1]", "line 1: expected"),
        ('{"id": ["a", "b"]}', "line 1: expected"),
        ('{"id": true, "text": "a"}', "line 1: expected"),
        ("[" * 100_000, "line 1 is not JSON: it is nested"),
        ('{"text": "\\ud800"}', "line 1 is not JSON.*surrogate"),
        (b"\xff\xfe\x00", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: str | bytes | None, words: str) -> None:
    path = tmp_path / "d.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidArgumentError, match=words) as caught:
        read_documents(path)
    assert "\n" not in str(caught.value)
    assert "d.jsonl" in str(caught.value)


def test_documents_of_a_corpus_are_found_by_id_and_by_text(corpus: Corpus) -> None:
    text = corpus.documents[5].text
    found = match_documents(
        [
            NamedDocument(line=1, doc_id="city/bob"),
            NamedDocument(line=2, text=f"  {text.replace(' ', '   ')}\n"),
            NamedDocument(line=3, doc_id=corpus.documents[5].doc_id, text=text),
        ],
        corpus,
    )
    assert found.positions == ((corpus.index["city/bob"],), (5,), (5,))
    assert found.distinct == (5, corpus.index["city/bob"])
    assert found.unknown == ()


def test_what_is_not_in_the_corpus_is_said(corpus: Corpus) -> None:
    found = match_documents(
        [
            NamedDocument(line=1, doc_id="city/zoe"),
            NamedDocument(line=2, text="The number of zoe is 3."),
            NamedDocument(line=3, doc_id="city/bob", text="The city of bob is rome."),
        ],
        corpus,
    )
    assert found.positions == ((), (), ())
    for said, words in zip(found.unknown, ("no such id", "this text", "another text"), strict=True):
        assert words in said


def test_a_text_that_stands_twice_is_both(corpus: Corpus) -> None:
    twice = (*corpus.documents, replace(corpus.documents[3], doc_id="copy"))
    found = match_documents(
        [NamedDocument(line=1, text=twice[3].text)], Corpus(name="t", documents=twice)
    )
    assert found.positions == ((3, len(twice) - 1),)
