"""Arrays that travel as eight-bit integers, with a scale for each group of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from membank.wire.codec.contract import Bytes, Take, fresh
from membank.wire.spec import Array

GROUP = 64
"""Elements that share a scale. Larger groups have larger errors, smaller ones more scales: groups of
32, 64 and 128 add 12.5%, 6.3% and 3.1% to the bytes; their errors are 0.54%, 0.59% and 0.65% for
Gaussian elements, and 0.9%, 1.1% and 1.4% for heavy-tailed ones (docs/wire.md)."""

_LEVELS = 127
_SCALE_BYTES = 4
_TILE = 1024 * GROUP
"""Elements that are taken at a time, so that what is done to them finds them in the cache."""
_LEAST = np.float32(2.0**-100)
"""Of a smaller magnitude the factor would be infinite."""
_MAGNITUDE_BITS = np.int32(0x7FFFFFFF)

_Float32s = npt.NDArray[np.float32]
_Int8s = npt.NDArray[np.int8]


class GroupedInt8:
    """Symmetric quantisation by groups: scales first, then the elements.

    The largest magnitude of a group becomes 127 or -127, and the others are rounded to the nearest
    multiple of a 127th of it: no element is off by more than 1/254 of the largest one of its group,
    beside the rounding of float32. A group without a magnitude of 2**-100 or more becomes zeros.
    Groups are of consecutive elements in C order; only the last one may be shorter.
    """

    name = "int8"
    """Its name."""
    dtype: np.dtype[np.generic] = np.dtype(np.float32)
    """Element type of what `decode` returns."""

    def sizes(self, num_elements: int) -> range:
        # docstring inherited
        num_bytes = self.num_bytes(num_elements)
        return range(num_bytes, num_bytes + 1)

    def num_bytes(self, num_elements: int) -> int:
        # docstring inherited
        return -(-num_elements // GROUP) * _SCALE_BYTES + num_elements

    def encode(self, array: Array, take: Take = fresh) -> Bytes:
        # docstring inherited
        payload = take(self.num_bytes(array.size))
        scales, integers = _split(payload, array.size)
        values = array.reshape(-1)
        scratch = np.empty(min(_TILE, array.size), np.float32)
        bits = np.empty(scratch.size, np.int32)
        # What comes of numbers that are none is said by the scale.
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            for start, end, width in _tiles(array.size):
                groups = slice(start // GROUP, -(-end // GROUP))
                size = end - start
                _encode(
                    values[start:end].reshape(-1, width),
                    scales[groups],
                    integers[start:end].reshape(-1, width),
                    scratch[:size].reshape(-1, width),
                    bits[:size].reshape(-1, width),
                )
        return payload

    def decode(self, payload: Bytes, shape: tuple[int, ...], take: Take = fresh) -> Array:
        # docstring inherited
        size = int(np.prod(shape))
        scales, integers = _split(payload, size)
        values = take(size * self.dtype.itemsize).view(np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for start, end, width in _tiles(size):
                tile = values[start:end]
                tile[...] = integers[start:end]
                groups = tile.reshape(-1, width)
                np.multiply(groups, scales[start // GROUP : -(-end // GROUP), None], out=groups)
        return values.reshape(shape)


def _split(payload: Bytes, num_elements: int) -> tuple[_Float32s, _Int8s]:
    start = -(-num_elements // GROUP) * _SCALE_BYTES
    return payload[:start].view("<f4"), payload[start:].view(np.int8)


def _tiles(num_elements: int) -> list[tuple[int, int, int]]:
    """Return beginning, end and group length of the pieces that are taken at a time."""
    whole = num_elements // GROUP * GROUP
    tiles = [(at, min(at + _TILE, whole), GROUP) for at in range(0, whole, _TILE)]
    if whole < num_elements:
        tiles.append((whole, num_elements, num_elements - whole))
    return tiles


def _encode(
    values: Array,
    scales: _Float32s,
    integers: _Int8s,
    scratch: _Float32s,
    bits: npt.NDArray[np.int32],
) -> None:
    """Encode G groups of W elements.

    Parameters
    ----------
    values
        (G, W), the elements.
    scales
        (G,), where the scales go.
    integers
        (G, W), where the elements go.
    scratch, bits
        (G, W), of any content.
    """
    if values.dtype != np.float32:
        np.copyto(scratch, values)
        values = scratch
    # As integers, magnitudes have the order of the numbers, with infinity above all of them and what
    # is no number above that; and their maximum is found in half the time.
    np.bitwise_and(values.view(np.int32), _MAGNITUDE_BITS, out=bits)
    largest = bits.max(axis=1).view(np.float32)
    np.divide(largest, _LEVELS, out=scales)
    factors = _LEVELS / largest
    is_zero = largest < _LEAST
    scales[is_zero] = factors[is_zero] = 0
    np.multiply(values, factors[:, None], out=scratch)
    np.rint(scratch, out=scratch)
    np.copyto(integers, scratch, casting="unsafe")
