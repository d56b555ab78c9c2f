"""Where the contents of blocks lie in memory: pooled, and in sight of peers on this machine.

One pool for the process, as malloc is: contents that are read, computed and received are of a few
sizes only, and one that is dropped makes room for the next of its size.
"""

from __future__ import annotations

import os
import sys
from functools import cache

import numpy as np
import numpy.typing as npt

from membank.wire.shared_memory import SharedMemory

MIN_POOLED_BYTES = 64 << 10
"""Bytes from which on memory is pooled. A smaller piece costs more to account for than to copy."""

_MIN_SPARE_BYTES = 256 << 20
"""Memory that is kept though no block is in it. A consolidation holds the versions that it writes while
pushes make new ones, and lets go of them all at once: of a few blocks of 4 M parameters, 48 MB each with
AdamW's state. Given back then, it would have to be found anew at the next one, for 1 to 2 ms per MB."""

_BYTES_HEAD = sys.getsizeof(b"")
"""What a small slot that was read takes beyond its bytes. Contents of one size must take the same
memory however they came, or the holes that dropped ones leave are not filled again."""


def new_memory(num_bytes: int) -> npt.NDArray[np.uint8]:
    """Return `num_bytes` bytes of any content; taken back when nobody refers to them any more."""
    if num_bytes < MIN_POOLED_BYTES:
        return np.empty(num_bytes + _BYTES_HEAD, np.uint8)[:num_bytes]
    return block_memory().take(num_bytes)


@cache
def block_memory() -> SharedMemory:
    """Return the pool of this process."""
    return SharedMemory(min_spare_bytes=_MIN_SPARE_BYTES)


# A child shares the pages of its parent's pool, and would write into contents of the parent's.
os.register_at_fork(after_in_child=block_memory.cache_clear)
