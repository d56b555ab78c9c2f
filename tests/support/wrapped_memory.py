"""A memory source that hands everything on: what tests derive their faults from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from membank.trainer.training import Acknowledged, Fetched, MemorySource
from membank.wire.spec import BankSpec, BlockRef


class WrappedMemory:
    """Does what `source` does.

    Parameters
    ----------
    source
        The source behind it.
    """

    def __init__(self, source: MemorySource) -> None:
        self.source = source

    @property
    def spec(self) -> BankSpec:
        # docstring inherited
        return self.source.spec

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        # docstring inherited
        return self.source.fetch(refs)

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
        return self.source.push(
            gradients,
            versions,
            step=step,
            learning_rate_scale=learning_rate_scale,
            first=first,
            then=then,
        )

    def flush(self) -> tuple[Acknowledged, ...]:
        # docstring inherited
        return self.source.flush()
