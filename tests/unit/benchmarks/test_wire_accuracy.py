"""What training loses by compressed gradients, on a problem whose loss with exact ones is known."""

from __future__ import annotations

from functools import cache

import pytest

from benchmarks.wire_accuracy import OPTIMIZERS, trained
from membank.client import Compression

pytestmark = pytest.mark.slow


@cache
def exact(optimizer: str) -> float:
    return trained(optimizer, Compression(error_feedback=False))[0]


# The factors are those of docs/wire.md.
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
@pytest.mark.parametrize("error_feedback", [True, False])
def test_rounded_gradients_lose_nothing(optimizer: str, wire: str, error_feedback: bool) -> None:
    loss, share = trained(optimizer, Compression(wire=wire, error_feedback=error_feedback))
    assert loss <= 1.01 * exact(optimizer)
    assert share <= (0.266 if wire == "int8" else 0.5)


@pytest.mark.parametrize(
    ("optimizer", "share", "within", "beyond"),
    [
        ("sgd", 0.1, 1.01, 1.15),
        ("sgd", 0.01, 1.05, 1.7),
        ("momentum", 0.1, 1.01, 1.2),
        ("momentum", 0.01, 1.05, 2.0),
        ("adamw", 0.1, 1.6, 3.5),
        ("adamw", 0.01, 8.0, 14.0),
    ],
)
def test_gradients_in_part_need_error_feedback(
    optimizer: str, share: float, within: float, beyond: float
) -> None:
    kept, num_bytes = trained(optimizer, Compression(wire="sparse", share=share))
    lost, _ = trained(optimizer, Compression(wire="sparse", share=share, error_feedback=False))
    assert kept <= within * exact(optimizer)
    assert lost >= beyond * exact(optimizer)
    assert num_bytes <= 2.1 * share
