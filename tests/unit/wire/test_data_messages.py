"""The hand-made messages of payload streams are those of the generated code, both ways."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from membank.v1 import block_service_pb2 as pb
from membank.v1 import types_pb2
from membank.wire.data_messages import DataCodec, data_of

FETCH = DataCodec(pb.FetchBlocksResponse)
PUSH = DataCodec(pb.PushUpdatesRequest)
# Field 15 is known to neither message; in front of the data, between them, behind them.
UNKNOWN = b"\x7a\x03abc"
DATA = st.binary(max_size=300)


@given(st.lists(DATA, max_size=4))
@example([b"\x80" * 20_000])
def test_what_is_written_is_what_the_generated_code_reads(parts: list[bytes]) -> None:
    views = [memoryview(part) for part in parts]
    assert pb.FetchBlocksResponse.FromString(FETCH.encode(views)) == pb.FetchBlocksResponse(
        data=b"".join(parts)
    )
    assert pb.PushUpdatesRequest.FromString(PUSH.encode(views)) == pb.PushUpdatesRequest(
        data=b"".join(parts)
    )


@given(DATA.filter(bool))
@example(b"x" * (1 << 20))
def test_data_alone_is_written_as_the_generated_code_writes_it(data: bytes) -> None:
    encoded = FETCH.encode([memoryview(data)])
    assert encoded == pb.FetchBlocksResponse(data=data).SerializeToString()
    read = FETCH.deserialize(encoded)
    assert isinstance(read, memoryview)
    assert read.obj is encoded
    assert bytes(read) == data


@given(
    st.integers(0, (1 << 64) - 1),
    st.lists(st.integers(0, (1 << 32) - 1), max_size=3),
    DATA,
)
def test_whatever_the_generated_code_writes_is_read(
    revision: int, crcs: list[int], data: bytes
) -> None:
    message = pb.FetchBlocksResponse(
        revision=revision, headers=[types_pb2.BlockHeader(crc32c=crc) for crc in crcs], data=data
    )
    read = FETCH.deserialize(FETCH.serialize(message))
    assert bytes(data_of(read)) == data
    assert isinstance(read, memoryview) == (not revision and not crcs and bool(data))
    if not isinstance(read, memoryview):
        assert read == message


@given(st.permutations([b"\x08\x07", b"\x1a\x02hi", UNKNOWN, b"\x12\x00"]), DATA.filter(bool))
def test_fields_in_any_order_and_unknown_ones_are_read(fields: list[bytes], data: bytes) -> None:
    for encoded in (b"".join(fields), b"".join(fields) + FETCH.encode([memoryview(data)])):
        read = FETCH.deserialize(encoded)
        assert not isinstance(read, memoryview)
        assert read == pb.FetchBlocksResponse.FromString(encoded)
        assert read.revision == 7


@pytest.mark.parametrize(
    "encoded",
    [
        b"\x1a\x02hi\x1a\x05there",  # the later of two counts
        b"\x1a\x00",
        b"",
        b"\x1a\x82\x00hi",  # a length with a byte that says nothing
        UNKNOWN,
    ],
)
def test_rare_encodings_mean_what_they_mean_to_the_generated_code(encoded: bytes) -> None:
    expected = pb.FetchBlocksResponse.FromString(encoded).data
    assert bytes(data_of(FETCH.deserialize(encoded))) == expected


@given(st.binary(max_size=40))
@example(b"\x1a")
@example(b"\x1a\x05hi")
@example(b"\x1a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
def test_garbage_is_refused_or_means_what_it_means_to_the_generated_code(encoded: bytes) -> None:
    try:
        expected = pb.FetchBlocksResponse.FromString(encoded)
    except DecodeError:
        with pytest.raises(DecodeError):
            FETCH.deserialize(encoded)
        return
    assert bytes(data_of(FETCH.deserialize(encoded))) == expected.data


def test_messages_with_more_than_data_go_through_the_generated_code() -> None:
    head = pb.PushUpdatesRequest(request_id="r", step=3)
    assert PUSH.deserialize(PUSH.serialize(head)) == head


@pytest.mark.parametrize("step", [-1, 0, 1])
@pytest.mark.parametrize("power", [0, 1, 7, 14, 20, 21])
def test_the_head_of_data_alone_has_no_byte_of_them(power: int, step: int) -> None:
    num_bytes = max(1, (1 << power) + step)
    encoded = pb.FetchBlocksResponse(data=bytes(num_bytes)).SerializeToString()
    head_bytes = FETCH.head_bytes(len(encoded))
    assert len(encoded) - head_bytes == num_bytes
    assert FETCH.data_start(encoded[:head_bytes], len(encoded)) == head_bytes


def test_no_head_is_longer_than_its_message() -> None:
    # Not of every size is there a message that has data alone.
    for num_bytes in range(200):
        assert 0 <= FETCH.head_bytes(num_bytes) <= num_bytes
