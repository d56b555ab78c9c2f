"""Which documents of a corpus a documents file means."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from membank.trainer.corpus import Corpus
from membank.trainer.finding.documents import NamedDocument


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchedDocuments:
    """Documents of a corpus that were named, and what was named in vain."""

    positions: tuple[tuple[int, ...], ...]
    """For each named document its positions in the corpus, ascending; empty where it has none.
    A text that stands in the corpus several times is all of them."""
    unknown: tuple[str, ...]
    """What fits no document of the corpus, and why, in words."""

    @property
    def distinct(self) -> tuple[int, ...]:
        """Every position once, ascending."""
        return tuple(sorted({position for found in self.positions for position in found}))


def match_documents(documents: Sequence[NamedDocument], corpus: Corpus) -> MatchedDocuments:
    """Find named documents in a corpus: by id, else by text.

    Parameters
    ----------
    documents
        What was named. Where id and text are given, both must fit: the id of one text beside
        another would take the wrong document.
    corpus
        The corpus.

    Returns
    -------
    MatchedDocuments
        Texts are compared without regard to white space at the ends and to its kind and amount.
    """
    by_text: dict[str, list[int]] = defaultdict(list)
    for position, document in enumerate(corpus.documents):
        by_text[_squeezed(document.text)].append(position)
    positions: list[tuple[int, ...]] = []
    unknown: list[str] = []
    for named in documents:
        found, problem = _find(named, corpus, by_text)
        positions.append(tuple(found))
        if problem:
            unknown.append(f"{named.named}: {problem}")
    return MatchedDocuments(positions=tuple(positions), unknown=tuple(unknown))


def _find(
    named: NamedDocument, corpus: Corpus, by_text: dict[str, list[int]]
) -> tuple[Iterable[int], str]:
    if not named.doc_id:
        found = by_text.get(_squeezed(named.text), [])
        return found, "" if found else f"no document of corpus {corpus.name} has this text"
    position = corpus.index.get(named.doc_id)
    if position is None:
        return (), f"corpus {corpus.name} has no such id"
    here = _squeezed(corpus.documents[position].text)
    if named.text and _squeezed(named.text) != here:
        return (), f"corpus {corpus.name} has another text under this id"
    return (position,), ""


def _squeezed(text: str) -> str:
    return " ".join(text.split())
