"""Where the content of fetched blocks lands."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from membank.client.memory import FetchedBlocks
from membank.wire.buffers import BufferPool
from membank.wire.codec import fetch_codec
from membank.wire.crc import as_uint8
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.records import Block, BlockHeader
from membank.wire.spec import DTYPES, Array, BankSpec, BlockRef


class Landing:
    """Places blocks in their caller's buffers, and where there is none in pooled memory.

    Parameters
    ----------
    pool
        Where other memory comes from.
    into
        The caller's buffers, writable and C-contiguous; None = none.
    """

    takes_parts = False
    """Whether blocks may come in parts."""

    def __init__(self, pool: BufferPool, into: Mapping[BlockRef, Array] | None = None) -> None:
        self._pool = pool
        self._into = into or {}

    def begin(self) -> None:
        """Hear that an answer begins: what came of an earlier attempt is void."""

    def when_arrived(self, header: BlockHeader, revision: int) -> Callable[[], None] | None:
        """Return what to call once the bytes of a header are there and checked; None = nothing."""
        return None

    def place(self, header: BlockHeader) -> npt.NDArray[np.uint8]:
        """Return the memory for the bytes of a block that travel, (num_bytes,) uint8, writable."""
        if header.dtype not in DTYPES:
            # The caller's buffer is for what is decoded from them.
            return self._pool.take(header.num_bytes)
        return self._memory(header.ref, header.num_bytes)

    def weight(self, header: BlockHeader, payload: npt.NDArray[np.uint8]) -> Array:
        """Return the weight that has arrived where `place` said; read-only."""
        take = partial(self._memory, header.ref)
        weight = fetch_codec(header.dtype).decode(payload, header.shape, take)
        # Fetches share unchanged blocks, and so does a cache: nobody may write into one.
        weight.flags.writeable = False
        return weight

    def blocks(
        self, arrived: Sequence[tuple[BlockHeader, npt.NDArray[np.uint8] | None]]
    ) -> tuple[Block, ...]:
        """Return the blocks of an answer that has come, from its headers and payloads in order."""
        return tuple(
            Block(header=header, weight=None if payload is None else self.weight(header, payload))
            for header, payload in arrived
        )

    def _memory(self, ref: BlockRef, num_bytes: int) -> npt.NDArray[np.uint8]:
        buffer = self._into.get(ref)
        # An answer in another element type than was asked for is its receiver's to refuse.
        if buffer is None or buffer.nbytes != num_bytes:
            return self._pool.take(num_bytes)
        return as_uint8(buffer)


class CallerBuffers:
    """The buffers that a caller gave for blocks: checked, and after the fetch filled.

    Parameters
    ----------
    spec
        Spec of the bank.
    into
        The buffers; those of other blocks are left alone.
    refs
        Blocks that are fetched.
    dtype
        Element type that they are asked for in, or the encoding.

    Raises
    ------
    InvalidArgumentError
        If a buffer has another shape (BAD_SHAPE) or element type (BAD_DTYPE) than its block, cannot
        be written to as one piece, or overlaps another one.
    """

    def __init__(
        self, spec: BankSpec, into: Mapping[BlockRef, Array], refs: Iterable[BlockRef], dtype: str
    ) -> None:
        given = {BlockRef(*ref): buffer for ref, buffer in into.items()}
        self.arrays = {ref: given[ref] for ref in refs if ref in given}
        """The buffer of each block that has one."""
        for ref, buffer in self.arrays.items():
            _check_fits(buffer, ref, spec.block_shape(ref.level), dtype)
        # By address.
        self._spans = sorted((*_span(buffer), ref) for ref, buffer in self.arrays.items())
        for (_, end, ref), (start, _, other) in pairwise(self._spans):
            if start < end:
                raise InvalidArgumentError(
                    f"the buffers of blocks {ref} and {other} overlap; give each its own memory",
                    metadata={"block": str(ref), "other": str(other)},
                )

    def fill(self, fetched: FetchedBlocks) -> FetchedBlocks:
        """Return the blocks with their weights in the buffers, read-only views of them.

        What did not land there is copied; buffers of blocks without weight stay as they are.
        """
        weights = {ref: weight for ref, weight in fetched.weights.items() if ref in self.arrays}
        # A weight may lie in the buffer of another block, whose turn could come first: slots that
        # take other blocks at every step.
        weights = {
            ref: weight.copy() if self._is_in_the_way(weight, ref) else weight
            for ref, weight in weights.items()
        }
        for ref, weight in weights.items():
            if _span(weight) != _span(self.arrays[ref]):
                np.copyto(self.arrays[ref], weight, casting="no")
        return FetchedBlocks(
            fetched.revision,
            (
                replace(block, weight=_read_only(self.arrays[ref])) if ref in weights else block
                for ref, block in fetched.items()
            ),
        )

    def _is_in_the_way(self, weight: Array, ref: BlockRef) -> bool:
        """Say whether `weight` lies in the buffer of a block other than `ref`."""
        start, end = _span(weight)
        first = max(0, bisect(self._spans, start, key=itemgetter(0)) - 1)
        for other_start, other_end, other in islice(self._spans, first, None):
            if other_start >= end:
                break
            if other != ref and other_end > start:
                return True
        return False


def _check_fits(buffer: Array, ref: BlockRef, shape: tuple[int, ...], dtype: str) -> None:
    what, metadata = f"the buffer of block {ref}", {"block": str(ref)}
    if buffer.shape != shape:
        raise InvalidArgumentError(
            f"{what} has shape {buffer.shape}; the block has {shape}",
            reason=Reason.BAD_SHAPE,
            metadata=metadata,
        )
    if buffer.dtype != fetch_codec(dtype).dtype:
        raise InvalidArgumentError(
            f"{what} is of {buffer.dtype}; blocks fetched as {dtype} are of "
            f"{fetch_codec(dtype).dtype}",
            reason=Reason.BAD_DTYPE,
            metadata=metadata,
        )
    if not (buffer.flags.c_contiguous and buffer.flags.writeable):
        raise InvalidArgumentError(
            f"{what} is read-only or not C-contiguous; give one to write to as one piece",
            metadata=metadata,
        )


def _span(array: Array) -> tuple[int, int]:
    start: int = array.__array_interface__["data"][0]
    return start, start + array.nbytes


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view
