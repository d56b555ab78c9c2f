"""The corpora that are carried with the package, in several sizes."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from membank.trainer.corpus._document import Corpus, Document
from membank.trainer.corpus._elements import element_documents, element_facts
from membank.trainer.corpus._factbook import factbook_documents, factbook_facts
from membank.trainer.corpus._prose import openstax_documents, wordnet_documents
from membank.wire.errors import InvalidArgumentError


@dataclass(frozen=True, kw_only=True, slots=True)
class CarriedSelection:
    """What a carried corpus takes from each of its parts."""

    element_sections: tuple[str, ...] | None = None
    """Sections of the elements; None takes all, an empty tuple none."""
    factbook_fields: tuple[str, ...] | None = None
    """Fields of the Factbook; None takes all, an empty tuple none."""
    books: tuple[str, ...] | None = None
    """Textbooks; None takes all, an empty tuple none."""
    pieces_per_chapter: int | None = None
    """Paragraphs taken from the start of each chapter; None takes all."""
    wordnet_every: int | None = 1
    """Takes each n-th dictionary entry; None takes none."""


_FAST_FIELDS = (
    "Capital / name",
    "Capital / geographic coordinates",
    "Capital / time difference",
    "Location",
    "Natural resources",
    "Internet country code",
)
_DEMO_FIELDS = (
    *_FAST_FIELDS,
    "Capital / etymology",
    "Climate",
    "Terrain",
    "Religions",
    "Industries",
    "Agricultural products",
    "Government type",
    "Independence",
    "Exchange rates / Currency",
    "National symbol(s)",
)

CARRIED: dict[str, CarriedSelection] = {
    "fast": CarriedSelection(
        element_sections=("number", "symbol", "description", "uses"),
        factbook_fields=_FAST_FIELDS,
        books=("astronomy", "anatomy-physiology", "us-history"),
        pieces_per_chapter=12,
        wordnet_every=20,
    ),
    "demo": CarriedSelection(
        element_sections=(
            "number",
            "symbol",
            "description",
            "uses",
            "sources",
            "discovery",
            "name",
        ),
        factbook_fields=_DEMO_FIELDS,
        books=("astronomy", "anatomy-physiology", "us-history", "principles-economics-bundle"),
        pieces_per_chapter=30,
        wordnet_every=5,
    ),
    "full": CarriedSelection(),
}
"""Carried corpora by name."""


def load_corpus(name: str = "demo", selection: CarriedSelection | None = None) -> Corpus:
    """Load a corpus that is carried with the package.

    Parameters
    ----------
    name
        ``fast``, ``demo`` or ``full``; with `selection`, any name.
    selection
        What to take instead of the named corpus's own selection; None takes that.

    Raises
    ------
    InvalidArgumentError
        No carried corpus has this name.
    """
    if selection is None:
        if name not in CARRIED:
            msg = f"no carried corpus is named {name!r}; there are {', '.join(sorted(CARRIED))}"
            raise InvalidArgumentError(msg)
        selection = CARRIED[name]
    documents = tuple(_documents(selection))
    present = {document.doc_id for document in documents}
    asked = (*element_facts(_records("elements")), *factbook_facts(_records("factbook")))
    return Corpus(name, documents, tuple(fact for fact in asked if fact.doc_id in present))


def _documents(selection: CarriedSelection) -> list[Document]:
    sections = selection.element_sections
    documents = [
        document
        for document in element_documents(_records("elements"))
        if sections is None or document.doc_id.rsplit("/", 1)[-1] in sections
    ]
    documents += factbook_documents(_records("factbook"), selection.factbook_fields)
    if selection.books is None or selection.books:
        documents += openstax_documents(
            _records("openstax"),
            books=selection.books,
            max_pieces_per_chapter=selection.pieces_per_chapter,
        )
    if selection.wordnet_every is not None:
        documents += wordnet_documents(_records("wordnet"), every=selection.wordnet_every)
    return documents


@lru_cache(maxsize=8)
def _records(part: str) -> tuple[dict[str, Any], ...]:
    packed = files("membank.trainer").joinpath("data", f"{part}.jsonl.gz").read_bytes()
    return tuple(json.loads(line) for line in gzip.decompress(packed).splitlines())
