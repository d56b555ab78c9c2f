"""The World Factbook as documents: one field of one country each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from membank.trainer.corpus._document import Document, Fact
from membank.wire.errors import InvalidArgumentError

# Names that English writes with an article inside a sentence.
_WITH_ARTICLE = re.compile(
    r"^(United |Czech Rep|Dominican Rep|Democratic Rep|Republic of|Federated States|Central African"
    r"|Netherlands|Philippines|Maldives|Seychelles|Comoros|European Union|Holy See|Isle of"
    r"|British |.* Islands$|.* Republic$)"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FactbookField:
    """How one field of the Factbook becomes a document."""

    section: str
    """Last part of the document's name."""
    topic: str
    """Coarsest label: fields about capitals make a topic of their own."""
    form: str
    """Sentence with ``{country}`` and ``{value}``."""


FACTBOOK_FIELDS: Mapping[str, FactbookField] = {
    name: FactbookField(section=section, topic=topic, form=form)
    for name, section, topic, form in (
        ("Capital / name", "capital", "capitals", "The capital of {country} is {value}."),
        (
            "Capital / geographic coordinates",
            "capital coordinates",
            "capitals",
            "The capital of {country} lies at {value}.",
        ),
        (
            "Capital / time difference",
            "capital time",
            "capitals",
            "The time in the capital of {country} is {value}.",
        ),
        (
            "Capital / etymology",
            "capital etymology",
            "capitals",
            "How the capital of {country} got its name: {value}.",
        ),
        ("Background", "background", "countries", "{value}"),
        ("Location", "location", "countries", "Location of {country}: {value}."),
        ("Climate", "climate", "countries", "Climate of {country}: {value}."),
        ("Terrain", "terrain", "countries", "Terrain of {country}: {value}."),
        (
            "Natural resources",
            "resources",
            "countries",
            "Natural resources of {country}: {value}.",
        ),
        ("Natural hazards", "hazards", "countries", "Natural hazards of {country}: {value}."),
        (
            "Elevation / highest point",
            "highest point",
            "countries",
            "The highest point of {country} is {value}.",
        ),
        ("Coastline", "coastline", "countries", "The coastline of {country} measures {value}."),
        (
            "Area - comparative",
            "area",
            "countries",
            "Compared in area, {country} is {value}.",
        ),
        (
            "Population distribution",
            "population",
            "countries",
            "Where the people of {country} live: {value}.",
        ),
        ("Ethnic groups", "ethnic groups", "countries", "Ethnic groups of {country}: {value}."),
        ("Religions", "religions", "countries", "Religions of {country}: {value}."),
        ("Languages / Languages", "languages", "countries", "Languages of {country}: {value}."),
        (
            "Nationality / noun",
            "nationality",
            "countries",
            "The people of {country} are called {value}.",
        ),
        (
            "Country name / etymology",
            "etymology",
            "countries",
            "Origin of the name {country}: {value}.",
        ),
        (
            "Government type",
            "government",
            "government",
            "The government of {country} is of the type {value}.",
        ),
        (
            "Administrative divisions",
            "divisions",
            "government",
            "Administrative divisions of {country}: {value}.",
        ),
        ("Legal system", "law", "government", "Legal system of {country}: {value}."),
        ("Independence", "independence", "government", "Independence of {country}: {value}."),
        ("National holiday", "holiday", "government", "National holiday of {country}: {value}."),
        ("Flag", "flag", "government", "Flag of {country}: {value}."),
        ("National symbol(s)", "symbols", "government", "National symbols of {country}: {value}."),
        (
            "National anthem(s) / title",
            "anthem",
            "government",
            "The national anthem of {country} is {value}.",
        ),
        (
            "Legislative branch / legislature name",
            "legislature",
            "government",
            "The legislature of {country} is the {value}.",
        ),
        (
            "Executive branch / chief of state",
            "chief of state",
            "government",
            "The chief of state of {country}: {value}.",
        ),
        (
            "Judicial branch / highest court(s)",
            "courts",
            "government",
            "Highest courts of {country}: {value}.",
        ),
        (
            "Military and security forces",
            "forces",
            "government",
            "Military and security forces of {country}: {value}.",
        ),
        ("Economic overview", "economy", "economy", "Economy of {country}: {value}."),
        (
            "Agricultural products",
            "agriculture",
            "economy",
            "Agricultural products of {country}: {value}.",
        ),
        ("Industries", "industries", "economy", "Industries of {country}: {value}."),
        ("Exports - commodities", "exports", "economy", "Exports of {country}: {value}."),
        ("Imports - commodities", "imports", "economy", "Imports of {country}: {value}."),
        (
            "Exchange rates / Currency",
            "currency",
            "economy",
            "The currency of {country} is the {value}.",
        ),
        ("Broadcast media", "media", "economy", "Broadcast media of {country}: {value}."),
        (
            "Internet country code",
            "internet code",
            "economy",
            "The internet country code of {country} is {value}.",
        ),
    )
}
"""Fields that are known, by their name in the Factbook."""

_FACTS = (
    (
        "capital",
        "Capital / name",
        "The capital of {} is",
        ("The capital city of {} is called", "{} is governed from its capital"),
    ),
    (
        "internet_code",
        "Internet country code",
        "The internet country code of {} is",
        ("On the internet, the country code of {} is", "Web addresses in {} end in"),
    ),
    (
        "currency",
        "Exchange rates / Currency",
        "The currency of {} is the",
        ("The money used in {} is the",),
    ),
)


def factbook_documents(
    records: Iterable[Mapping[str, str]], fields: Iterable[str] | None = None
) -> Iterator[Document]:
    """Yield one document for each field of each country.

    Parameters
    ----------
    records
        Objects with ``country``, ``region``, ``field`` and ``text``.
    fields
        Names of the fields to take; None takes all that are known.

    Raises
    ------
    InvalidArgumentError
        A field is not known.
    """
    wanted = set(FACTBOOK_FIELDS) if fields is None else set(fields)
    if unknown := wanted - set(FACTBOOK_FIELDS):
        msg = f"unknown Factbook fields: {sorted(unknown)}; known: {sorted(FACTBOOK_FIELDS)}"
        raise InvalidArgumentError(msg)
    for record in records:
        if record["field"] not in wanted:
            continue
        field = FACTBOOK_FIELDS[record["field"]]
        country = record["country"]
        value = _value(record)
        if not value:
            continue
        text = field.form.format(country=_in_sentence(country), value=value)
        yield Document(
            doc_id=_doc_id(record),
            source="factbook",
            labels=(field.topic, f"{field.topic}/{field.section}", country),
            title=f"{country} ({field.topic})",
            text=text[0].upper() + text[1:],
            embed_text=f"{field.section}. {text}",
        )


def factbook_facts(records: Iterable[Mapping[str, str]]) -> Iterator[Fact]:
    """Yield the facts asked of countries: capitals, internet codes, currencies.

    Left out: answers that contain the country's name or are contained in it (Singapore, Kuwait
    City), which can be given without knowing; countries without one capital.
    """
    rows = list(records)
    for relation, field, prompt, paraphrases in _FACTS:
        for record in rows:
            if record["field"] != field:
                continue
            answer = _value(record)
            country = record["country"]
            if not answer or _tells(country, answer) or ";" in answer:
                continue
            subject = _in_sentence(country)
            first = prompt.format(subject)
            yield Fact(
                relation=relation,
                topic=FACTBOOK_FIELDS[field].topic,
                subject=country,
                answer=answer,
                prompt=first[0].upper() + first[1:],
                paraphrases=tuple(
                    form.format(subject)[0].upper() + form.format(subject)[1:]
                    for form in paraphrases
                ),
                doc_id=_doc_id(record),
            )


def _doc_id(record: Mapping[str, str]) -> str:
    section = FACTBOOK_FIELDS[record["field"]].section
    return f"factbook/{record['code']}/{section.replace(' ', '-')}"


def _in_sentence(country: str) -> str:
    if country.startswith("The "):
        return "the " + country.removeprefix("The ")
    return f"the {country}" if _WITH_ARTICLE.match(country) else country


def _tells(country: str, answer: str) -> bool:
    """Return whether the country's name gives the answer away."""
    one, other = country.lower(), answer.lower()
    return one in other or other in one


def _value(record: Mapping[str, str]) -> str:
    text = record["text"]
    match record["field"]:
        case "Capital / name":
            if text.startswith(("no official", "administered")):
                return ""
            # "Porto-Novo (constitutional capital); Cotonou ...": the first named is the capital.
            text = re.split(r"\s*[;(]| in Romanian", text)[0]
            return text.split(",")[0] if text.count(",") > 1 else text.strip(" ,")
        case "Exchange rates / Currency":
            return re.sub(r"\s*\(.*|\s*per US dollar.*|\s*-\s*$", "", text).strip()
        case "Internet country code":
            found = re.match(r"\.[a-z]{2}\b", text)
            return found.group() if found else ""
        case "Nationality / noun":
            return re.sub(r"\s*\(singular and plural\)|\(s\)", "", text).split(";")[0].strip()
        case _:
            return text.rstrip(".").removeprefix("description: ")
