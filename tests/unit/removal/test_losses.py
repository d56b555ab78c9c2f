"""The losses of unlearning against values worked out by hand, and what their steps do."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from membank.trainer.model import Anchor, AnchorConfig
from membank.trainer.removal.baselines import (
    document_log_probs,
    negative_log_likelihood,
    npo_loss,
    unlearn,
)
from membank.trainer.removal.config import METHODS, RelearningConfig, UnlearningConfig
from membank.trainer.removal.relearning import relearn
from membank.trainer.removal.training import widened
from membank.wire.errors import InvalidArgumentError

FORGET = [[1, 2, 3, 4], [1, 2, 5]]
RETAIN = [[6, 7, 8], [6, 7, 9, 10]]
VOCABULARY = 16


def make_model() -> Anchor:
    torch.manual_seed(0)
    return Anchor(
        AnchorConfig(
            num_layers=2, width=16, num_heads=2, head_dim=8, ffn_width=24, vocab_size=VOCABULARY
        )
    )


def loss_of(model: Anchor, documents: list[list[int]]) -> float:
    with torch.no_grad():
        return float(negative_log_likelihood(*document_log_probs(model, documents)))


@cache
def taught_model() -> Anchor:
    """Return a model that knows both sets by heart."""
    model = make_model()
    config = RelearningConfig(steps=(0, 60), learning_rate=1e-2)
    states: list[dict[str, torch.Tensor]] = relearn(
        model,
        FORGET + RETAIN,
        config,
        seed=0,
        measure=lambda trained: {n: w.detach().clone() for n, w in trained.state_dict().items()},
    )
    model.load_state_dict(states[-1])
    return model


def test_a_uniform_model_gives_every_token_the_same() -> None:
    model = make_model()
    with torch.no_grad():
        model.embedding.weight.zero_()  # tied head: all logits 0
    log_probs_B, counts_B = document_log_probs(model, FORGET)
    # 3 and 2 tokens after the first of each document, log(1/16) each.
    assert counts_B.tolist() == [3, 2]
    expected = [-3 * math.log(VOCABULARY), -2 * math.log(VOCABULARY)]
    assert log_probs_B.tolist() == pytest.approx(expected, rel=1e-5)
    assert float(negative_log_likelihood(log_probs_B, counts_B).detach()) == pytest.approx(
        math.log(VOCABULARY), rel=1e-5
    )


def test_padding_changes_nothing() -> None:
    model = make_model()
    with torch.no_grad():
        together, _ = document_log_probs(model, FORGET)
        alone, _ = document_log_probs(model, FORGET[1:])
    assert float(together[1]) == pytest.approx(float(alone[0]), abs=1e-5)


def test_npo_is_two_log_two_over_beta_where_nothing_moved() -> None:
    # -(2/beta) log sigma(0) = (2/beta) log 2.
    same = torch.tensor([-3.0, -5.0])
    assert float(npo_loss(same, same, beta=0.1)) == pytest.approx(20 * math.log(2), rel=1e-5)


def test_npo_of_one_document_by_hand() -> None:
    # log(p/p_ref) = -10, beta = 0.1: -(20) log sigma(1) = 20 log(1 + e^-1).
    loss = npo_loss(torch.tensor([-12.0]), torch.tensor([-2.0]), beta=0.1)
    assert float(loss) == pytest.approx(20 * math.log(1 + math.exp(-1)), rel=1e-5)


def test_npo_with_a_tiny_beta_has_the_gradient_of_ascent() -> None:
    log_probs_B = torch.tensor([-3.0, -5.0], requires_grad=True)
    npo_loss(log_probs_B, torch.tensor([-2.0, -2.0]), beta=1e-4).backward()
    # Ascent of the mean over 2 documents: 1/2 each.
    assert log_probs_B.grad is not None
    assert log_probs_B.grad.tolist() == pytest.approx([0.5, 0.5], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_unlearning_raises_the_loss_of_what_is_forgotten(method: str) -> None:
    model, seen = taught_model(), []
    before_forget, before_retain = loss_of(model, FORGET), loss_of(model, RETAIN)
    config = UnlearningConfig(epochs=6, shown_epochs=(6,), learning_rate=3e-3)
    unlearn(
        model, method, FORGET, RETAIN, config, seed=0,
        after_epoch=lambda epoch, it: seen.append((epoch, loss_of(it, FORGET), loss_of(it, RETAIN))),
    )  # fmt: skip
    assert [epoch for epoch, _, _ in seen] == list(range(1, 7))
    assert seen[-1][1] > before_forget + 1.0
    # The model that was given is left alone.
    assert loss_of(model, FORGET) == before_forget
    if method != "gradient ascent":
        assert seen[-1][2] < before_retain + 0.5


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="unknown method"):
        unlearn(
            make_model(), "magic", FORGET, RETAIN, UnlearningConfig(), seed=0,
            after_epoch=lambda epoch, model: None,
        )  # fmt: skip


def test_relearning_measures_at_its_steps_and_leaves_the_model_alone() -> None:
    model = make_model()
    before = loss_of(model, FORGET)
    config = RelearningConfig(steps=(0, 2, 40), learning_rate=1e-2)
    losses: list[float] = relearn(
        model, FORGET, config, seed=0, measure=lambda trained: loss_of(trained, FORGET)
    )
    assert losses[0] == before
    assert losses[2] < losses[1] < losses[0]
    assert loss_of(model, FORGET) == before


def test_a_widened_anchor_computes_the_same_at_first() -> None:
    model = make_model()
    wider = widened(model, 5)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        assert torch.allclose(model(tokens), wider(tokens), atol=1e-6)
    assert wider.config.ffn_width == 29
    # Per layer three matrices of 5 x 16 more.
    assert wider.config.num_params - model.config.num_params == 2 * 3 * 5 * 16
