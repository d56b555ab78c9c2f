"""How documents are deleted from a bank."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import StrEnum

from membank.trainer.training.schedule import check_range


class Scope(StrEnum):
    """Which blocks are trained anew beside those that lose documents."""

    PATHS = "paths"
    """None: the shared leaves of the documents and the blocks above their leaves are trained anew,
    every other block keeps its bits. Blocks beside them were trained together with what goes."""
    TOPICS = "topics"
    """Every block under the level-1 topics of the documents: as if stage 2 had never seen them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeletionConfig:
    """How documents are deleted; learning rates, optimizer and schedule are those of stage 2."""

    threshold: float = 0.5
    """Share of a leaf's trained tokens that the documents must have for the leaf to be deleted as a
    whole, in (0, 1]. A leaf of which nothing else is left is deleted in any case."""
    scope: Scope = Scope.PATHS
    """Which blocks are trained anew."""
    checkpoint_every_steps: int = 100
    """Training steps between two states that a job goes on from, at least 1."""
    num_threads: int = field(default_factory=lambda: max(1, os.cpu_count() or 1))
    """Threads that train, at least 1; another number may give other last bits."""

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 1e-9, 1, open_high=False)
        for name in ("checkpoint_every_steps", "num_threads"):
            check_range(name, getattr(self, name), 1, float("inf"), open_high=True)
