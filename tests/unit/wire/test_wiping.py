"""Pools that are wiped: what was given back is zeros at once, and what is in use as it comes back."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from membank.wire.buffers import MIN_POOLED_BYTES, BufferPool
from membank.wire.shared_memory import SharedMemory
from membank.wire.wiping import _POOLS, wipe_pools

Pool = BufferPool | SharedMemory
SIZE = 2 * MIN_POOLED_BYTES
POOLS = [lambda: BufferPool(1 << 20), SharedMemory]
pools = pytest.mark.parametrize("make", POOLS, ids=["buffers", "shared memory"])


def filled(pool: Pool, value: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Return memory full of `value`, and its address."""
    memory = pool.take(SIZE)
    memory[:] = value
    return memory, memory.ctypes.data


def read(address: int) -> set[int]:
    """Return the values that are at an address; the pool must be alive."""
    return set(ctypes.string_at(address, SIZE))


@pools
def test_what_was_given_back_is_overwritten(make: Callable[[], Pool]) -> None:
    pool = make()
    memory, address = filled(pool, 7)
    del memory
    assert read(address) == {7}
    wipe_pools()
    assert read(address) == {0}


@pools
def test_what_is_in_use_is_overwritten_as_it_comes_back(make: Callable[[], Pool]) -> None:
    pool = make()
    memory, address = filled(pool, 7)
    view = memory[5:]
    wipe_pools()
    del memory
    assert read(address) == {7}
    assert set(view) == {7}
    del view
    assert read(address) == {0}


@pools
def test_what_was_taken_since_is_left_alone(make: Callable[[], Pool]) -> None:
    pool = make()
    wipe_pools()
    memory, address = filled(pool, 7)
    del memory
    assert read(address) == {7}
    # And is found again as it was: memory of any content, no more.
    again, _ = filled(pool, 8)
    assert again.ctypes.data == address


@pools
def test_idle_memory_is_overwritten_once(make: Callable[[], Pool]) -> None:
    pool = make()
    memory, address = filled(pool, 7)
    del memory
    wipe_pools()
    ctypes.memset(address, 9, SIZE)
    wipe_pools()
    assert read(address) == {9}, "nothing came back since, so there was nothing to do"


@pools
def test_memory_that_is_taken_again_counts_anew(make: Callable[[], Pool]) -> None:
    pool = make()
    memory, address = filled(pool, 7)
    del memory
    wipe_pools()
    for value in (8, 9):
        memory, again = filled(pool, value)
        assert again == address
        del memory
    wipe_pools()
    assert read(address) == {0}


@pools
def test_a_pool_that_is_gone_is_not_looked_for(make: Callable[[], Pool]) -> None:
    pool = make()
    identity, gone = id(pool), weakref.ref(pool)
    assert _POOLS[identity]() is pool
    memory, _ = filled(pool, 7)
    del pool
    gc.collect()
    # Memory that is in use does not keep the rest.
    assert gone() is None
    assert identity not in _POOLS
    wipe_pools()
    assert set(memory) == {7}


def test_what_is_too_much_to_be_kept_is_overwritten_too() -> None:
    pool = BufferPool(SIZE // 2)
    memory, address = filled(pool, 7)
    # What the pool would keep, were it not too much: the array has a view of it.
    view: Any = memory.base
    kept = view.obj
    wipe_pools()
    del memory, view
    assert pool.idle_bytes == 0
    assert kept is not None
    assert read(address) == {0}


@pools
def test_what_comes_back_while_pools_are_wiped_is_overwritten(make: Callable[[], Pool]) -> None:
    pool = make()
    memory, address = filled(pool, 7)
    returned = pool._returned if isinstance(pool, BufferPool) else pool._returned.loans

    class Late(deque[Any]):
        """Takes in what comes back only once a wiping has looked here."""

        def append(self, item: object) -> None:
            if self.is_first:
                self.is_first = False
                wipe_pools()
            super().append(item)

        is_first = True

    late = Late(returned)
    if isinstance(pool, BufferPool):
        pool._returned = late
    else:
        pool._returned.loans = late
    del memory
    assert not late.is_first
    pool.take(2 * SIZE)  # which looks after what came back
    assert read(address) == {0}
