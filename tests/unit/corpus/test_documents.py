import gzip
import json
from pathlib import Path

import fsspec
import pytest

from membank.trainer.corpus import Corpus, Document, Fact
from membank.wire.errors import InvalidArgumentError


def document(doc_id: str, text: str = "some text") -> Document:
    return Document(doc_id=doc_id, source="s", labels=(), title="", text=text, embed_text=text)


def fact(doc_id: str) -> Fact:
    return Fact(
        relation="r",
        topic="t",
        subject="s",
        answer="a",
        prompt="p",
        paraphrases=(),
        doc_id=doc_id,
    )


def test_two_documents_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="not unique"):
        Corpus("c", (document("a"), document("a")))


def test_a_fact_without_its_document_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="elsewhere"):
        Corpus("c", (document("a"),), (fact("elsewhere"),))


def test_text_bytes_counts_utf8() -> None:
    assert Corpus("c", (document("a", "é"), document("b", "xy"))).text_bytes == 4


LINES = [
    {"text": "Cats purr.", "id": "cat", "title": "Cats", "labels": ["animals", "cats"]},
    {"text": "Dogs bark.", "embed_text": "dog noise"},
]


def jsonl() -> str:
    # A blank line between records is no record.
    return "\n\n".join(json.dumps(line) for line in LINES) + "\n"


def check(corpus: Corpus) -> None:
    cat, dog = corpus.documents
    assert (cat.doc_id, cat.title, cat.labels) == ("cat", "Cats", ("animals", "cats"))
    assert cat.embed_text == "Cats. Cats purr."
    assert (dog.text, dog.embed_text, dog.labels) == ("Dogs bark.", "dog noise", ())
    assert corpus.index[dog.doc_id] == 1


def test_reads_json_lines_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pets.jsonl"
    path.write_text(jsonl())
    corpus = Corpus.from_jsonl(str(path))
    assert corpus.name == "pets.jsonl"
    check(corpus)


def test_reads_packed_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "pets.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl().encode()))
    check(Corpus.from_jsonl(str(path), name="pets"))


def test_reads_json_lines_from_a_url() -> None:
    with fsspec.open("memory://corpus/pets.jsonl", "wt") as file:
        file.write(jsonl())
    check(Corpus.from_jsonl("memory://corpus/pets.jsonl"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no document"),
        ("not json\n", "cannot read"),
        ('{"title": "no text"}\n', "line 1"),
        ('{"text": "fine"}\n{"text": " "}\n', "line 2"),
        ('["text"]\n', "line 1"),
        ('{"text": "x", "labels": "animals"}\n', "labels"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(InvalidArgumentError, match=message):
        Corpus.from_jsonl(str(path))


def test_a_missing_file_is_an_invalid_argument(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"absent\.jsonl"):
        Corpus.from_jsonl(str(tmp_path / "absent.jsonl"))
