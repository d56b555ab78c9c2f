"""A documents file: JSON lines that give texts, or name documents of a corpus."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from membank.trainer.json_lines import parse_line, read_lines
from membank.wire.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedDocument:
    """A document as somebody names it: by its text, by its name in a corpus, or by both."""

    line: int
    """Line of the file that named it, from 1; 0 where it came from the command line."""
    doc_id: str = ""
    """Name in the corpus; empty = not given."""
    text: str = ""
    """The text; empty = not given."""
    embed_text: str = ""
    """What the retriever embeds: title before text, as a corpus has it; empty = not given."""

    @property
    def named(self) -> str:
        """The document in words, for messages."""
        where = f"line {self.line}: " if self.line else ""
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        return where + (f"id {self.doc_id}" if self.doc_id else repr(shown))


def read_documents(path: Path) -> tuple[NamedDocument, ...]:
    """Read a documents file.

    Each line is an object with ``text``, ``id`` or both, and optionally ``title`` and
    ``embed_text``; so a corpus file is one. Empty lines are skipped.

    Parameters
    ----------
    path
        The file, UTF-8.

    Raises
    ------
    InvalidArgumentError
        The file cannot be read, names no document, or a line is not such an object.
    """
    try:
        lines = read_lines(path)
    except (OSError, ValueError) as err:
        raise InvalidArgumentError(f"{path} cannot be read as UTF-8 text: {err}") from err
    found = tuple(_documents(lines, path))
    if not found:
        raise InvalidArgumentError(
            f'{path} names no document; write one {{"text": ...}} or {{"id": ...}} a line'
        )
    return found


def _documents(lines: list[str], path: Path) -> Iterator[NamedDocument]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_line(line)
        except ValueError as err:
            raise InvalidArgumentError(f"{path}, line {number} is not JSON: {err}") from err
        values = record if isinstance(record, dict) else {}
        text, title = (values.get(key) or "" for key in ("text", "title"))
        doc_id = _name(values.get("id"))
        is_text = isinstance(text, str) and isinstance(title, str)
        if not is_text or doc_id is None or not (text.strip() or doc_id.strip()):
            raise InvalidArgumentError(
                f"{path}, line {number}: expected an object with a string `text`, an `id`, or both"
            )
        embed_text = str(values.get("embed_text") or (f"{title}. {text}" if title else text))
        yield NamedDocument(
            line=number, doc_id=doc_id, text=text, embed_text=embed_text if text else ""
        )


def _name(value: object) -> str | None:
    """Return an id as a corpus has it, where numbers are written out; None = it is none."""
    if value is None:
        return ""
    is_name = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value) if is_name else None
