"""What a corpus is made of: documents to train on and facts to ask about."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import fsspec

from membank.wire.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """One unit of text: a fact, a field of a record, or a paragraph of a section."""

    doc_id: str
    """Name of the document, unique in its corpus, for example ``elements/hafnium/number``."""
    source: str
    """Name of the part of the corpus that it came from, for example ``factbook``."""
    labels: tuple[str, ...]
    """True topic labels, coarse to fine; empty when the source gives none."""
    title: str
    """Title of the page or section that the text stands on; may be empty."""
    text: str
    """The text to train on."""
    embed_text: str
    """The text that the retriever embeds: title and section before the text, where they help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A fact to be completed, with the document that states it."""

    relation: str
    """Name of the relation, for example ``atomic_number``."""
    topic: str
    """Coarsest topic label of the document, for example ``elements``."""
    subject: str
    """What is asked about, as the prompt writes it."""
    answer: str
    """The continuation that counts as right, without leading space or final stop."""
    prompt: str
    """The beginning of the sentence that states the fact, up to the answer and without the space."""
    paraphrases: tuple[str, ...]
    """Other ways to ask; the corpus states none of them."""
    doc_id: str
    """The document that states the fact."""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and facts that they state.

    Raises
    ------
    InvalidArgumentError
        Two documents share a name, or a fact names a document that is not there.
    """

    name: str
    """Name of the corpus, kept with what is trained from it."""
    documents: tuple[Document, ...]
    """The documents; their order is part of the corpus."""
    facts: tuple[Fact, ...] = ()
    """Facts whose ``doc_id`` is in `documents`; empty for a plain text corpus."""

    def __post_init__(self) -> None:
        if len(self.index) != len(self.documents):
            msg = f"corpus {self.name!r}: document names are not unique"
            raise InvalidArgumentError(msg)
        missing = [fact.doc_id for fact in self.facts if fact.doc_id not in self.index]
        if missing:
            msg = f"corpus {self.name!r}: {len(missing)} facts name no document, as {missing[0]!r}"
            raise InvalidArgumentError(msg)

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Position of each document by its name."""
        return {document.doc_id: i for i, document in enumerate(self.documents)}

    @property
    def text_bytes(self) -> int:
        """Bytes of all texts in UTF-8."""
        return sum(len(document.text.encode()) for document in self.documents)

    def facts_of(self, relation: str) -> tuple[Fact, ...]:
        """Return the facts of one relation, in corpus order."""
        return tuple(fact for fact in self.facts if fact.relation == relation)

    @classmethod
    def from_jsonl(cls, url: str, *, name: str | None = None) -> Corpus:
        """Read a corpus from JSON lines at a path or fsspec URL; ``.gz`` and others are unpacked.

        Each line is an object with ``text`` and optionally ``id``, ``title``, ``labels`` (a list,
        coarse to fine), ``source`` and ``embed_text`` (default: title, then text).

        Parameters
        ----------
        url
            Path or URL, such as ``s3://bucket/corpus.jsonl.gz``.
        name
            Name of the corpus; None takes the last part of `url`.

        Raises
        ------
        InvalidArgumentError
            The file cannot be read, holds no document, or a line is not such an object.
        """
        name = name or url.rstrip("/").rsplit("/", 1)[-1]
        try:
            with fsspec.open(url, "rt", encoding="utf-8", compression="infer") as lines:
                documents = tuple(_documents_from_lines(lines, name))
        except (OSError, ValueError) as err:
            msg = f"cannot read corpus {url!r}: {err}"
            raise InvalidArgumentError(msg) from err
        if not documents:
            msg = f"corpus {url!r} holds no document"
            raise InvalidArgumentError(msg)
        return cls(name, documents)


def _documents_from_lines(lines: Iterable[str], source: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = json.loads(line)
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text.strip():
            msg = f"line {number}: expected an object with a non-empty string `text`"
            raise ValueError(msg)
        labels = record.get("labels", ())
        if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
            msg = f"line {number}: `labels` must be a list of strings"
            raise ValueError(msg)
        title = str(record.get("title") or "")
        yield Document(
            doc_id=str(record.get("id", f"{source}:{number}")),
            source=str(record.get("source", source)),
            labels=tuple(labels),
            title=title,
            text=text,
            embed_text=str(record.get("embed_text") or (f"{title}. {text}" if title else text)),
        )
