"""Slots: zarr v3 chunks of one block, coded as ``bytes(little)`` and ``crc32c``.

Such a chunk is the block's raw little-endian elements and 4 bytes of CRC-32C, so it can be read
and written directly and stays a valid chunk for every zarr v3 reader.
"""

from __future__ import annotations

import math
import struct

import numpy as np

from membank.wire.crc import crc32c, flat_view
from membank.wire.errors import CorruptionError, Reason
from membank.wire.spec import Array

_TRAILER = struct.Struct("<I")


TRAILER_BYTES = _TRAILER.size
"""Bytes of a chunk beyond the block's own."""


def encode_slot(array: Array, crc: int) -> list[bytes | memoryview]:
    """Encode one block; it is not copied.

    Parameters
    ----------
    array
        (L, P, R, D), C-contiguous, any block dtype.
    crc
        CRC-32C of its bytes.

    Returns
    -------
    list[bytes | memoryview]
        The chunk, in pieces that follow one another.
    """
    return [flat_view(array), _TRAILER.pack(crc)]


def decode_slot(
    chunk: bytes | memoryview,
    *,
    dtype: np.dtype[np.generic],
    shape: tuple[int, ...],
    crc: int,
    key: str,
    actual: int | None = None,
) -> Array:
    """Decode one block and check it.

    Parameters
    ----------
    chunk
        The chunk as stored.
    dtype, shape
        Element type and dimensions of the block.
    crc
        CRC-32C that the manifest names.
    key
        Key of the chunk, for the error.
    actual
        CRC-32C of the block's bytes in `chunk`, where whoever read them has computed it already.

    Returns
    -------
    Array
        `shape`, read-only, a view of `chunk`.

    Raises
    ------
    CorruptionError
        If length, trailer or content are not what the manifest names.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    problem = ""
    if len(chunk) != num_bytes + _TRAILER.size:
        problem = f"{len(chunk)} bytes, expected {num_bytes + _TRAILER.size}"
    else:
        body = np.frombuffer(chunk, np.uint8, count=num_bytes)
        actual = crc32c(body) if actual is None else actual
        (stored,) = _TRAILER.unpack_from(chunk, num_bytes)
        if not actual == stored == crc:
            # All three are compared: content and trailer may agree and yet be another block's.
            problem = f"CRC-32C {actual:08x}, trailer {stored:08x}, manifest {crc:08x}"
    if problem:
        raise CorruptionError(
            f"{key}: {problem}; restore the file from a copy or roll the block back",
            reason=Reason.SLOT_CORRUPT,
            metadata={"key": key},
        )
    return body.view(dtype).reshape(shape)
