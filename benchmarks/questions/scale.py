"""How much is measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much is measured."""

    max_calls: int
    """Calls at most of one kind and size."""
    min_calls: int
    """Calls at least, however long they take."""
    budget_s: float
    """Seconds after which no further call is made, once there are enough."""
    num_rounds: int
    """Rounds in which several ways are measured in turn."""
    num_steps: tuple[int, int]
    """Training steps of one run, of the demo's model and of the ten times larger one."""
    num_layers: int
    """Layers of the model for late placement; 35 is the paper's."""
    num_prompts: int
    """Prompts per way of late placement."""
    batch_sizes: tuple[int, ...]
    """Requests of a batch."""
    max_windows: int
    """Requests of a trace at most."""


FULL = Scale(
    max_calls=200,
    min_calls=20,
    budget_s=1.2,
    num_rounds=8,
    num_steps=(30, 5),
    num_layers=35,
    num_prompts=7,
    batch_sizes=(1, 2, 4, 8, 16, 32, 64),
    max_windows=20_000,
)
"""What results are made with."""
QUICK = Scale(
    max_calls=5,
    min_calls=2,
    budget_s=0.1,
    num_rounds=2,
    num_steps=(3, 2),
    num_layers=7,
    num_prompts=2,
    batch_sizes=(1, 4),
    max_windows=800,
)
"""Tiny, to show that it works; no claim follows from it."""
