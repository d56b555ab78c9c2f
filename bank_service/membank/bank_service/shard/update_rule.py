"""Which gradients a block accepts, and what they make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from membank.bank_service.shard.content import Content
from membank.bank_service.shard.cores import compute
from membank.bank_service.shard.optimizer import BlockOptimizer, BlockStep
from membank.wire.errors import Reason
from membank.wire.format import NO_SLOT, Entry
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState

_ALONE_ELEMENTS = 1 << 18
"""Elements that one thread updates before another one would have begun to help."""
_SHARED_ELEMENTS = 1 << 16
"""Elements of the largest block from which on cores share: on smaller ones, threads spend more in
waiting for the interpreter's lock, which each call takes anew, than they gain."""


@dataclass(frozen=True, slots=True)
class Step:
    """A gradient, and the block that it is for."""

    ref: BlockRef
    """The block."""
    before: Entry
    """Its entry."""
    content: Content
    """Its content, with optimizer state."""
    values: Array
    """(L, P, R, D), the gradient."""
    scale: float
    """Multiplies the learning rate of the block's level."""


class UpdateRule:
    """The update rule of a bank: a pure function of block, gradient and learning rate.

    Parameters
    ----------
    spec
        Spec of the bank.
    """

    def __init__(self, spec: BankSpec) -> None:
        self._spec = spec
        self._optimizer = BlockOptimizer(spec)

    def refusal(self, entry: Entry, base_version: int) -> Reason | None:
        """Return why a block refuses a gradient computed on `base_version`; None = it does not."""
        if entry.state is BlockState.WITHHELD:
            return Reason.BLOCK_WITHHELD
        if entry.state is BlockState.DELETED:
            return Reason.BLOCK_DELETED
        if base_version > entry.version:
            return Reason.VERSION_MISMATCH
        # A base from before the last administrative change belongs to other content: applying
        # it could carry a deleted topic into the one imported in its place.
        if entry.version - base_version > min(self._spec.max_staleness, entry.updates):
            return Reason.STALE_VERSION
        return None

    def apply(
        self, ref: BlockRef, before: Entry, content: Content, values: Array, scale: float
    ) -> tuple[Entry, Content] | None:
        """Return one block after one gradient; see `Step` and `apply_all`."""
        return self.apply_all([Step(ref, before, content, values, scale)])[0]

    def apply_all(self, steps: Sequence[Step]) -> list[tuple[Entry, Content] | None]:
        """Return blocks after one gradient each, in fresh arrays; several cores take part.

        Parameters
        ----------
        steps
            Blocks and gradients; no block twice.

        Returns
        -------
        list[tuple[Entry, Content] or None]
            In the order of `steps`; None where the result would hold a number that is not finite.
        """
        begun = [
            self._optimizer.begin(
                step.ref.level, step.content.arrays, step.before.step, step.values, step.scale
            )
            for step in steps
        ]
        tiles = [(block, tile) for block in begun for tile in range(block.num_tiles)]
        sizes = [step.values.size for step in steps]
        if sum(sizes) > _ALONE_ELEMENTS and max(sizes) >= _SHARED_ELEMENTS:
            compute(lambda item: item[0].run(item[1]), tiles)
        else:
            for block, tile in tiles:
                block.run(tile)
        return [_after(step.before, block) for step, block in zip(steps, begun, strict=True)]


def _after(before: Entry, block: BlockStep) -> tuple[Entry, Content] | None:
    if not block.is_finite:
        return None
    crcs = block.crcs()
    entry = Entry(
        slot=NO_SLOT,
        version=before.version + 1,
        step=before.step + 1,
        updates=before.updates + 1,
        crcs=crcs,
    )
    return entry, Content(block.arrays, crcs[0])
