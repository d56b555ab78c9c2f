"""Copying bytes and checking them in one go, large ones by two threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from membank.wire.crc import crc32c, join_crc32c
from membank.wire.loaders import Loaders

T = TypeVar("T")

_SPLIT_BYTES = 2 << 20
"""Bytes from which on a second thread pays: a hand-over takes up to 0.1 ms."""
_PIECE_BYTES = 1 << 20
"""Bytes that are checked right after they were copied, while the processor's cache holds them.
Smaller pieces cost more than they save: each gives the interpreter's lock away twice, and below
512 KiB glibc copies some alignments 15 times slower."""
_NUM_HELPERS = 4


def copy_checked(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> int:
    """Copy `source` to `target`, of the same length, and return the CRC-32C of what was copied.

    The CRC is that of `target`: where somebody else changes `source` meanwhile, it is of the bytes
    that arrived.
    """
    if source.size < _SPLIT_BYTES:
        return _copy_part(target, source)
    # Both threads begin at a page, so that source and target stay aligned as they are.
    half = source.size // 2 & ~0xFFF
    first, second = side_by_side(
        lambda: _copy_part(target[:half], source[:half]),
        lambda: _copy_part(target[half:], source[half:]),
    )
    return join_crc32c(first, target[half:], second)


def side_by_side(first: Callable[[], T], second: Callable[[], T]) -> tuple[T, T]:
    """Do both, `second` in a helper, or here too where all are at work."""
    done = _helpers().map(lambda work: work(), (first, second))
    return done[0], done[1]


def _copy_part(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> int:
    crc = 0
    for start in range(0, source.size, _PIECE_BYTES):
        piece = target[start : start + _PIECE_BYTES]
        piece[...] = source[start : start + _PIECE_BYTES]
        crc = crc32c(piece, start=crc)
    return crc


@cache
def _helpers() -> Loaders:
    return Loaders(_NUM_HELPERS, "membank-copy")


# Threads do not survive a fork: a child makes helpers of its own.
os.register_at_fork(after_in_child=_helpers.cache_clear)
