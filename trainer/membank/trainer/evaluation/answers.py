"""When a completion states a fact.

Numbers: the first integer of the completion must be the answer (the paper's protocol for atomic
numbers, appendix B). Everything else: the completion must begin with the answer, word by word,
whatever the case, accents and punctuation.
"""

from __future__ import annotations

import re
import unicodedata

_INTEGER = re.compile(r"\d+(?:,\d{3})*")
_WORD = re.compile(r"[^\W_]+")


def first_integer(text: str) -> int | None:
    """Return the first integer in a text, commas between thousands read over; None if none."""
    found = _INTEGER.search(text)
    return None if found is None else int(found[0].replace(",", ""))


def normalised_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without accents and punctuation."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    return _WORD.findall(plain)


def states(completion: str, answer: str) -> bool:
    """Return whether a completion states the answer.

    Parameters
    ----------
    completion
        Text generated after the prompt.
    answer
        The right answer; digits alone are compared as an integer.

    Examples
    --------
    >>> states(" 72. It is a metal.", "72")
    True
    >>> states(" 720", "72")
    False
    >>> states(" Bogota, the largest city", "Bogotá")
    True
    >>> states(" Parisian", "Paris")
    False
    """
    if answer.isdecimal():
        return first_integer(completion) == int(answer)
    wanted = normalised_words(answer)
    return bool(wanted) and normalised_words(completion)[: len(wanted)] == wanted
