"""The digest of a JSON object and of named arrays, which is what is signed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from membank.wire.crc import Buffer, as_uint8
from membank.wire.spec import Array


def canonical(body: Mapping[str, object]) -> str:
    """Return `body` as compact JSON: sorted keys, no white space, ASCII."""
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


class Digest:
    """SHA-256 of a JSON object, then of arrays in the order of their names.

    Parameters
    ----------
    body
        The object.
    """

    def __init__(self, body: Mapping[str, object]) -> None:
        self._sha256 = hashlib.sha256(canonical(body).encode())

    def add(
        self,
        name: str,
        dtype: npt.DTypeLike,
        shape: tuple[int, ...],
        pieces: Iterable[Buffer],
    ) -> None:
        """Take in the next array: name, element type and shape, then its bytes in C order."""
        self._sha256.update(f"\0{name}\0{np.dtype(dtype).name}\0{shape}\0".encode())
        for piece in pieces:
            self._sha256.update(as_uint8(piece).data)

    def hexdigest(self) -> str:
        """Return the digest in hexadecimal, 64 lower-case digits."""
        return self._sha256.hexdigest()


def sha256_of(body: Mapping[str, object], arrays: Mapping[str, Array]) -> str:
    """Return the digest of `body` and `arrays`, hexadecimal."""
    digest = Digest(body)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.add(name, array.dtype, arrays[name].shape, [array])
    return digest.hexdigest()
