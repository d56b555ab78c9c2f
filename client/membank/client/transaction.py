"""Swaps collected into one transaction."""

from __future__ import annotations

from membank.wire.errors import InvalidArgumentError
from membank.wire.records import TransactionReport
from membank.wire.spec import Array, BlockRef


class Transaction:
    """Collects swaps, to be sent as one: all blocks change at one revision, or none does."""

    def __init__(self) -> None:
        self.weights: dict[BlockRef, Array] = {}
        self.expected: dict[BlockRef, int] = {}
        self.report: TransactionReport | None = None
        """What was done; None until the context has ended without an error."""

    def swap(self, ref: BlockRef, weight: Array, *, expected_version: int | None = None) -> None:
        """Replace the content of a block when the transaction ends.

        Parameters
        ----------
        ref
            The block.
        weight
            (L, P, R, D) float32, bfloat16 or float16; must not change until the end.
        expected_version
            Version that the block must have then; None = any.

        Raises
        ------
        InvalidArgumentError
            If the block is in the transaction already.
        """
        if ref in self.weights:
            raise InvalidArgumentError(
                f"block {ref} is in this transaction already; swap it once",
                metadata={"block": str(ref)},
            )
        self.weights[ref] = weight
        if expected_version is not None:
            self.expected[ref] = expected_version
