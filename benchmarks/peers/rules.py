"""The optimizers that pushes run, and what one step of each must have made of a block.

Peers have no optimizer of their own. They run torch's fused Adagrad where their server can call a
function, else in the client. A bank runs AdamW, which touches one array more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.peers.blocks import Array

if TYPE_CHECKING:
    import torch

LEARNING_RATE = 1e-3
ADAGRAD_EPS = 1e-10
ADAMW_EPS = 1e-8
ADAMW_BETAS = (0.9, 0.95)


class Adagrad:
    """Adagrad on blocks that are kept in this process, as a parameter server has it."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def step(self, key: str, weight: torch.Tensor, gradient: torch.Tensor) -> None:
        """Update `weight` in place; both are flat float32 of one length."""
        import torch

        if key not in self._sums:
            self._sums[key] = torch.zeros_like(weight)
        adagrad_step(weight, gradient, self._sums[key])


def adagrad_step(weight: torch.Tensor, gradient: torch.Tensor, sums: torch.Tensor) -> None:
    """Update `weight` and `sums` in place by torch's fused kernel."""
    import torch
    from torch.optim.adagrad import adagrad

    with torch.no_grad():
        adagrad(
            [weight], [gradient], [sums], [torch.tensor(0.0)],
            fused=True, lr=LEARNING_RATE, weight_decay=0.0, lr_decay=0.0, eps=ADAGRAD_EPS,
            maximize=False,
        )  # fmt: skip


def adamw_step(
    weight: torch.Tensor, gradient: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Update `weight` and `state`, the two moments, in place by torch's fused kernel."""
    import torch
    from torch.optim.adamw import adamw

    with torch.no_grad():
        adamw(
            [weight], [gradient], [state[0]], [state[1]], [], [torch.tensor(0.0)],
            fused=True, amsgrad=False, beta1=ADAMW_BETAS[0], beta2=ADAMW_BETAS[1],
            lr=LEARNING_RATE, weight_decay=0.0, eps=ADAMW_EPS, maximize=False,
        )  # fmt: skip


EPS = {"adagrad": ADAGRAD_EPS, "adamw": ADAMW_EPS}
"""What each rule, by its name, adds to the denominator."""


def after_first_step(rule: str, weight: Array, gradient: Array) -> Array:
    """Return what the first step of `rule` makes of `weight`, by plain arithmetic.

    It is the same for both: what is kept of gradients is then the square of the only one.
    """
    step = LEARNING_RATE * gradient / (np.abs(gradient) + EPS[rule])
    return (weight - step).astype(np.float32)
