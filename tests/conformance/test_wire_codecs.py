"""What every encoding of the wire does, and what each one promises of its own."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from membank.wire.buffers import BufferPool
from membank.wire.codec import (
    FETCH_CODECS,
    GROUP,
    PUSH_CODECS,
    GroupedInt8,
    Sparse,
    WireCodec,
    fetch_codec,
    push_codec,
)
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import DTYPES

CODECS = [*PUSH_CODECS.values(), Sparse(0.1)]
# Less than a group, whole groups, one element more, more than what is taken at a time.
SIZES = [0, 1, 2, GROUP - 1, GROUP, GROUP + 1, 1000, (1 << 16) - 1, (1 << 16) + GROUP + 3]


def gaussian(size: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


def heavy_tailed(size: int, seed: int = 0) -> NDArray[np.float32]:
    """Student's t with 3 degrees of freedom: a few elements are much larger than the rest."""
    return np.random.default_rng(seed).standard_t(3, size).astype(np.float32)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
class TestEveryCodec:
    def test_it_is_one(self, codec: WireCodec) -> None:
        assert isinstance(codec, WireCodec)

    @pytest.mark.parametrize("size", SIZES)
    def test_a_payload_has_a_size_that_is_right_and_comes_back_in_its_shape(
        self, codec: WireCodec, size: int
    ) -> None:
        array = gaussian(size).reshape(1, size, 1)
        payload = codec.encode(array)
        assert payload.dtype == np.uint8
        assert payload.shape == (payload.nbytes,)
        assert payload.nbytes in codec.sizes(size)
        assert codec.num_bytes(size) == max(codec.sizes(size))
        decoded = codec.decode(payload, array.shape)
        assert (decoded.shape, decoded.dtype) == (array.shape, codec.dtype)

    @pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
    def test_arrays_of_every_element_type_travel(
        self, codec: WireCodec, dtype: np.dtype[np.generic]
    ) -> None:
        array = gaussian(1000).astype(dtype)
        wide = array.astype(np.float32)
        assert codec.encode(array).tobytes() == codec.encode(wide).tobytes()

    def test_memory_is_taken_where_it_is_given(self, codec: WireCodec) -> None:
        pool = BufferPool(1 << 24)
        array = gaussian(100_000)
        payload = codec.encode(array, pool.take)
        decoded = codec.decode(payload, array.shape, pool.take)
        assert payload.tobytes() == codec.encode(array).tobytes()
        assert decoded.tobytes() == codec.decode(payload, array.shape).tobytes()

    def test_the_array_and_the_payload_are_only_read(self, codec: WireCodec) -> None:
        array = heavy_tailed(1000)
        array.flags.writeable = False
        payload = codec.encode(array)
        payload.flags.writeable = False
        codec.decode(payload, array.shape)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("at", [0, 64, 999])
    def test_what_is_not_finite_is_not_finite_afterwards(
        self, codec: WireCodec, bad: float, at: int
    ) -> None:
        array = gaussian(1000)
        array[at] = bad
        decoded = codec.decode(codec.encode(array), array.shape).astype(np.float32)
        assert not np.isfinite(decoded[at])

    def test_zeros_travel_as_zeros(self, codec: WireCodec) -> None:
        array = np.zeros(1000, np.float32)
        np.testing.assert_array_equal(codec.decode(codec.encode(array), array.shape), array)


@pytest.mark.parametrize("name", FETCH_CODECS)
def test_blocks_of_one_size_travel_as_payloads_of_one_size(name: str) -> None:
    for size in SIZES:
        assert len(fetch_codec(name).sizes(size)) == 1


def test_an_array_of_the_right_type_is_not_copied() -> None:
    array = gaussian(1000)
    payload = push_codec("float32").encode(array)
    assert np.shares_memory(payload, array)
    assert np.shares_memory(push_codec("float32").decode(payload, (1000,)), array)


# No element of a block-wise array is off by more than half a step of its group.
@given(
    npst.arrays(
        np.float32, st.integers(0, 200), elements=st.floats(-(2.0**100), 2.0**100, width=32)
    )
)
def test_int8_is_off_by_half_a_step_at_most(array: NDArray[np.float32]) -> None:
    codec = GroupedInt8()
    decoded = codec.decode(codec.encode(array), array.shape)
    for start in range(0, len(array), GROUP):
        group = array[start : start + GROUP].astype(np.float64)
        error = np.abs(group - decoded[start : start + GROUP].astype(np.float64))
        largest = np.abs(group).max()
        assert error.max() <= largest / 254 * 1.0001 + 2.0**-100


def test_int8_has_a_scale_for_each_group_and_then_the_elements() -> None:
    array = np.arange(-100, 100, dtype=np.float32)
    payload = GroupedInt8().encode(array)
    num_groups = 4
    scales = np.frombuffer(payload[: 4 * num_groups].tobytes(), "<f4")
    integers = np.frombuffer(payload[4 * num_groups :].tobytes(), np.int8)
    largest = [100, 36, 91, 99]
    np.testing.assert_array_equal(scales, np.array(largest, np.float32) / np.float32(127))
    assert len(integers) == 200
    assert (integers[0], integers[100], integers[-1]) == (-127, 0, 127)


def test_sparse_has_positions_and_then_values() -> None:
    array = np.array([0, 3, -5, 0, 1], np.float32)
    payload = Sparse().encode(array).tobytes()
    assert np.frombuffer(payload[:12], "<u4").tolist() == [1, 2, 4]
    assert np.frombuffer(payload[12:], "<f4").tolist() == [3, -5, 1]


@given(
    npst.arrays(np.float32, st.integers(1, 100), elements=st.integers(-3, 3)),
    st.floats(0.01, 1),
)
def test_sparse_keeps_the_largest(array: NDArray[np.float32], share: float) -> None:
    decoded = Sparse(share).decode(Sparse(share).encode(array), array.shape)
    sent = decoded != 0
    np.testing.assert_array_equal(decoded[sent], array[sent])
    assert sent.sum() == min(math.ceil(share * array.size), np.count_nonzero(array))
    if sent.any() and not sent.all():
        assert np.abs(array[sent]).min() >= np.abs(array[~sent]).max()


@pytest.mark.parametrize("positions", [[1, 1], [2, 1], [0, 5], [0, 2**32 - 1]])
def test_sparse_refuses_positions_that_are_none(positions: list[int]) -> None:
    payload = np.concatenate(
        (np.array(positions, np.uint32).view(np.uint8), np.ones(2, np.float32).view(np.uint8))
    )
    with pytest.raises(InvalidArgumentError) as caught:
        Sparse().decode(payload, (5,))
    assert caught.value.reason is Reason.BAD_SHAPE


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_a_share_is_checked(share: float) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Sparse(share)
    assert caught.value.reason is Reason.BAD_CONFIG


@pytest.mark.parametrize("name", ["int4", ""])
def test_an_unknown_encoding_is_refused(name: str) -> None:
    for find in (fetch_codec, push_codec):
        with pytest.raises(InvalidArgumentError, match="travel as float32") as caught:
            find(name)
        assert caught.value.reason is Reason.BAD_DTYPE


def test_blocks_do_not_travel_in_part() -> None:
    with pytest.raises(InvalidArgumentError):
        fetch_codec("sparse")


# What docs/wire.md says of the accuracy of a fetch: root mean square of the errors against that of the
# elements, and the largest error against the largest element.
@pytest.mark.parametrize(
    ("name", "make", "rms", "largest"),
    [
        ("float32", gaussian, 0.0, 0.0),
        ("float32", heavy_tailed, 0.0, 0.0),
        ("bfloat16", gaussian, 0.0018, 1 / 256),
        ("bfloat16", heavy_tailed, 0.0018, 1 / 256),
        ("float16", gaussian, 0.00022, 1 / 2048),
        ("float16", heavy_tailed, 0.00022, 1 / 2048),
        ("int8", gaussian, 0.0061, 1.0001 / 254),
        ("int8", heavy_tailed, 0.012, 1.0001 / 254),
    ],
)
def test_the_accuracy_that_is_stated(
    name: str, make: Callable[[int], NDArray[np.float32]], rms: float, largest: float
) -> None:
    array = make(1 << 20)
    codec = fetch_codec(name)
    wide = array.astype(np.float64)
    error = codec.decode(codec.encode(array), array.shape).astype(np.float64) - wide
    assert np.sqrt(np.mean(error**2) / np.mean(wide**2)) <= rms
    assert np.abs(error).max() / np.abs(wide).max() <= largest


def test_int8_takes_little_more_than_a_quarter() -> None:
    assert GroupedInt8().num_bytes(1 << 20) / (4 << 20) == 0.265625
