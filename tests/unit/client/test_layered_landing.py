"""Blocks that come in parts: what is put together, and what is no answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from fake_bank import SPEC, FakeBank
from http2_scripts import REFS, answer_messages
from layer_notes import LayerNotes
from membank.client.transport.landing import Landing
from membank.client.transport.layered_landing import LayeredLanding
from membank.client.transport.payloads import FetchedPayloads
from membank.v1 import block_service_pb2 as block_pb
from membank.v1 import types_pb2 as types_pb
from membank.wire import convert
from membank.wire.buffers import BufferPool
from membank.wire.crc import crc32c
from membank.wire.errors import CorruptionError, InvalidArgumentError, Reason
from membank.wire.spec import BlockRef

DEEP = replace(SPEC, num_layers=3)
REF = REFS[0]
Part = tuple[types_pb.BlockHeader, bytes]


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank(spec=DEEP)


def parts_of(bank: FakeBank, ref: BlockRef = REF) -> list[Part]:
    """Return a block layer by layer."""
    (block,) = bank.shard_of(ref).fetch([ref]).blocks
    assert block.weight is not None
    return [
        (
            convert.header_to_pb(
                replace(
                    block.header,
                    num_bytes=layer.nbytes,
                    crc32c=crc32c(layer),
                    first_layer=number,
                    num_layers=1,
                )
            ),
            layer.tobytes(),
        )
        for number, layer in enumerate(block.weight)
    ]


def received(
    parts: list[Part], heard: LayerNotes | None = None, *, max_bytes: int = 1 << 20
) -> FetchedPayloads:
    landing = LayeredLanding(
        BufferPool(0), None, heard or LayerNotes(), max_bytes=max_bytes, where="shard"
    )
    payloads = FetchedPayloads([REF], landing, max_bytes=max_bytes, where="shard")
    for header, payload in parts:
        payloads.take(block_pb.FetchBlocksResponse(revision=4, headers=[header], data=payload))
    return payloads


def test_parts_become_a_block(bank: FakeBank) -> None:
    heard = LayerNotes()
    answer = received(parts_of(bank), heard).finish()
    (block,) = answer.blocks
    (kept,) = bank.shard_of(REF).fetch([REF]).blocks
    assert answer.revision == 4
    # Parts are checked one by one, so that of the whole nothing is known.
    assert block.header == replace(kept.header, crc32c=0)
    np.testing.assert_array_equal(block.weight, kept.weight)
    assert heard.counts(REF) == [1, 2, 3]


def test_a_block_in_one_part_keeps_its_crc(bank: FakeBank) -> None:
    (kept,) = bank.shard_of(REF).fetch([REF]).blocks
    assert kept.weight is not None
    header = convert.header_to_pb(replace(kept.header, num_layers=3))
    (block,) = received([(header, kept.weight.tobytes())]).finish().blocks
    assert block.header == kept.header


def test_a_service_that_cuts_nothing_is_understood(bank: FakeBank) -> None:
    heard = LayerNotes()
    landing = LayeredLanding(BufferPool(0), None, heard, max_bytes=1 << 20, where="shard")
    payloads = FetchedPayloads(REFS, landing, max_bytes=1 << 20, where="shard")
    for message in answer_messages(bank, REFS):
        payloads.take(message)
    answer = payloads.finish()
    assert [block.ref for block in answer.blocks] == list(REFS)
    for block in answer.blocks:
        np.testing.assert_array_equal(block.weight, bank.held(block.ref).weight)
        assert heard.counts(block.ref) == [3]


def _first_changed(**fields: object) -> Callable[[list[Part]], list[Part]]:
    """Return what changes a field of the second header."""

    def change(parts: list[Part]) -> list[Part]:
        for name, value in fields.items():
            setattr(parts[1][0], name, value)
        return parts

    return change


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda parts: parts[1:], id="begins late"),
        pytest.param(lambda parts: [parts[0], parts[2]], id="a gap"),
        pytest.param(lambda parts: [parts[0], parts[0]], id="twice the same"),
        pytest.param(lambda parts: parts[::-1], id="backwards"),
        pytest.param(lambda parts: parts[:2], id="one too few"),
        pytest.param(lambda parts: [*parts, parts[2]], id="one too many"),
        pytest.param(_first_changed(version=9), id="of another version"),
        pytest.param(_first_changed(num_layers=2), id="more layers than bytes"),
        pytest.param(_first_changed(num_layers=0), id="whole after a part"),
        pytest.param(_first_changed(crc32c=1), id="damaged"),
        pytest.param(_first_changed(dtype=types_pb.DATA_TYPE_INT8), id="not cut by layers"),
        pytest.param(lambda parts: [], id="nothing"),
    ],
)
def test_what_is_no_answer_is_damage(
    bank: FakeBank, spoil: Callable[[list[Part]], list[Part]]
) -> None:
    with pytest.raises(CorruptionError):
        received(spoil(parts_of(bank))).finish()


def test_a_part_without_a_shape(bank: FakeBank) -> None:
    parts = parts_of(bank)
    del parts[0][0].shape[:]
    with pytest.raises(CorruptionError):
        received(parts)


def test_memory_is_taken_for_no_more_than_the_bound(bank: FakeBank) -> None:
    ((header, payload), *_) = parts_of(bank)
    header.shape[0] = 1 << 40 >> 12  # of which one layer comes
    with pytest.raises(InvalidArgumentError) as caught:
        received([(header, payload)])
    assert caught.value.reason is Reason.MESSAGE_TOO_LARGE


def test_parts_that_nobody_asked_for(bank: FakeBank) -> None:
    payloads = FetchedPayloads([REF], Landing(BufferPool(0)), max_bytes=1 << 20, where="shard")
    header, payload = parts_of(bank)[0]
    with pytest.raises(CorruptionError, match="nobody asked for"):
        payloads.take(block_pb.FetchBlocksResponse(headers=[header], data=payload))
