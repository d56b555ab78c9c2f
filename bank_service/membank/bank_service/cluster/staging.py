"""Operations with content, carried to a shard's process in pieces.

Ray keeps what travels in shared memory of a fixed, small size, and an array that arrives is a view
of it. So content is cut into pieces, and copied out of that memory as soon as it is there: a view
that is kept would hold its piece for ever.

That holds for element types that numpy has itself. An array of bfloat16 is put into the pickle and
copied out of it, under the interpreter's lock: a shard answered nobody for 1 ms per 1.3 MB of a swap.
So it travels as unsigned integers of the same bits, which no block is made of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from membank.bank_service.shard.content import kept
from membank.bank_service.shard.contract import (
    BlockContent,
    BlockOperation,
    Combine,
    SetContent,
)
from membank.wire.errors import UnavailableError
from membank.wire.spec import Array, dtype_of

T = TypeVar("T")

PIECE_BYTES = 16 << 20
"""Content per piece; a block is never cut."""


def batches(
    items: Sequence[T], size: Callable[[T], int], *, max_bytes: int = PIECE_BYTES
) -> list[tuple[T, ...]]:
    """Split `items`, in order, into batches of at most `max_bytes`, or of one item.

    Parameters
    ----------
    items
        What to split.
    size
        Bytes of an item.
    max_bytes
        Most bytes of a batch that has several items.

    Returns
    -------
    list[tuple[T, ...]]
        The batches; none is empty.
    """
    found: list[list[T]] = []
    filled = 0
    for item in items:
        num_bytes = size(item)
        if not found or (filled and filled + num_bytes > max_bytes):
            found.append([])
            filled = 0
        found[-1].append(item)
        filled += num_bytes
    return [tuple(batch) for batch in found]


def operation_bytes(operation: BlockOperation) -> int:
    """Return the bytes of content that `operation` carries."""
    match operation:
        case SetContent(weight=weight, optimizer_state=state):
            return weight.nbytes + sum(array.nbytes for array in state.values())
        case Combine(other=other) if other is not None:
            return other.nbytes
        case _:
            return 0


def carried_operation(operation: BlockOperation) -> BlockOperation:
    """Return `operation` as it travels; `own_operation` turns it back."""
    match operation:
        case SetContent(weight=weight):
            return dataclasses.replace(operation, weight=_as_bits(weight))
        case Combine(other=other) if other is not None:
            return dataclasses.replace(operation, other=_as_bits(other))
        case _:
            return operation


def own_operation(operation: BlockOperation) -> BlockOperation:
    """Return an operation that arrived with arrays of its own, which the shard may keep."""
    match operation:
        case SetContent(weight=weight, optimizer_state=state):
            return dataclasses.replace(
                operation,
                weight=kept(_of_bits(weight)),
                optimizer_state={role: kept(array) for role, array in state.items()},
                is_given=True,
            )
        case Combine(other=other) if other is not None:
            return dataclasses.replace(operation, other=np.array(_of_bits(other)))
        case _:
            return operation


def carried_content(content: BlockContent) -> BlockContent:
    """Return `content` as it travels; `own_content` turns it back."""
    return dataclasses.replace(content, weight=_as_bits(content.weight))


def own_content(content: BlockContent) -> BlockContent:
    """Return content that arrived with arrays of its own, read-only."""
    owned = dataclasses.replace(
        content,
        weight=np.array(_of_bits(content.weight)),
        optimizer_state={role: np.array(a) for role, a in content.optimizer_state.items()},
    )
    for array in (owned.weight, *owned.optimizer_state.values()):
        array.flags.writeable = False
    return owned


class StagedOperations:
    """Pieces that have arrived, by the attempt they belong to. One attempt at a time counts."""

    def __init__(self) -> None:
        self._attempt = ""
        self._pieces: list[BlockOperation] = []

    def add(self, attempt: str, operations: Sequence[BlockOperation]) -> None:
        """Keep a piece; those of another attempt are dropped."""
        if attempt != self._attempt:
            self.clear()
            self._attempt = attempt
        self._pieces.extend(own_operation(operation) for operation in operations)

    def take(
        self, attempt: str, last: Sequence[BlockOperation], *, num_operations: int
    ) -> list[BlockOperation]:
        """Return all operations of an attempt, the last piece among them.

        Raises
        ------
        UnavailableError
            If a piece is missing: the shard was started again since it came.
        """
        self.add(attempt, last)
        operations = self._pieces
        self._attempt, self._pieces = "", []
        if len(operations) != num_operations:
            raise UnavailableError(
                f"{len(operations)} of {num_operations} operations are here: the shard was started "
                "again while they came; repeat the transaction"
            )
        return operations

    def clear(self) -> None:
        """Drop what is kept."""
        self._attempt, self._pieces = "", []


_BFLOAT16 = dtype_of("bfloat16")
_BITS = np.dtype(np.uint16)


def _as_bits(array: Array) -> Array:
    return array.view(_BITS) if array.dtype == _BFLOAT16 else array


def _of_bits(array: Array) -> Array:
    return array.view(_BFLOAT16) if array.dtype == _BITS else array
