"""A bank of which some blocks are trained anew here while all others stay as they were fetched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor

from membank.trainer.training import Acknowledged, Fetched, InProcessMemory
from membank.wire.spec import BankSpec, BlockRef


class StagedMemory:
    """Hands on fetches and pushes of the blocks that are trained; the others are fixed.

    Parameters
    ----------
    trained
        Where the trained blocks are; they begin as the bank's seed says.
    refs
        The blocks that are trained.
    fixed
        Every other block that a batch may use. One that is absent ends its path.

    Notes
    -----
    Gradients of fixed blocks are dropped: they come to be because a batch is joined as a whole.
    """

    def __init__(
        self, trained: InProcessMemory, refs: Collection[BlockRef], fixed: Fetched
    ) -> None:
        self._trained = trained
        self._refs = frozenset(refs)
        self._fixed = fixed

    @property
    def spec(self) -> BankSpec:
        # docstring inherited
        return self._trained.spec

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        # docstring inherited
        own = self._trained.fetch([ref for ref in refs if ref in self._refs])
        others = [ref for ref in refs if ref not in self._refs]
        absent = self._fixed.absent
        fixed = Fetched(
            weights={r: self._fixed.weights[r] for r in others if r not in absent},
            versions={r: self._fixed.versions[r] for r in others},
            absent={r: absent[r] for r in others if r in absent},
        )
        return Fetched.merge([fixed, own])

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
        # docstring inherited
        return self._trained.push(
            {ref: gradient for ref, gradient in gradients.items() if ref in self._refs},
            versions,
            step=step,
            learning_rate_scale=learning_rate_scale,
            first=first,
            then=then,
        )

    def flush(self) -> tuple[Acknowledged, ...]:
        # docstring inherited
        return self._trained.flush()
