"""Memory that payloads land in, used again once nobody refers to it any more.

Fresh memory is what a large copy waits for: the kernel hands it out page by page and zeroes each,
at about a fifth of the speed at which memory that is there already is written.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from functools import cache

import numpy as np
import numpy.typing as npt

from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.wiping import register

ALIGNMENT_BYTES = 4096
"""Where the memory of an array begins: at a multiple of this. All alike, since a copy whose target
lies a few bytes ahead of its source modulo 4096 runs at a fraction of the speed on some processors
(their string instruction takes the one for the other)."""

MIN_POOLED_BYTES = 32 << 10
"""Smaller arrays come from the allocator, which is as fast for them."""

_Memory = npt.NDArray[np.uint8]

# glibc never raises its threshold above 32 MiB, so a freed piece of that size would change nothing.
_FREED_ONCE_BYTES = 31 << 20


class BufferPool:
    """Hands out byte arrays and takes their memory back by itself; safe to use from any thread.

    The memory of an array is handed out again only when the array and everything that was made from
    it are gone: views, memoryviews, and tensors of other libraries that share it. So whoever holds
    a fetched weight never sees it change.

    Parameters
    ----------
    max_bytes
        Most bytes that are kept while nobody uses them, >= 0; 0 = none, all memory is fresh. What
        is in use is not bounded here.

    Raises
    ------
    InvalidArgumentError
        If `max_bytes` is negative.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 0:
            raise InvalidArgumentError(
                f"max_bytes is {max_bytes}; accepted: >= 0", reason=Reason.BAD_CONFIG
            )
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        # By size; the size that was used longest ago comes first, and so does, within a size, what
        # was given back longest ago.
        self._idle: dict[int, deque[_Memory]] = {}
        self._idle_bytes = 0
        # Memory, and how often the pool had been wiped when it was taken.
        self._returned: deque[tuple[_Memory, int]] = deque()
        self._num_wipes = 0
        # Idle memory that was not wiped since it came back, by identity.
        self._stale: set[int] = set()
        register(self)

    @property
    def max_bytes(self) -> int:
        """Most bytes that are kept while nobody uses them."""
        return self._max_bytes

    @property
    def idle_bytes(self) -> int:
        """Bytes that are kept now and that nobody uses."""
        return self._idle_bytes

    def take(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        """Return an array of any content.

        Parameters
        ----------
        num_bytes
            Its size in bytes, >= 0.

        Returns
        -------
        Array
            (num_bytes,) uint8, writable, C-contiguous; from `MIN_POOLED_BYTES` on it begins at a
            multiple of `ALIGNMENT_BYTES`.
        """
        if num_bytes < MIN_POOLED_BYTES:
            return np.empty(num_bytes, np.uint8)
        size = rounded(num_bytes)
        if not self._max_bytes:
            return _array_in(_new_memory(size), num_bytes)
        self._sort_in_returned()
        with self._lock:
            memory, num_wipes = self._pop(size), self._num_wipes
        self._sort_in_returned()
        if memory is None:
            memory = _new_memory(size)
        array = _array_in(memory, num_bytes)
        # Not by a method of this pool: an array that outlives its client must not keep the idle
        # memory of the others.
        back = weakref.finalize(array, _give_back, weakref.ref(self), memory, num_wipes)
        back.atexit = False
        return array

    def wipe(self) -> None:
        """Overwrite with zeros all that nobody uses, now; and all that somebody uses, as it returns."""
        with self._lock:
            # What was taken before this is wiped as it is sorted in.
            self._num_wipes += 1
            for memory in itertools.chain.from_iterable(self._idle.values()):
                if id(memory) in self._stale:
                    memory.fill(0)
            self._stale.clear()
        self._sort_in_returned()

    def _pop(self, size: int) -> _Memory | None:
        memories = self._idle.pop(size, None)
        if not memories:
            return None
        memory = memories.pop()  # the one given back last is likeliest in the processor's cache
        self._idle_bytes -= size
        self._stale.discard(id(memory))
        if memories:
            self._idle[size] = memories
        return memory

    def _sort_in_returned(self) -> None:
        """Make what was given back idle.

        Memory comes back wherever an array dies: also in a garbage collection in the midst of
        these methods, on the thread that holds the lock. So giving back waits for nobody, and
        whoever lets the lock go looks once more whether something came meanwhile.
        """
        while self._returned and self._lock.acquire(blocking=False):
            try:
                dropped = self._sort_in()
            finally:
                self._lock.release()
            del dropped  # only now: to unmap memory takes a while

    def _sort_in(self) -> list[_Memory]:
        """Make it idle and return what is too much."""
        dropped = []
        while self._returned:
            memory, num_wipes = self._returned.popleft()
            size = _size_of(memory)
            if num_wipes != self._num_wipes:
                memory.fill(0)
            if size > self._max_bytes:
                dropped.append(memory)
                continue
            if num_wipes == self._num_wipes:
                self._stale.add(id(memory))
            memories = self._idle.pop(size, None) or deque()
            memories.append(memory)
            self._idle[size] = memories
            self._idle_bytes += size
        while self._idle_bytes > self._max_bytes:
            size = next(iter(self._idle))
            memories = self._idle[size]
            dropped.append(memories.popleft())
            self._stale.discard(id(dropped[-1]))
            self._idle_bytes -= size
            if not memories:
                del self._idle[size]
        return dropped


@cache
def keep_freed_memory() -> None:
    """Have the C library keep what is freed for the next allocation, once for this process.

    gRPC allocates and frees every message several times. glibc maps each piece of more than 128 KiB
    afresh, page by page, until a larger one has been freed; from then on it keeps pieces up to that
    size (mallopt(3), M_MMAP_THRESHOLD). So one is freed, which is never touched and costs nothing.
    A fetch of 32 MB then took a third less time of the processors. Other libraries are indifferent.
    """
    np.empty(_FREED_ONCE_BYTES, np.uint8)


def _give_back(pool_ref: weakref.ref[BufferPool], memory: _Memory, num_wipes: int) -> None:
    pool = pool_ref()
    if pool is not None:
        pool._returned.append((memory, num_wipes))
        pool._sort_in_returned()


def rounded(num_bytes: int) -> int:
    """Return `num_bytes` rounded up by less than an eighth, so that like sizes share memory."""
    step = max(ALIGNMENT_BYTES, 1 << (num_bytes.bit_length() - 4))
    return -(-num_bytes // step) * step


def _new_memory(size: int) -> _Memory:
    return np.empty(size + ALIGNMENT_BYTES, np.uint8)


def _size_of(memory: _Memory) -> int:
    return memory.size - ALIGNMENT_BYTES


def _array_in(memory: _Memory, num_bytes: int) -> npt.NDArray[np.uint8]:
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    # Through a memoryview: a plain slice would not be the base of its views, `memory` would, and
    # so the slice could be gone while a view of it is still in use.
    return np.frombuffer(memory.data[start : start + num_bytes], np.uint8)
