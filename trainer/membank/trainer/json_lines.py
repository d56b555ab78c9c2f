"""Lines of JSON that people and other programs wrote."""

from __future__ import annotations

import json
from pathlib import Path


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file, without their ends.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is not UTF-8.
    """
    # A mark of byte order, as some editors write, is no part of the text. Not `splitlines`: a JSON
    # string may hold U+2028 and others of its line ends as they are.
    return path.read_text(encoding="utf-8-sig").split("\n")


def parse_line(line: str) -> object:
    """Return what a line of JSON says.

    Raises
    ------
    ValueError
        It is not JSON, is nested too deeply, or holds what is no text.
    """
    try:
        record: object = json.loads(line)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # Found here, and not by a tokenizer or a log after hours.
        raise ValueError("it holds half of a surrogate pair, which is no character") from None
    return record
