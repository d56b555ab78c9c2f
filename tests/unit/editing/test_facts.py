"""Facts are read from JSON lines, and a slip is told with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from membank.trainer.editing import Statement, parse_facts, read_facts
from membank.wire.errors import InvalidArgumentError

GOOD = '{"prompt": "The number of ada is", "target": "55", "id": "ada"}'


def test_a_line_is_a_fact() -> None:
    line = json.dumps(
        {
            "prompt": "The number of ada is ",
            "target": " 55",
            "paraphrases": ["Ada has the number"],
            "neighbours": [{"prompt": "The number of eve is", "target": "12"}],
        }
    )
    ada, bob = parse_facts([line, "", GOOD.replace("ada", "bob")], what="facts")
    assert (ada.prompt, ada.target) == ("The number of ada is", "55")
    assert ada.prompts == ("The number of ada is", "Ada has the number")
    assert ada.neighbours == (Statement(prompt="The number of eve is", target="12"),)
    assert (ada.line, bob.line, bob.edit_id) == (1, 3, "bob")
    assert ada.edit_id


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[]", "not an object"),
        ('{"target": "55"}', "prompt is missing"),
        ('{"prompt": "The"}', "target is missing"),
        ('{"prompt": "", "target": "55"}', "prompt must be a text"),
        ('{"prompt": "The", "target": 55}', "target must be a text"),
        ('{"prompt": "The", "target": "5", "answer": "6"}', "unknown field 'answer'"),
        ('{"prompt": "The", "target": "5", "paraphrases": "A"}', "paraphrases must be a list"),
        ('{"prompt": "The", "target": "5", "paraphrases": [""]}', "paraphrases must be a text"),
        ('{"prompt": "The", "target": "5", "neighbours": ["A"]}', "a neighbour must be"),
        (
            '{"prompt": "The", "target": "5", "neighbours": [{"prompt": "The", "target": "6"}]}',
            "to be changed and to be kept",
        ),
        (GOOD, "id 'ada' is that of line 1"),
        (
            '{"prompt": "The", "target": "5", "neighbours": '
            '[{"prompt": "The number of ada is", "target": "6"}]}',
            "to be kept, and to be changed in line 1",
        ),
        ('{"prompt": "' + "a " * 501 + '", "target": "5"}', "prompt has 1002 characters"),
        (GOOD.replace('"ada"', '"a"').replace("55", "56"), "with '55' in line 1"),
    ],
)
def test_a_slip_is_told_with_its_line(line: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"facts\.jsonl, line 3") as caught:
        parse_facts([GOOD, "", line], what="facts.jsonl")
    assert words in str(caught.value)


def test_an_empty_or_missing_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        read_facts(file)
    file.write_text("\n")
    with pytest.raises(InvalidArgumentError, match="holds no fact"):
        read_facts(file)


def test_a_file_is_read_as_other_programs_write_it(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    # A mark of byte order, line ends of Windows, and a line separator within a string.
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("55", "5\u2028 5").encode() + b"\r\n")
    (ada,) = read_facts(file)
    assert ada.target == "5\u2028 5"


@pytest.mark.parametrize(
    ("line", "words"), [("[" * 100_000, "nested"), (GOOD.replace("55", "\\ud800"), "surrogate")]
)
def test_what_no_file_should_hold_is_told_too(line: str, words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"line 1: not JSON.*{words}"):
        parse_facts([line], what="facts.jsonl")
