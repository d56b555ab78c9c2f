"""The seam of encodings: what turns an array into the bytes that travel, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from membank.wire.spec import Array

Bytes = npt.NDArray[np.uint8]
"""Flat, C-contiguous bytes."""

Take = Callable[[int], Bytes]
"""Gives memory of so many bytes, of any content, writable; such as `BufferPool.take`."""


def fresh(num_bytes: int) -> Bytes:
    """Return new memory."""
    return np.empty(num_bytes, np.uint8)


@runtime_checkable
class WireCodec(Protocol):
    """One way for arrays to travel. Stateless: safe to share between threads.

    Whatever is encoded comes back in its shape. An array with a number that is infinite, or none,
    comes back with one, so that who must not accept such an array still sees it. Both ends run the
    same arithmetic, elementwise in float32: what one of them decodes is what the other one would.
    """

    @property
    def name(self) -> str:
        """Its name, which is that of the wire's element type."""
        ...

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """Element type of what `decode` returns."""
        ...

    def sizes(self, num_elements: int) -> range:
        """Return the sizes, in bytes, that the payload of so many elements may have."""
        ...

    def num_bytes(self, num_elements: int) -> int:
        """Return the largest of `sizes`; for encodings of a fetch it is the only one."""
        ...

    def encode(self, array: Array, take: Take = fresh) -> Bytes:
        """Return an array as it travels.

        Parameters
        ----------
        array
            Of any shape, float32, bfloat16 or float16, C-contiguous.
        take
            Gives the memory of the payload, where it needs any.

        Returns
        -------
        Bytes
            The payload; a view of `array` where that travels as it is.
        """
        ...

    def decode(self, payload: Bytes, shape: tuple[int, ...], take: Take = fresh) -> Array:
        """Return the array that a payload stands for.

        Parameters
        ----------
        payload
            One of the sizes that are right for `shape`.
        shape
            Shape of the array.
        take
            Gives the memory of the array, where it needs any.

        Returns
        -------
        Array
            Of `shape` and `dtype`; a view of `payload` where that is the array already.

        Raises
        ------
        InvalidArgumentError
            If no array has this payload (BAD_SHAPE).
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An array in the form in which it travels."""

    codec: str
    """Name of its encoding."""
    payload: Bytes
    """The bytes; must not change any more."""
    shape: tuple[int, ...]
    """Shape of the array."""

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.payload.nbytes

    @property
    def size(self) -> int:
        """Elements of the array."""
        return math.prod(self.shape)
