"""The anchor: parameter counts, causality, document masks and the loss."""

from __future__ import annotations

import math

import pytest
import torch

from membank.trainer.model import RECIPES, Anchor, AnchorConfig, next_token_loss

TINY = AnchorConfig(num_layers=2, width=16, num_heads=2, head_dim=6, ffn_width=24, vocab_size=40)


def _tiny() -> Anchor:
    torch.manual_seed(0)
    return Anchor(TINY).requires_grad_(False)


@pytest.mark.parametrize(
    ("recipe", "num_params"),
    [
        ("paper_160m", 163_510_016),
        ("paper_410m", 411_665_408),
        ("paper_1_4b", 1_439_893_504),
    ],
)
def test_paper_anchors_have_the_papers_parameter_counts(recipe: str, num_params: int) -> None:
    config = RECIPES[recipe]().anchor
    assert isinstance(config, AnchorConfig)
    with torch.device("meta"):
        anchor = Anchor(config)
    assert sum(p.numel() for p in anchor.parameters()) == num_params
    assert config.num_params == num_params


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, tokens = _tiny(), torch.arange(24).view(2, 12)
    changed = tokens.clone()
    changed[:, 8:] = 39
    torch.testing.assert_close(model(tokens)[:, :8], model(changed)[:, :8])
    assert not torch.allclose(model(tokens)[:, 8:], model(changed)[:, 8:])


def test_packed_documents_do_not_see_each_other() -> None:
    model, tokens = _tiny(), torch.arange(12)[None]
    segments = torch.tensor([[0] * 5 + [1] * 7])
    packed = model(tokens, segments)
    torch.testing.assert_close(packed[:, :5], model(tokens[:, :5]))
    torch.testing.assert_close(packed[:, 5:], model(tokens[:, 5:]))


def test_one_segment_equals_no_segments() -> None:
    model, tokens = _tiny(), torch.arange(24).view(2, 12)
    torch.testing.assert_close(model(tokens, torch.zeros_like(tokens)), model(tokens))


def test_loss_starts_near_that_of_a_uniform_guess() -> None:
    model, tokens = _tiny(), torch.arange(24).view(2, 12)
    loss, num_scored = next_token_loss(model(tokens), tokens)
    assert num_scored == 22
    assert float(loss) == pytest.approx(math.log(TINY.vocab_size), abs=0.1)


def test_loss_leaves_out_padding_and_first_tokens_of_documents() -> None:
    logits, tokens = torch.randn(1, 6, 40), torch.tensor([[1, 2, 3, 4, 5, 6]])
    segments = torch.tensor([[0, 0, 1, 1, -1, -1]])
    loss, num_scored = next_token_loss(logits, tokens, segments)
    log_probs = logits.log_softmax(-1)
    assert num_scored == 2
    torch.testing.assert_close(loss, -(log_probs[0, 0, 2] + log_probs[0, 2, 4]) / 2)


def test_loss_of_nothing_is_zero() -> None:
    loss, num_scored = next_token_loss(
        torch.randn(1, 3, 40), torch.zeros(1, 3, dtype=torch.int64), torch.full((1, 3), -1)
    )
    assert (float(loss), num_scored) == (0.0, 0)


@pytest.mark.parametrize("bad", [{"num_layers": 0}, {"head_dim": 7}, {"rope_base": 0.0}])
def test_bad_sizes_are_refused_by_name(bad: dict[str, float]) -> None:
    sizes = {
        "num_layers": 2,
        "width": 16,
        "num_heads": 2,
        "head_dim": 6,
        "ffn_width": 24,
        "vocab_size": 40,
    }
    with pytest.raises(ValueError, match=next(iter(bad))):
        AnchorConfig(**(sizes | bad))  # type: ignore[arg-type]
