"""Which gradients a block accepts, and what they make of it."""

from __future__ import annotations

from membank.bank_service.shard.content import Content, content_crcs
from membank.bank_service.shard.optimizer import BlockOptimizer
from membank.wire.errors import Reason
from membank.wire.format import NO_SLOT, Entry
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState


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
        """Return the block after one gradient, in fresh arrays.

        Parameters
        ----------
        ref
            The block.
        before
            Its entry.
        content
            Its content, with optimizer state.
        values
            (L, P, R, D), the gradient.
        scale
            Multiplies the learning rate of the block's level.

        Returns
        -------
        tuple[Entry, Content] or None
            None where the result would hold a number that is not finite.
        """
        arrays = self._optimizer.apply(ref.level, content.arrays, before.step, values, scale)
        if arrays is None:
            return None
        crcs = content_crcs(self._spec, arrays)
        entry = Entry(
            slot=NO_SLOT,
            version=before.version + 1,
            step=before.step + 1,
            updates=before.updates + 1,
            crcs=crcs,
        )
        return entry, Content(arrays, crcs[0])
