"""Every metric against a value worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from membank.trainer.removal import metrics
from membank.wire.errors import InvalidArgumentError


def test_truth_ratio_is_the_geometric_mean_of_the_wrong_over_the_right() -> None:
    # p per token: right 1/2, wrong 1/4 and 1/16. Geometric mean of the wrong: 1/8. Ratio: 1/4.
    right, wrong = math.log(2), [math.log(4), math.log(16)]
    assert metrics.truth_ratio(right, wrong) == pytest.approx(0.25)


def test_truth_ratio_without_a_wrong_answer_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="at least one wrong answer"):
        metrics.truth_ratio(1.0, [])


def test_choice_probability_is_the_right_answers_part_of_all() -> None:
    # 1/2 over 1/2 + 1/4 + 1/4.
    assert metrics.choice_probability(math.log(2), [math.log(4), math.log(4)]) == pytest.approx(0.5)


def test_losses_beyond_what_a_float_holds_still_give_figures() -> None:
    """Gradient ascent has no floor, and an hour's study must not end at it."""
    assert metrics.truth_ratio(2000.0, [0.0]) > 1e200
    assert metrics.choice_probability(2000.0, [2000.0]) == pytest.approx(0.5)


def test_truth_scores_of_kept_and_of_forgotten_facts() -> None:
    # Kept: max(0, 1 - R) of 1/4 and 2 = 3/4 and 0. Forgotten: min(R, 1/R) = 1/4 and 1/2.
    assert metrics.known_truth([0.25, 2.0]) == pytest.approx(0.375)
    assert metrics.forgotten_truth([0.25, 2.0]) == pytest.approx(0.375)
    assert metrics.forgotten_truth([1.0, 1.0]) == 1.0
    assert metrics.known_truth([4.0]) == 0.0


def test_forget_quality_of_disjoint_samples_is_the_exact_p_value() -> None:
    # Two samples of 3 that do not overlap: D = 1. Of C(6, 3) = 20 orders 2 are as extreme.
    assert metrics.forget_quality([1, 2, 3], [4, 5, 6]) == pytest.approx(2 / 20)


def test_forget_quality_of_equal_samples_is_one() -> None:
    assert metrics.forget_quality([0.1, 0.7, 0.3], [0.3, 0.1, 0.7]) == pytest.approx(1.0)


def test_log_of_a_p_value_stays_finite() -> None:
    assert metrics.log10_p(0.001) == pytest.approx(-3)
    assert metrics.log10_p(0.0) == pytest.approx(-300)


def test_utility_is_the_harmonic_mean_and_one_zero_makes_it_zero() -> None:
    # 3 / (1/1 + 1/(1/2) + 1/(1/4)) = 3/7.
    assert metrics.model_utility([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert metrics.model_utility([1.0, 0.0]) == 0.0


@pytest.mark.parametrize(
    ("words", "reference", "recall"),
    [
        # Longest common subsequence "the a b" of the reference's four words.
        ("the x a b", "the a b c", 3 / 4),
        ("b a", "a b", 1 / 2),
        ("a a a", "a", 1.0),
        ("", "a b", 0.0),
        ("a", "", 0.0),
    ],
)
def test_rouge_l_recall(words: str, reference: str, recall: float) -> None:
    assert metrics.rouge_l_recall(words.split(), reference.split()) == pytest.approx(recall)


@pytest.mark.parametrize(
    ("hits", "strength"),
    [
        ([True, True, True, True], 1.0),
        # Everything from token 2 on: 1 - 2/4.
        ([True, False, True, True], 0.5),
        # Only the last: 1 - 3/4.
        ([False, True, False, True], 0.25),
        # Nothing: the loop of OpenUnlearning ends at k = T - 1, so 1/T and not 0.
        ([True, True, True, False], 0.25),
        ([False], 1.0),
    ],
)
def test_extraction_strength(hits: list[bool], strength: float) -> None:
    assert metrics.extraction_strength(hits) == pytest.approx(strength)


def test_exact_memorization_is_the_share_of_hits() -> None:
    assert metrics.exact_memorization([True, False, False, True, True]) == pytest.approx(3 / 5)


@pytest.mark.parametrize("metric", [metrics.exact_memorization, metrics.extraction_strength])
def test_no_token_is_refused(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(InvalidArgumentError, match="one or more tokens"):
        metric([])


def test_min_k_takes_the_least_likely_tokens() -> None:
    # 40 % of 5 tokens are 2: -4 and -3. Minus their mean is 3.5.
    assert metrics.min_k_score([-1.0, -4.0, -2.0, -3.0, -0.5]) == pytest.approx(3.5)
    # Of one token, 40 % are still one.
    assert metrics.min_k_score([-2.0]) == pytest.approx(2.0)
    with pytest.raises(InvalidArgumentError, match="at least one token"):
        metrics.min_k_score([])


def test_membership_auc_counts_pairs() -> None:
    # Members score lower. Of the pairs (1|2), (1|4), (3|2), (3|4) three are in order.
    assert metrics.membership_auc([1.0, 3.0], [2.0, 4.0]) == pytest.approx(3 / 4)
    assert metrics.membership_auc([0.0, 0.0], [1.0]) == 1.0
    assert metrics.membership_auc([1.0], [1.0]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("auc", "retrained", "leak"),
    [
        (0.5, 0.5, 0.0),
        # Always told apart: (0 - 0.5) / 0.5.
        (1.0, 0.5, -100.0),
        # Turned round: (1 - 0.5) / 0.5.
        (0.0, 0.5, 100.0),
        (0.7, 0.6, -25.0),
    ],
)
def test_priv_leak(auc: float, retrained: float, leak: float) -> None:
    assert metrics.priv_leak(auc, retrained) == pytest.approx(leak)


def test_ratios_may_be_arrays() -> None:
    ratios = np.array([0.5, 0.25])
    assert metrics.known_truth(ratios) == pytest.approx(0.625)
