"""What the ways to ask for a fact have in common, and other facts that are stated alike.

A block that is taught one fact in many wordings, and nothing else in these wordings, learns that the
wording alone gives the answer: then its other facts, asked so, are answered with the new object. So the
wordings are carried over to the other facts of the block, each with the answer that it has.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Wordings:
    """The ways to ask for one fact, with a hole where its subject stands."""

    subject: str
    """What all of them have in common and other texts have not: a run of words."""
    forms: tuple[tuple[str, str], ...]
    """Text before and after the hole; the first is that of the prompt itself."""

    @classmethod
    def of(cls, prompts: Sequence[str], texts: Sequence[str]) -> Wordings | None:
        """Find the subject of prompts; None where they are fewer than two or have nothing in common.

        Parameters
        ----------
        prompts
            The prompts; the first is the one that the others reword.
        texts
            Texts on other subjects: of the runs of words that are in all prompts, the subject is the
            one that is in the fewest of these; of several such runs, the longest.

        Examples
        --------
        >>> prompts = ["The number of ada is", "Ada has the number"]
        >>> Wordings.of(prompts, ["The number of bob is 12."]).subject
        'ada'
        """
        if len(prompts) < 2:
            return None
        subject = _subject(prompts, texts)
        if not subject:
            return None
        forms = []
        for prompt in prompts:
            found = _whole(subject).search(prompt)
            assert found is not None  # that is how it was found
            forms.append((prompt[: found.start()], prompt[found.end() :]))
        return cls(subject=subject, forms=tuple(forms))

    def other_subjects(self, texts: Iterable[str]) -> list[str]:
        """Return the subjects of texts that begin as the prompt does, with another subject.

        Parameters
        ----------
        texts
            Prompts, or whole statements.
        """
        before, after = self.forms[0]
        alike = re.compile(rf"{re.escape(before)}(\S.{{0,60}}?){re.escape(after)}(?:\s|$)")
        found = (alike.match(text) for text in texts)
        subjects = dict.fromkeys(match[1] for match in found if match is not None)
        return [s for s in subjects if s.casefold() != self.subject.casefold()]

    def asked(self, subject: str) -> str:
        """Return the prompt with another subject."""
        before, after = self.forms[0]
        return _sentence(f"{before}{subject}{after}")

    def reworded(self, subject: str, count: int, rng: random.Random) -> list[str]:
        """Return some of the other wordings with another subject, each once."""
        others = self.forms[1:]
        drawn = rng.sample(others, min(count, len(others)))
        return [_sentence(f"{before}{subject}{after}") for before, after in drawn]


def _subject(prompts: Sequence[str], texts: Sequence[str]) -> str:
    """Return the run of whole words of the first prompt that is in all and tells them apart."""
    words = list(re.finditer(r"\S+", prompts[0]))
    common: set[str] = set()
    for first in range(len(words)):
        for last in range(first, len(words)):
            run = prompts[0][words[first].start() : words[last].end()].strip(",.?!:;")
            if not all(_whole(run).search(text) for text in prompts if run):
                break  # no longer one that begins here is in all, as it holds this one
            common |= {run} - {""}

    def rank(run: str) -> tuple[int, int, str]:
        return sum(_whole(run).search(text) is not None for text in texts), -len(run), run

    return min(common, key=rank, default="")


def _whole(run: str) -> re.Pattern[str]:
    # Whatever the case: a subject may begin a sentence.
    return re.compile(rf"(?<!\w){re.escape(run)}(?!\w)", re.IGNORECASE)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
