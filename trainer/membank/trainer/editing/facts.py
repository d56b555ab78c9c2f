"""Facts to be changed, read from JSON lines."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from membank.trainer.editing.contract import FactEdit, Statement
from membank.trainer.json_lines import parse_line, read_lines
from membank.wire.errors import InvalidArgumentError, Reason

_FIELDS = frozenset({"prompt", "target", "paraphrases", "neighbours", "id"})
_MAX_ID = 64
_MAX_TEXT = 1000
"""Characters of a prompt or a target: it is a statement, and all of a block are padded to the longest."""


def read_facts(path: Path) -> tuple[FactEdit, ...]:
    """Read facts from a file of JSON lines; empty lines are passed over.

    Parameters
    ----------
    path
        Each line is an object with ``prompt`` and ``target``, and perhaps ``paraphrases`` (a list
        of prompts), ``neighbours`` (a list of objects with ``prompt`` and ``target``) and ``id``.

    Returns
    -------
    tuple of FactEdit
        The facts, in the order of the file. One without ``id`` gets a new one.

    Raises
    ------
    InvalidArgumentError
        If the file cannot be read, holds no fact, or a line is not as it must be; the message names
        the line.
    """
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as err:
        raise InvalidArgumentError(f"{path} cannot be read: {err}") from err
    return parse_facts(lines, what=str(path))


def parse_facts(lines: Iterable[str], *, what: str) -> tuple[FactEdit, ...]:
    """Read facts from JSON lines; see `read_facts`.

    Parameters
    ----------
    lines
        The lines.
    what
        How messages name where they are from.
    """
    facts: list[FactEdit] = []
    lines_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        fact = _Line(what, number).fact(line)
        if fact.edit_id in lines_of:
            _Line(what, number).fail(
                f"id {fact.edit_id!r} is that of line {lines_of[fact.edit_id]}"
            )
        lines_of[fact.edit_id] = number
        facts.append(fact)
    if not facts:
        raise InvalidArgumentError(f"{what} holds no fact; give one JSON object per line")
    _check_contradictions(facts, what)
    return tuple(facts)


def _check_contradictions(facts: Sequence[FactEdit], what: str) -> None:
    told: dict[str, FactEdit] = {}
    for fact in facts:
        for prompt in fact.prompts:
            other = told.setdefault(prompt, fact)
            if other.target != fact.target:
                _Line(what, fact.line).fail(
                    f"{prompt!r} is to be answered with {fact.target!r}, and with "
                    f"{other.target!r} in line {other.line}; give one of them"
                )
    for fact in facts:
        for neighbour in fact.neighbours:
            if neighbour.prompt in told:
                _Line(what, fact.line).fail(
                    f"{neighbour.prompt!r} is to be kept, and to be changed in line "
                    f"{told[neighbour.prompt].line}"
                )


class _Line:
    """One line of the file; every complaint names it."""

    def __init__(self, what: str, number: int) -> None:
        self._what = what
        self._number = number

    def fail(self, why: str) -> NoReturn:
        raise InvalidArgumentError(
            f"{self._what}, line {self._number}: {why}",
            reason=Reason.BAD_ARGUMENT,
            metadata={"line": str(self._number)},
        )

    def fact(self, line: str) -> FactEdit:
        try:
            body = parse_line(line)
        except ValueError as err:
            self.fail(f"not JSON: {err}")
        if not isinstance(body, dict):
            self.fail('not an object; it must be like {"prompt": ..., "target": ...}')
        if unknown := sorted(body.keys() - _FIELDS):
            self.fail(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(_FIELDS))}")
        prompt, target = self._text(body, "prompt"), self._text(body, "target")
        edit_id = self._text(body, "id") if "id" in body else uuid.uuid4().hex[:12]
        if len(edit_id) > _MAX_ID or not edit_id.isprintable():
            self.fail(f"id must be printable and at most {_MAX_ID} characters long")
        neighbours = tuple(self._neighbour(item) for item in self._list(body, "neighbours"))
        paraphrases = tuple(self._paraphrase(item) for item in self._list(body, "paraphrases"))
        for neighbour in neighbours:
            if neighbour.prompt in (prompt, *paraphrases):
                self.fail(f"{neighbour.prompt!r} is to be changed and to be kept")
        return FactEdit(
            edit_id=edit_id,
            prompt=prompt,
            target=target,
            paraphrases=paraphrases,
            neighbours=neighbours,
            line=self._number,
        )

    def _neighbour(self, item: object) -> Statement:
        if not isinstance(item, dict):
            self.fail('a neighbour must be like {"prompt": ..., "target": ...}')
        return Statement(prompt=self._text(item, "prompt"), target=self._text(item, "target"))

    def _paraphrase(self, item: object) -> str:
        return self._text({"paraphrases": item}, "paraphrases")

    def _list(self, body: Mapping[str, object], name: str) -> list[object]:
        found = body.get(name, [])
        if not isinstance(found, list):
            self.fail(f"{name} must be a list")
        return found

    def _text(self, body: Mapping[str, object], name: str) -> str:
        if name not in body:
            self.fail(f"{name} is missing")
        text = body[name]
        if not isinstance(text, str) or not text.strip():
            self.fail(f"{name} must be a text that is not empty")
        if len(text) > _MAX_TEXT:
            self.fail(f"{name} has {len(text)} characters; at most {_MAX_TEXT} are taken")
        return text.strip()
