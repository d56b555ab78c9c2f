"""When a completion counts as the answer."""

from __future__ import annotations

import pytest

from membank.trainer.evaluation import first_integer, normalised_words, states


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (" 72. It is a metal", "72", True),
        ("72", "72", True),
        (" about 72 or so", "72", True),
        (" 072", "72", True),
        (" 720", "72", False),
        (" 7", "72", False),
        (" 7 2", "72", False),
        (" 71, not 72", "72", False),
        (" seventy-two", "72", False),
        ("", "72", False),
        (" 1,234 people", "1234", True),
        (" Paris, the capital", "Paris", True),
        (" paris", "Paris", True),
        (" Parisian", "Paris", False),
        (" the city of Paris", "Paris", False),
        (" Bogota", "Bogotá", True),
        (" Sao Tome.", "São Tomé", True),
        (" São", "São Tomé", False),
        (" Washington DC", "Washington, D.C.", False),
        (" Washington, D. C. and", "Washington, D.C.", True),
        (" .fr", ".fr", True),
        (" fr", ".fr", True),
        ("anything", "...", False),
        ("", "Paris", False),
    ],
)
def test_a_completion_states_the_answer(completion: str, answer: str, right: bool) -> None:
    assert states(completion, answer) is right


def test_the_first_integer_is_read_whole() -> None:
    assert first_integer("in 1,234,567 of 8") == 1_234_567
    assert first_integer("12,34") == 12
    assert first_integer("none") is None


def test_words_are_bare() -> None:
    assert normalised_words("  Port-au-Prince (Haïti)_2 ") == ["port", "au", "prince", "haiti", "2"]
