"""Fetches that go layer by layer, as a client of any kind sees them: through the generated stub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from membank.bank_service.rpc.fetching import answer_messages
from membank.bank_service.shard.contract import FetchResult
from membank.v1 import block_service_pb2 as pb
from membank.v1 import types_pb2 as types_pb
from membank.wire import convert
from membank.wire.crc import crc32c
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.framing import CHUNK_BYTES
from membank.wire.records import Block, BlockHeader, Gradient, Update
from membank.wire.spec import Array, BlockRef, BlockState
from rpc_rig import RpcRig, error_of
from shard_rig import RIG_SPEC

TOPIC, LEAF = BlockRef(1, 1), BlockRef(2, 2)
NUM_LAYERS = RIG_SPEC.num_layers


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[RpcRig]:
    with RpcRig(tmp_path / "bank") as rig:
        yield rig


def request(*refs: BlockRef, layers_per_part: int, **fields: object) -> pb.FetchBlocksRequest:
    return pb.FetchBlocksRequest(
        refs=map(convert.ref_to_pb, refs),
        layers_per_part=layers_per_part,
        **fields,  # type: ignore[arg-type]
    )


def assembled(
    headers: list[types_pb.BlockHeader], data: bytes
) -> list[tuple[types_pb.BlockHeader, bytes]]:
    """Return each header with its bytes, as docs/wire.md has it."""
    parts = []
    for header in headers:
        parts.append((header, data[: header.num_bytes]))
        data = data[header.num_bytes :]
    assert not data
    return parts


def fetched(rig: RpcRig, fetch: pb.FetchBlocksRequest) -> list[tuple[types_pb.BlockHeader, bytes]]:
    messages = list(rig.blocks.FetchBlocks(fetch))
    headers = [header for message in messages for header in message.headers]
    return assembled(headers, b"".join(message.data for message in messages))


@pytest.mark.parametrize("layers_per_part", [1, 2, 1 << 31])
def test_parts_come_in_the_order_of_layers(rig: RpcRig, layers_per_part: int) -> None:
    whole = {
        convert.ref_from_pb(header.ref): (header, payload)
        for header, payload in fetched(rig, request(TOPIC, LEAF, layers_per_part=0))
    }
    parts = fetched(rig, request(TOPIC, LEAF, layers_per_part=layers_per_part))
    firsts = range(0, NUM_LAYERS, layers_per_part)
    assert [(convert.ref_from_pb(h.ref), h.first_layer) for h, _ in parts] == [
        (ref, first) for first in firsts for ref in (TOPIC, LEAF)
    ]
    joined: dict[BlockRef, bytes] = {TOPIC: b"", LEAF: b""}
    for header, payload in parts:
        ref = convert.ref_from_pb(header.ref)
        known = whole[ref][0]
        assert header.num_layers == min(layers_per_part, NUM_LAYERS - header.first_layer)
        assert (header.version, header.shape) == (known.version, known.shape)
        assert header.crc32c == crc32c(payload)
        joined[ref] += payload
    assert joined == {ref: payload for ref, (_, payload) in whole.items()}


def test_what_does_not_travel_has_one_header(rig: RpcRig) -> None:
    held = [1, 0]
    parts = fetched(rig, request(TOPIC, LEAF, layers_per_part=1, held_version_plus_one=held))
    unchanged, *others = [header for header, _ in parts]
    assert (unchanged.unchanged, unchanged.num_layers, unchanged.num_bytes) == (True, 0, 0)
    assert [header.first_layer for header in others] == list(range(NUM_LAYERS))


def test_an_encoding_is_not_cut(rig: RpcRig) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        fetched(rig, request(TOPIC, layers_per_part=1, dtype=types_pb.DATA_TYPE_INT8))
    error = error_of(caught.value)
    assert isinstance(error, InvalidArgumentError)
    assert error.reason is Reason.BAD_DTYPE


def test_a_push_in_between_changes_no_part(rig: RpcRig) -> None:
    before = fetched(rig, request(LEAF, layers_per_part=0))[0]
    messages = iter(rig.blocks.FetchBlocks(request(LEAF, layers_per_part=1)))
    first = next(messages)
    gradient = np.ones(RIG_SPEC.block_shape(2), np.float32)
    update = Update(
        request_id="between",
        step=1,
        gradients=(Gradient(ref=LEAF, base_version=0, values=gradient),),
    )
    assert rig.bank.shards["shard-0"].push(update).results[0].version == 1
    rest = list(messages)
    headers = [header for message in (first, *rest) for header in message.headers]
    data = first.data + b"".join(message.data for message in rest)
    assert {header.version for header in headers} == {0}
    assert data == before[1]
    assert fetched(rig, request(LEAF, layers_per_part=1))[0][0].version == 1


def block_of(weight: Array, ref: BlockRef = TOPIC) -> Block:
    header = BlockHeader(
        ref=ref, version=1, shape=weight.shape, num_bytes=weight.nbytes, crc32c=crc32c(weight)
    )
    return Block(header=header, weight=weight)


class TestMessages:
    def test_views_are_sent_and_checksums_made_in_their_turn(self) -> None:
        # A part of 1 MiB, so that payloads have messages of their own.
        weight = np.zeros((3, 1, 1 << 10, 1 << 8), np.float32)
        messages = answer_messages(
            FetchResult(revision=1, blocks=(block_of(weight),)), layers_per_part=1
        )
        (head,) = next(messages)
        first = pb.FetchBlocksResponse.FromString(bytes(head))
        weight[2] = 7
        later = [b"".join(pieces) for pieces in messages]
        parsed = [pb.FetchBlocksResponse.FromString(message) for message in later]
        last = [header for message in parsed for header in message.headers][-1]
        assert [header.first_layer for header in first.headers] == [0]
        assert last.crc32c == crc32c(weight[2])
        assert parsed[-1].data == weight[2].tobytes()

    def test_headers_go_right_before_their_payloads(self) -> None:
        weight = np.ones((2, 3, 1 << 9, 1 << 9), np.float32)
        result = FetchResult(revision=1, blocks=(block_of(weight), block_of(weight + 1, LEAF)))
        messages = [
            pb.FetchBlocksResponse.FromString(b"".join(pieces))
            for pieces in answer_messages(result, layers_per_part=1)
        ]
        num_chunks = 2 * weight[0].nbytes // CHUNK_BYTES
        kinds = [len(message.headers) for message in messages]
        assert kinds == [2, *[0] * num_chunks, 2, *[0] * num_chunks]
        assert [message.revision for message in messages if message.headers] == [1, 0]

    def test_small_parts_are_one_message_each(self) -> None:
        weight = np.ones((4, 3, 2, 8), np.float32)
        withheld = Block(
            header=BlockHeader(ref=LEAF, version=2, state=BlockState.WITHHELD), weight=None
        )
        result = FetchResult(revision=1, blocks=(withheld, block_of(weight)))
        messages = [
            pb.FetchBlocksResponse.FromString(b"".join(pieces))
            for pieces in answer_messages(result, layers_per_part=3)
        ]
        assert [len(message.headers) for message in messages] == [2, 1]
        assert [len(message.data) for message in messages] == [3 * 192, 192]
        assert convert.header_from_pb(messages[0].headers[0]) == replace(
            withheld.header, dtype="float32"
        )

    def test_no_content_is_one_message(self) -> None:
        result = FetchResult(revision=5, blocks=())
        (message,) = answer_messages(result, layers_per_part=1)
        assert pb.FetchBlocksResponse.FromString(b"".join(message)).revision == 5
