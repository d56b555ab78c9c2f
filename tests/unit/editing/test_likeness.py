"""The subject of a fact is found from its wordings, and other facts that are stated alike."""

from __future__ import annotations

import random

from membank.trainer.editing.likeness import Wordings

HAFNIUM = (
    "The atomic number of hafnium is",
    "The element hafnium has the atomic number",
    "What is the atomic number of hafnium? It is",
)
OTHERS = (
    "The atomic number of iron is 26.",
    "The number of bob is 12.",
    "The capital of Mali is Bamako.",
)
NETHERLANDS = (
    "The capital of the Netherlands is",
    "The Netherlands is governed from its capital",
    "As its capital, the Netherlands has",
)


def found(prompts: tuple[str, ...]) -> Wordings:
    wordings = Wordings.of(prompts, OTHERS)
    assert wordings is not None
    return wordings


def test_the_subject_is_what_all_wordings_have_in_common() -> None:
    # "the atomic number" is in all of them too, and longer: the prompt that lacks it decides.
    assert found(HAFNIUM).subject == "hafnium"
    assert found(NETHERLANDS).subject == "the Netherlands"


def test_a_subject_is_a_whole_word() -> None:
    wordings = found(("The number of ada is", "In Canada, ada has the number"))
    assert wordings.forms[1] == ("In Canada, ", " has the number")


def test_one_wording_or_nothing_in_common_tells_nothing() -> None:
    assert Wordings.of(HAFNIUM[:1], OTHERS) is None
    assert Wordings.of(["The number of ada is", "Bob has"], OTHERS) is None


def test_facts_stated_alike_are_found_and_reworded() -> None:
    wordings = found((*HAFNIUM, "In the table, hafnium is element"))
    texts = [
        "The atomic number of iron is 26.",
        "The atomic number of hafnium is 72.",
        "The chemical symbol of iron is Fe.",
        "The atomic number of gold is",
        "The atomic number of iron is",
    ]
    assert wordings.other_subjects(texts) == ["iron", "gold"]
    assert wordings.asked("iron") == "The atomic number of iron is"
    every = wordings.reworded("iron", 9, random.Random(0))
    assert sorted(every) == [
        "In the table, iron is element",
        "The element iron has the atomic number",
        "What is the atomic number of iron? It is",
    ]
    assert len(wordings.reworded("iron", 2, random.Random(0))) == 2


def test_a_long_prompt_takes_no_longer_than_what_it_has_in_common() -> None:
    # All runs of so many words would be gigabytes.
    long = " ".join(f"word{n}" for n in range(3000))
    found = Wordings.of([f"{long} ada", "Ada has the number"], [])
    assert found is not None
    assert found.subject == "ada"
