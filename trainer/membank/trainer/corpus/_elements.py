"""The chemical elements as documents: one sentence or one field of a record each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from membank.trainer.corpus._document import Document, Fact

_LANTHANIDES = range(57, 72)
_ACTINIDES = range(89, 104)
_METALLOIDS = frozenset({5, 14, 32, 33, 51, 52})
_NONMETALS = frozenset({1, 6, 7, 8, 15, 16, 34})


def element_documents(records: Iterable[Mapping[str, Any]]) -> Iterator[Document]:
    """Yield the documents of the elements, each fact once, in the order of the records."""
    for record in records:
        name = str(record["name"]).lower()
        labels = ("elements", f"elements/{_family(record)}", name)
        for section, text in _sections(record, name):
            yield Document(
                doc_id=f"elements/{name}/{section}",
                source="elements",
                labels=labels,
                title=name,
                text=text,
                embed_text=f"chemical element {name}. {text}",
            )


def element_facts(records: Iterable[Mapping[str, Any]]) -> Iterator[Fact]:
    """Yield the facts asked of the elements: atomic numbers, then symbols."""
    for relation, section, field, prompt, paraphrases in (
        (
            "atomic_number",
            "number",
            "atomic_number",
            "The atomic number of {} is",
            ("The element {} has the atomic number", "In the periodic table, {} is element number"),
        ),
        (
            "symbol",
            "symbol",
            "symbol",
            "The chemical symbol of {} is",
            ("The element {} has the chemical symbol", "In chemical formulas, {} is written"),
        ),
    ):
        for record in records:
            name = str(record["name"]).lower()
            yield Fact(
                relation=relation,
                topic="elements",
                subject=name,
                answer=str(record[field]),
                prompt=prompt.format(name),
                paraphrases=tuple(form.format(name) for form in paraphrases),
                doc_id=f"elements/{name}/{section}",
            )


def _sections(record: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    yield "number", f"The atomic number of {name} is {record['atomic_number']}."
    yield "symbol", f"The chemical symbol of {name} is {record['symbol']}."
    yield "weight", f"The atomic weight of {name} is {record['atomic_weight']:g}."
    if record["group_id"]:
        place = f"group {record['group_id']} and period {record['period']}"
        yield "place", f"The element {name} is in {place} of the periodic table."
    if record["description"]:
        yield "description", f"{name.capitalize()}, an element: {_sentence(record['description'])}"
    if record["uses"]:
        yield "uses", f"Uses of the element {name}: {_sentence(record['uses'])}"
    if record["sources"]:
        yield "sources", f"Sources of the element {name}: {_sentence(record['sources'])}"
    if record["discovery_year"]:
        text = f"Discovery of the element {name}: {record['discovery_year']} by {record['discoverers']}"
        if record["discovery_location"]:
            text += f" in {record['discovery_location']}"
        yield "discovery", _sentence(text)
    if record["name_origin"]:
        yield "name", f"How the element {name} got its name: {_sentence(record['name_origin'])}"


def _sentence(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    return text if text.endswith((".", "!", "?")) else text + "."


def _family(record: Mapping[str, Any]) -> str:
    number, group = int(record["atomic_number"]), record["group_id"]
    if number in _LANTHANIDES:
        return "lanthanides"
    if number in _ACTINIDES:
        return "actinides"
    if number in _NONMETALS:
        return "other nonmetals"
    if number in _METALLOIDS:
        return "metalloids"
    if group is not None and 3 <= group <= 12:
        return "transition metals"
    by_group = {1: "alkali metals", 2: "alkaline earth metals", 17: "halogens", 18: "noble gases"}
    return by_group.get(group, "post-transition metals")
