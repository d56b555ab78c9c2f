"""Where the memories of a training loop live: one seam, whatever is behind it.

Shapes: L layers, P parts (gate, up, down), R block width, D model width. A block is (L, P, R, D).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from membank.wire.records import UpdateResult
from membank.wire.spec import BankSpec, BlockRef, BlockState


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """Blocks as they were at the time of a fetch."""

    weights: Mapping[BlockRef, Tensor]
    """(L, P, R, D) float32 on the CPU for each block that may be used. To be read only; later
    updates do not show in it."""
    versions: Mapping[BlockRef, int]
    """Version of every requested block, absent ones included."""
    absent: Mapping[BlockRef, BlockState]
    """Requested blocks that are withheld or deleted; they have no weights and end the path."""

    @classmethod
    def merge(cls, parts: Sequence[Fetched]) -> Fetched:
        """Return the blocks of several fetches together; the last of equal ones wins."""
        weights: dict[BlockRef, Tensor] = {}
        versions: dict[BlockRef, int] = {}
        absent: dict[BlockRef, BlockState] = {}
        for part in parts:
            weights.update(part.weights)
            versions.update(part.versions)
            absent.update(part.absent)
        return cls(weights=weights, versions=versions, absent=absent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Acknowledged:
    """A push whose fate is known."""

    step: int
    """Training step that was given with it."""
    results: tuple[UpdateResult, ...]
    """What became of each gradient; a refused one changed nothing."""


class MemorySource(Protocol):
    """Gives the blocks of a batch and takes their gradients.

    The optimizer is behind the seam, beside the blocks: a loop sees weights and hands back
    gradients, never moments.
    """

    @property
    def spec(self) -> BankSpec:
        """What the bank is."""
        ...

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        """Return blocks with their versions.

        Parameters
        ----------
        refs
            Blocks of the bank, none twice.

        Returns
        -------
        Fetched
            It holds every own push that was made before this call.

        Raises
        ------
        MembankError
            A block does not exist, or the bank cannot answer.
        """
        ...

    def push(
        self,
        gradients: Mapping[BlockRef, Tensor],
        versions: Mapping[BlockRef, int],
        *,
        step: int,
        learning_rate_scale: float = 1.0,
        first: Sequence[BlockRef] = (),
        then: Callable[[], None] | None = None,
    ) -> tuple[Acknowledged, ...]:
        """Hand over the gradients of one step; each block takes one optimizer step.

        Parameters
        ----------
        gradients
            (L, P, R, D) floating point, CPU, for each block that the batch used. Not to be
            changed afterwards: they may be sent later.
        versions
            Version that each gradient was computed on, as fetched.
        step
            Number of the training step; recorded, and the identity of the push after a restart.
        learning_rate_scale
            Factor of the schedule on the learning rate of every level, >= 0.
        first
            Blocks that somebody waits for. A source may send them before the others; which they are
            must be the same when a step is done again after a restart.
        then
            Called once, as soon as the gradients of `first` are acknowledged, and from the calling
            thread; not where that fails. A fetch from within sees them.

        Returns
        -------
        tuple of Acknowledged
            The pushes whose fate became known: this one, or an earlier one where pushing is
            asynchronous.

        Raises
        ------
        MembankError
            This push, or an earlier asynchronous one, could not be delivered.
        """
        ...

    def flush(self) -> tuple[Acknowledged, ...]:
        """Wait for the pushes that are under way and return them."""
        ...
