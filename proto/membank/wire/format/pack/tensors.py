"""The frame of a safetensors file, read without a copy and written without the whole in memory.

The safetensors package does neither for bfloat16. A file is ``u64 length | JSON of that length |
data``; the JSON gives each array's element type, shape and place in the data. Here is only what it
writes itself: compact JSON, arrays by element type and name, one after the other without gaps. A
file that says the same in other bytes is refused, so that no byte of a pack can be changed unnoticed.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from membank.wire.crc import Buffer, as_uint8
from membank.wire.spec import Array

_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100 << 20
"""What safetensors itself accepts; a header is held in memory before anything of it is checked."""

DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
"""Element types by their names in the file, in the order in which their arrays lie there."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, slots=True)
class TensorKind:
    """Element type and shape of one array."""

    dtype: np.dtype[np.generic]
    """One of `DTYPES`."""
    shape: tuple[int, ...]
    """Its shape."""

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def kinds_of(arrays: Mapping[str, Array]) -> dict[str, TensorKind]:
    """Return element type and shape of each of `arrays`."""
    return {name: TensorKind(array.dtype, array.shape) for name, array in arrays.items()}


def file_order(kinds: Mapping[str, TensorKind]) -> list[str]:
    """Return the names of arrays in the order in which their data lie in a file."""
    return sorted(kinds, key=lambda name: (_RANKS[kinds[name].dtype], name))


def encode_head(metadata: Mapping[str, str], kinds: Mapping[str, TensorKind]) -> bytes:
    """Return what comes before the data of a file."""
    header: dict[str, object] = {_METADATA: dict(metadata)}
    start = 0
    for name in file_order(kinds):
        kind = kinds[name]
        end = start + kind.num_bytes
        header[name] = {
            "dtype": _NAMES[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = _padded(_compact(header))
    return _LENGTH.pack(len(text)) + text


def decode_file(data: Buffer) -> tuple[dict[str, str], dict[str, Array]]:
    """Return the metadata of a file, and its arrays as views of `data`.

    Raises
    ------
    ValueError
        If it is not such a file, or cut short.
    """
    flat = as_uint8(data)
    if flat.size < _LENGTH.size:
        raise ValueError("it has no header")
    (length,) = _LENGTH.unpack(flat[: _LENGTH.size].tobytes())
    begin = _LENGTH.size + length
    if length > _MAX_HEADER_BYTES or begin > flat.size:
        raise ValueError("its header is cut short")
    text = flat[_LENGTH.size : begin].tobytes()
    header = json.loads(text)
    if not isinstance(header, dict) or not isinstance(header.get(_METADATA), dict):
        raise ValueError("its header is no object with metadata")  # noqa: TRY004  # of a file
    if text != _padded(_compact(header)):
        raise ValueError("its header is not written as safetensors writes it")
    metadata = header.pop(_METADATA)
    kinds = {name: _kind(entry) for name, entry in header.items()}
    arrays: dict[str, Array] = {}
    start = 0
    for name in file_order(kinds):
        end = start + kinds[name].num_bytes
        if header[name].get("data_offsets") != [start, end]:
            raise ValueError(f"array {name} is not where it should be")
        piece = flat[begin + start : begin + end]
        if piece.size != end - start:
            raise ValueError("its data are cut short")
        arrays[name] = piece.view(kinds[name].dtype).reshape(kinds[name].shape)
        start = end
    if begin + start != flat.size:
        raise ValueError("there is something behind its data")
    return {str(key): str(value) for key, value in metadata.items()}, arrays


def data_of(data: Buffer) -> npt.NDArray[np.uint8]:
    """Return the data of a file that `decode_file` has read, what is behind its header."""
    flat = as_uint8(data)
    (length,) = _LENGTH.unpack(flat[: _LENGTH.size].tobytes())
    return flat[_LENGTH.size + length :]


def _kind(entry: object) -> TensorKind:
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        raise ValueError("an array has no shape")  # noqa: TRY004  # of a file
    shape = tuple(entry["shape"])
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{shape} is no shape")
    try:
        return TensorKind(DTYPES[entry["dtype"]], shape)
    except (KeyError, TypeError) as err:
        raise ValueError(f"{entry.get('dtype')} is no element type of a block") from err


def _compact(header: Mapping[str, object]) -> bytes:
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


def _padded(text: bytes) -> bytes:
    return text + b" " * (-len(text) % _ALIGNMENT)
