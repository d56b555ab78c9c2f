"""Reading a file and checking it in one go, large ones by two threads."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache

import numpy as np

from membank.wire.crc import crc32c, join_crc32c

_SPLIT_BYTES = 2 << 20
"""Bytes from which on a second thread pays: a hand-over takes up to 0.1 ms, and the CRC of 1 MB as
much. At 4 MB in the page cache a checked read took 0.6 ms instead of 1.0, and a plain one 0.65."""
_NUM_HELPERS = 4
_PART_BYTES = 4 << 20
"""Bytes that are checked after each read, while they are in the processor's cache. Smaller parts
cost more than they save: each gives the interpreter's lock away twice."""
_SPARE_BYTES = sys.getsizeof(b"")


def read_checked(path: str, num_bytes: int) -> tuple[memoryview, int]:
    """Return the content of a file, read-only, and the CRC-32C of its first `num_bytes` bytes.

    Raises
    ------
    OSError
        As the system calls do.

    Notes
    -----
    It takes as much memory as `bytes` of the same length would (see `shard.content.new_array`).
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        if size < _SPLIT_BYTES:
            return _read_small(handle, size, num_bytes)
        memory = np.empty(size + _SPARE_BYTES, np.uint8)
        whole = memory[:size].data
        checked = whole[:num_bytes]
        half = len(checked) // 2
        second = _helpers().submit(_read_part, handle, checked[half:], half)
        try:
            first = _read_part(handle, checked[:half], 0)
        finally:
            # Where all helpers are at work, this thread does it all; a started one must end first.
            if not (is_alone := second.cancel()):
                wait([second])
        rest = _read_part(handle, checked[half:], half) if is_alone else second.result()
        crc = join_crc32c(first, checked[half:], rest)
        _fill(handle, whole[num_bytes:], num_bytes)
    finally:
        os.close(handle)
    return whole.toreadonly(), crc


def _read_small(handle: int, size: int, num_bytes: int) -> tuple[memoryview, int]:
    data = os.read(handle, size)
    return memoryview(data), crc32c(memoryview(data)[:num_bytes])


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_NUM_HELPERS, thread_name_prefix="membank-read")


# Threads do not survive a fork: a child makes helpers of its own.
os.register_at_fork(after_in_child=_helpers.cache_clear)


def _read_part(handle: int, target: memoryview, offset: int) -> int:
    crc = 0
    for start in range(0, len(target), _PART_BYTES):
        part = target[start : start + _PART_BYTES]
        _fill(handle, part, offset + start)
        crc = crc32c(part, start=crc)
    return crc


def _fill(handle: int, target: memoryview, offset: int) -> None:
    while len(target):
        count = os.preadv(handle, [target], offset)
        if count == 0:
            # Objects never shrink: what is missing is found by its CRC.
            target[:] = bytes(len(target))
            return
        target, offset = target[count:], offset + count
