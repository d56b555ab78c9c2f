"""Arrays of which only some elements travel."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from membank.wire.codec.contract import Bytes, Take, fresh
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import Array

_PAIR_BYTES = 8
_MAX_ELEMENTS = 1 << 32
_MAGNITUDE_BITS = np.int32(0x7FFFFFFF)
_TILE = 1 << 16
"""Elements that are looked through at a time, so that what is found of them stays in the cache."""

_Positions = npt.NDArray[np.uint32]


class Sparse:
    """The elements of the largest magnitude: their positions in C order, then their values.

    Positions are uint32 and strictly ascending, values float32. All other elements come back as 0.

    Parameters
    ----------
    share
        Part of the elements that is sent, in (0, 1], rounded up to whole elements. 1 sends every
        element but zeros.

    Raises
    ------
    InvalidArgumentError
        If `share` is not in (0, 1].
    """

    name = "sparse"
    """Its name."""
    dtype: np.dtype[np.generic] = np.dtype(np.float32)
    """Element type of what `decode` returns."""

    def __init__(self, share: float = 1.0) -> None:
        if not 0 < share <= 1:
            raise InvalidArgumentError(
                f"share is {share!r}; accepted: above 0, up to 1", reason=Reason.BAD_CONFIG
            )
        self._share = share

    def sizes(self, num_elements: int) -> range:
        # docstring inherited
        return range(0, num_elements * _PAIR_BYTES + 1, _PAIR_BYTES)

    def num_bytes(self, num_elements: int) -> int:
        # docstring inherited
        return num_elements * _PAIR_BYTES

    def encode(self, array: Array, take: Take = fresh) -> Bytes:
        # docstring inherited
        if array.size > _MAX_ELEMENTS:
            raise InvalidArgumentError(
                f"an array of {array.size} elements has positions that 32 bits do not hold; send it "
                "in another encoding",
                reason=Reason.BAD_SHAPE,
            )
        values = array.reshape(-1).astype(np.float32, copy=False)
        positions = _positions(values, math.ceil(self._share * values.size))
        payload = take(len(positions) * _PAIR_BYTES)
        of_positions, of_values = _split(payload)
        of_positions[...] = positions
        np.take(values, positions, out=of_values)
        return payload

    def decode(self, payload: Bytes, shape: tuple[int, ...], take: Take = fresh) -> Array:
        # docstring inherited
        positions, sent = _split(payload)
        values = take(math.prod(shape) * self.dtype.itemsize).view(np.float32)
        # Nothing that comes from elsewhere is used as an index before it was looked at.
        ascends = not np.any(positions[1:] <= positions[:-1])
        if len(positions) and not (ascends and positions[-1] < values.size):
            raise InvalidArgumentError(
                f"positions are not ascending, or not those of {values.size} elements",
                reason=Reason.BAD_SHAPE,
            )
        values[...] = 0
        values[positions] = sent
        return values.reshape(shape)


def _split(payload: Bytes) -> tuple[_Positions, npt.NDArray[np.float32]]:
    half = payload.size // 2
    return payload[:half].view("<u4"), payload[half:].view("<f4")


def _positions(values: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Return the positions of the `count` largest magnitudes but zeros, ascending.

    Of equal ones that are too many the first ones count. What is no number has the largest
    magnitude of all, so that it is sent and seen.
    """
    bits = np.bitwise_and(values.view(np.int32), _MAGNITUDE_BITS)
    least = np.int32(0)
    if count < values.size:
        least = np.partition(bits, values.size - count)[values.size - count]
    positions = np.flatnonzero(bits > least)
    missing = count - len(positions)
    if not least or missing == 0:
        return positions
    equal = np.flatnonzero(bits == least)[:missing]
    return np.sort(np.concatenate((positions, equal)))
