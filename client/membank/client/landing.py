"""Where the content of fetched blocks lands."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from membank.wire.buffers import BufferPool
from membank.wire.crc import as_uint8
from membank.wire.records import BlockHeader
from membank.wire.spec import Array, BlockRef


class Landing:
    """Places blocks in their caller's buffers, and where there is none in pooled memory.

    Parameters
    ----------
    pool
        Where other memory comes from.
    into
        The caller's buffers, writable and C-contiguous; None = none.
    """

    def __init__(self, pool: BufferPool, into: Mapping[BlockRef, Array] | None = None) -> None:
        self._pool = pool
        self._into = into or {}

    def place(self, header: BlockHeader) -> npt.NDArray[np.uint8]:
        """Return the memory for a block, (num_bytes,) uint8, writable."""
        buffer = self._into.get(header.ref)
        # An answer in another element type than was asked for is its receiver's to refuse.
        if buffer is None or buffer.nbytes != header.num_bytes:
            return self._pool.take(header.num_bytes)
        return as_uint8(buffer)
