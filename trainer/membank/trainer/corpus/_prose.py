"""Running text as documents: paragraphs of textbooks, entries of a dictionary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from membank.trainer.corpus._document import Document

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z(\"'])")
_EMPTY_REFERENCE = re.compile(r"\s*\(\s*(?:[Ff]igure|[Tt]able|[Ss]ee)?\s*\)")
_SHORTEST_CHARS = 60


def split_text(text: str, max_chars: int) -> list[str]:
    """Cut a text at paragraph and sentence ends into pieces of about `max_chars`.

    Parameters
    ----------
    text
        Paragraphs separated by line ends.
    max_chars
        Length that a piece exceeds only where one sentence does.

    Returns
    -------
    list[str]
        Pieces in order; each lies within one paragraph.
    """
    pieces: list[str] = []
    for raw in text.splitlines():
        paragraph = re.sub(r"\s+", " ", _EMPTY_REFERENCE.sub("", raw)).strip()
        piece = ""
        for sentence in _SENTENCE_END.split(paragraph):
            if piece and len(piece) + 1 + len(sentence) > max_chars:
                pieces.append(piece)
                piece = sentence
            else:
                piece = f"{piece} {sentence}" if piece else sentence
        if piece:
            pieces.append(piece)
    return pieces


def openstax_documents(
    records: Iterable[Mapping[str, str]],
    *,
    books: Sequence[str] | None = None,
    max_pieces_per_chapter: int | None = None,
    max_chars: int = 400,
) -> Iterator[Document]:
    """Yield paragraphs of textbook sections.

    Parameters
    ----------
    records
        Sections with ``book``, ``chapter``, ``module_title``, ``section`` and ``text``.
    books
        Books to take; None takes all.
    max_pieces_per_chapter
        Paragraphs to take from the start of each chapter; None takes all.
    max_chars
        Length of a paragraph in characters, exceeded only by single sentences.
    """
    taken: dict[tuple[str, str], int] = {}
    for number, record in enumerate(records):
        book, chapter = record["book"], record["chapter"]
        if books is not None and book not in books:
            continue
        heading = ". ".join(part for part in (record["module_title"], record["section"]) if part)
        for i, piece in enumerate(split_text(record["text"], max_chars)):
            count = taken.get((book, chapter), 0)
            if len(piece) < _SHORTEST_CHARS:
                continue
            if max_pieces_per_chapter is not None and count >= max_pieces_per_chapter:
                break
            taken[book, chapter] = count + 1
            yield Document(
                doc_id=f"openstax/{book}/{number}/{i}",
                source="openstax",
                labels=(book, f"{book}/{chapter}", heading),
                title=heading,
                text=piece,
                embed_text=f"{chapter}. {heading}. {piece}",
            )


def wordnet_documents(
    records: Iterable[Mapping[str, object]], *, every: int = 1
) -> Iterator[Document]:
    """Yield one document for each dictionary entry, taking each `every`-th.

    Parameters
    ----------
    records
        Entries with ``words`` (a list), ``topic`` (such as ``animal``) and ``gloss``.
    every
        1 takes all entries, n each n-th.
    """
    for number, record in enumerate(records):
        if number % every:
            continue
        words = record["words"]
        assert isinstance(words, list)
        topic = str(record["topic"])
        text = f"{', '.join(words)}: {record['gloss']}."
        yield Document(
            doc_id=f"wordnet/{number}",
            source="wordnet",
            labels=("dictionary", f"dictionary/{topic}"),
            title=str(words[0]),
            text=text[0].upper() + text[1:],
            embed_text=f"{topic}. {text}",
        )
