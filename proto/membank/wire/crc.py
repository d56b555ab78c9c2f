"""CRC-32C (Castagnoli) of buffers without copying them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import google_crc32c
import numpy as np
import numpy.typing as npt

from membank.wire.errors import CorruptionError, Reason
from membank.wire.spec import Array

Buffer = bytes | bytearray | memoryview | Array
"""Anything with C-contiguous bytes."""


def as_uint8(buffer: Buffer) -> npt.NDArray[np.uint8]:
    """View `buffer` as flat uint8; no copy.

    The common currency of bytes here: ml_dtypes arrays offer no usable buffer format, and
    google_crc32c takes numpy arrays but neither bytearray nor memoryview.
    """
    if isinstance(buffer, np.ndarray):
        return buffer.reshape(-1).view(np.uint8)
    return np.frombuffer(buffer, dtype=np.uint8)


def flat_view(array: Array) -> memoryview:
    """View the bytes of an array; no copy, if it is C-contiguous."""
    try:
        return array.data.cast("B")
    except (TypeError, ValueError):  # strided, or of ml_dtypes
        return as_uint8(array).data


def crc32c(buffer: Buffer, *, start: int = 0) -> int:
    """Return the CRC-32C of `buffer`, continuing from `start` (0 = afresh)."""
    return _extender()(buffer, start)


def join_crc32c(start: int, buffer: Buffer, known: int) -> int:
    """Return the CRC-32C of what has the CRC `start` followed by `buffer`, whose own is `known`.

    Costs nothing that grows with `buffer`, where awscrt is installed.
    """
    return _joiner()(start, buffer, known)


@cache
def zeros_crc32c(num_bytes: int) -> int:
    """Return the CRC-32C of `num_bytes` bytes of zeros."""
    zeros = np.zeros(min(num_bytes, _PIECE_BYTES), np.uint8)
    crc = 0
    for start in range(0, num_bytes, _PIECE_BYTES):
        crc = crc32c(zeros[: num_bytes - start], start=crc)
    return crc


_PIECE_BYTES = 1 << 20


def check_crc32c(buffer: Buffer, expected: int, *, what: str) -> None:
    """Raise unless `buffer` has the CRC-32C `expected`.

    Raises
    ------
    CorruptionError
        If it has another; `what` names the damaged thing.
    """
    check_known_crc32c(crc32c(buffer), expected, what=what)


def check_known_crc32c(actual: int, expected: int, *, what: str) -> None:
    """Raise `CorruptionError` unless bytes whose CRC-32C is `actual` have the one `expected`."""
    if actual != expected:
        raise CorruptionError(
            f"{what}: CRC-32C is {actual:08x}, expected {expected:08x}; the bytes were damaged",
            reason=Reason.CHECKSUM_MISMATCH,
            metadata={"what": what},
        )


Extender = Callable[[Buffer, int], int]
"""Takes bytes and the CRC of what comes before them; returns the CRC of both."""


def extend_portably(buffer: Buffer, start: int) -> int:
    """Extend a CRC by what every installation has."""
    view = buffer if isinstance(buffer, bytes) else as_uint8(buffer)
    return int(google_crc32c.extend(start, view)) if len(view) else start


@cache
def _extender() -> Extender:
    """Return the fastest way that is installed: with awscrt, a service reads blocks faster.

    Looked for when it is first needed: loading awscrt takes longer than many a command.
    """
    try:
        from awscrt import checksums
    except ImportError:
        return extend_portably
    extend: Extender = checksums.crc32c
    return extend


@cache
def _joiner() -> Callable[[int, Buffer, int], int]:
    try:
        from awscrt.checksums import combine_crc32c
    except ImportError:
        return lambda start, buffer, _: extend_portably(buffer, start)

    def combine(start: int, buffer: Buffer, known: int) -> int:
        length = len(buffer) if isinstance(buffer, bytes | bytearray) else buffer.nbytes
        return int(combine_crc32c(start, known, length))

    return combine
