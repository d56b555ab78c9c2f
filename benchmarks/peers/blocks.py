"""The blocks that every contestant is loaded with: sizes, names, contents.

A block is one array of shape (8, 3, r, 1024) float32, as a bank of 8 layers of width 1024 has them.
Its content follows from its name, so that whoever fetches it can tell whether it is right. All are
pieces of one array of random numbers, each from another place on: to draw hundreds of megabytes anew
in every process would take longer than to measure.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

NUM_LAYERS = 8
NUM_PARTS = 3
WIDTH = 1024
_NUM_PLACES = 1 << 20
"""Places from which a block's content can begin."""


@dataclass(frozen=True, slots=True)
class Size:
    """A kind of blocks, which is a level of the bank.

    Blocks are called ``LABEL/NUMBER``, such as ``8mb/0``.
    """

    label: str
    """Name."""
    block_width: int
    """Columns r of a block; each adds 98,304 bytes."""
    fan_out: int
    """Blocks for each of the next larger size."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a block."""
        return (NUM_LAYERS, NUM_PARTS, self.block_width, WIDTH)

    @property
    def num_params(self) -> int:
        """Parameters of a block."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of a block."""
        return 4 * self.num_params


@dataclass(frozen=True, slots=True)
class Blocks:
    """All blocks of a run, largest first, as the levels of a bank's tree have them."""

    sizes: tuple[Size, ...]
    """Sizes; the number of blocks of one is the product of the fan-outs so far."""

    @classmethod
    def of(cls, num_large: int) -> Blocks:
        """Return `num_large` blocks of each large size, 64 of 1 MB, at least 1,000 of 100 KB."""
        return cls(
            (
                Size("36mb", 384, num_large),
                Size("32mb", 341, 1),
                Size("16mb", 171, 1),
                Size("8mb", 85, 1),
                Size("1mb", 11, math.ceil(64 / num_large)),
                Size("100kb", 1, 16),
            )
        )

    def size(self, label: str) -> Size:
        """Return the size called `label`."""
        return next(size for size in self.sizes if size.label == label)

    def level(self, label: str) -> int:
        """Return the level, from 1, whose blocks have the size `label`."""
        return 1 + next(i for i, size in enumerate(self.sizes) if size.label == label)

    def count(self, label: str) -> int:
        """Return how many blocks of a size there are."""
        return math.prod(size.fan_out for size in self.sizes[: self.level(label)])

    def keys(self, label: str) -> list[str]:
        """Return the names of all blocks of a size."""
        return [f"{label}/{number}" for number in range(self.count(label))]

    def batches(self) -> Iterator[dict[str, Array]]:
        """Yield all blocks, those of one size at a time."""
        for size in self.sizes:
            yield {key: self.content(key) for key in self.keys(size.label)}

    def content(self, key: str) -> Array:
        """Return the content of a block, read-only."""
        size = self.size(key.partition("/")[0])
        begin = zlib.crc32(key.encode()) % _NUM_PLACES
        return _numbers(max(s.num_params for s in self.sizes))[
            begin : begin + size.num_params
        ].reshape(size.shape)


@cache
def _numbers(longest: int) -> Array:
    numbers = np.random.default_rng(0).standard_normal(longest + _NUM_PLACES, np.float32)
    numbers.flags.writeable = False
    return numbers


def bytes_of(array: Array) -> memoryview:
    """View the bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data
