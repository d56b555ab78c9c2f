"""Both implementations of CRC-32C are the same function, and a client needs only one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from membank.wire.crc import Buffer, Extender, crc32c, extend_portably, flat_view, join_crc32c


def _fast() -> Extender:
    checksums = pytest.importorskip("awscrt.checksums")
    extend: Extender = checksums.crc32c
    return extend


def _bitwise(data: bytes, start: int = 0) -> int:
    """Return the CRC by its definition: reflected polynomial 0x1EDC6F41, bit by bit."""
    crc = start ^ 0xFFFF_FFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F6_3B78 if crc & 1 else 0)
    return crc ^ 0xFFFF_FFFF


def test_the_check_value_of_the_format() -> None:
    assert crc32c(b"123456789") == 0xE306_9283


@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_any_bytes_after_any_others(data: bytes, start: int) -> None:
    expected = _bitwise(data, start)
    assert crc32c(data, start=start) == expected
    assert extend_portably(data, start) == expected
    assert _fast()(data, start) == expected


# Around the lengths at which implementations change their ways, at aligned and odd addresses.
@pytest.mark.parametrize("size", [1, 15, 16, 63, 64, 255, 256, 1023, 1024, 4095, 1 << 16, 1 << 20])
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_implementations_agree(size: int, offset: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size + 8, np.uint8)[offset:][:size]
    assert _fast()(data, 5) == extend_portably(data, 5) == crc32c(data, start=5)


def _ways() -> list[Extender]:
    return [extend_portably, _fast(), lambda buffer, start: crc32c(buffer, start=start)]


_VALUES: npt.NDArray[np.float32] = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    "buffer",
    [
        _VALUES.tobytes(),
        bytearray(_VALUES.tobytes()),
        memoryview(_VALUES.tobytes()),
        _VALUES,
        np.frombuffer(_VALUES.tobytes(), np.float32),  # read-only
    ],
)
def test_buffers_of_every_kind(buffer: Buffer) -> None:
    assert {way(buffer, 0) for way in _ways()} == {_bitwise(_VALUES.tobytes())}


def test_elements_that_numpy_does_not_know() -> None:
    values = np.arange(4).astype(ml_dtypes.bfloat16)
    assert {way(values, 0) for way in _ways()} == {_bitwise(values.tobytes())}


@pytest.mark.parametrize("nothing", [b"", bytearray(), memoryview(b""), np.empty((0, 3))])
def test_nothing_leaves_the_crc_as_it_is(nothing: Buffer) -> None:
    assert {way(nothing, 77) for way in _ways()} == {77}


def test_a_client_alone_has_the_same_crc() -> None:
    # None in sys.modules makes the import fail, as in an installation without the service.
    program = """
import sys
sys.modules["awscrt"] = None
from membank.wire.crc import crc32c
print(crc32c(b"123456789"), "_awscrt" in sys.modules)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == [str(0xE306_9283), "False"]


def test_the_fast_one_is_loaded_when_it_is_needed() -> None:
    pytest.importorskip("awscrt")
    program = """
import sys
import membank.wire, membank.client, membank.cli
before = "_awscrt" in sys.modules
from membank.wire.crc import crc32c
crc32c(b"1")
print(before, "_awscrt" in sys.modules)
"""
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["False", "True"]


@pytest.mark.parametrize(
    "join", [join_crc32c, lambda start, buffer, _: extend_portably(buffer, start)]
)
@given(st.binary(max_size=300), st.binary(max_size=300))
def test_a_known_crc_is_joined_to_what_comes_before(
    join: Callable[[int, bytes, int], int], first: bytes, second: bytes
) -> None:
    assert join(crc32c(first), second, crc32c(second)) == crc32c(first + second)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_a_flat_view_is_of_the_bytes(dtype: str) -> None:
    array = np.arange(12).reshape(3, 4).astype(dtype)
    for part in (array, array[:, 1:], array[:0]):
        view = flat_view(part)
        assert (view.ndim, view.itemsize) == (1, 1)
        assert view.tobytes() == part.tobytes()
    flat_view(array)[:1] = bytes([7])
    assert array.tobytes()[0] == 7
