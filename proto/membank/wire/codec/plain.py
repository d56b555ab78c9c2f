"""Arrays that travel as their elements."""

from __future__ import annotations

import numpy as np

from membank.wire.codec.contract import Bytes, Take, fresh
from membank.wire.crc import as_uint8
from membank.wire.spec import Array, dtype_of


class Plain:
    """The elements of an array, one after the other, each rounded to one type.

    Parameters
    ----------
    name
        Their type: float32, bfloat16 or float16.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._dtype = dtype_of(name)

    @property
    def name(self) -> str:
        # docstring inherited
        return self._name

    @property
    def dtype(self) -> np.dtype[np.generic]:
        # docstring inherited
        return self._dtype

    def sizes(self, num_elements: int) -> range:
        # docstring inherited
        num_bytes = self.num_bytes(num_elements)
        return range(num_bytes, num_bytes + 1)

    def num_bytes(self, num_elements: int) -> int:
        # docstring inherited
        return num_elements * self._dtype.itemsize

    def encode(self, array: Array, take: Take = fresh) -> Bytes:
        # docstring inherited
        if array.dtype == self._dtype:
            return as_uint8(array)
        payload = take(self.num_bytes(array.size))
        # A number that is out of range becomes infinite; who must not take it will see that.
        with np.errstate(over="ignore"):
            np.copyto(payload.view(self._dtype), array.reshape(-1), casting="unsafe")
        return payload

    def decode(self, payload: Bytes, shape: tuple[int, ...], take: Take = fresh) -> Array:
        # docstring inherited
        return payload.view(self._dtype).reshape(shape)
