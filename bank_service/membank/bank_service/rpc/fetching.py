"""A fetch, whoever asks for it: over gRPC, over a data connection, or on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.requests import read_fetch
from membank.bank_service.shard.contract import FetchResult, ShardApi
from membank.v1 import block_service_pb2 as pb
from membank.wire import convert
from membank.wire.crc import crc32c
from membank.wire.data_messages import DataCodec
from membank.wire.framing import iter_parts
from membank.wire.http2.pieces import Piece
from membank.wire.records import Block

FETCH_DATA = DataCodec(pb.FetchBlocksResponse)
"""Messages of an answer to a fetch."""

_HEADERS_PER_MESSAGE = 8_192
_SHARED_MESSAGE_BYTES = 64 << 10
"""Payloads of at most so many bytes travel in the message of the last headers; a copy of more would
take longer than another message does."""


@contextmanager
def fetched(
    request: pb.FetchBlocksRequest, shard: ShardApi, budget: ByteBudget
) -> Iterator[FetchResult]:
    """Fetch blocks; their bytes count as in flight for as long as the context lasts.

    Parameters
    ----------
    request
        What to fetch.
    shard
        Who has it.
    budget
        Bound on bytes in flight.

    Raises
    ------
    MembankError
        What `read_fetch`, the budget and the shard raise.
    """
    call = read_fetch(request, shard.spec)
    with budget.reserve(call.expected_bytes, what="fetch") as reservation:
        result = shard.fetch(
            call.refs,
            held_versions=call.held,
            dtype=call.dtype,
            min_revision=call.min_revision,
            snapshot=call.snapshot,
        )
        reservation.resize(sum(block.header.num_bytes for block in result.blocks))
        yield result


def answer_messages(result: FetchResult, *, layers_per_part: int = 0) -> Iterator[list[Piece]]:
    """Yield the serialized messages of an answer, each in pieces; payloads from where they lie.

    Parameters
    ----------
    result
        What was found.
    layers_per_part
        As in the request; 0 = blocks are not cut. The checksums of a part are computed only when
        its turn comes, so that the first one does not wait for those of the others.
    """
    message = pb.FetchBlocksResponse(revision=result.revision)
    for blocks in _rounds(result.blocks, layers_per_part):
        yield from _round_messages(message, blocks)
        message = pb.FetchBlocksResponse()


def _round_messages(
    message: pb.FetchBlocksResponse, blocks: Sequence[Block]
) -> Iterator[list[Piece]]:
    """Yield `message` with the headers of `blocks`, as many more as they need, and the payloads."""
    headers = [convert.header_to_pb(block.header) for block in blocks]
    parts = iter_parts(block.weight for block in blocks if block.weight is not None)
    batches = [
        headers[start : start + _HEADERS_PER_MESSAGE]
        for start in range(0, len(headers), _HEADERS_PER_MESSAGE)
    ] or [[]]
    for batch in batches[:-1]:
        message.headers.extend(batch)
        yield [message.SerializeToString()]
        message = pb.FetchBlocksResponse()
    message.headers.extend(batches[-1])
    if sum(block.header.num_bytes for block in blocks) <= _SHARED_MESSAGE_BYTES:
        # A small fetch is one message.
        message.data = b"".join(next(parts, ()))
    yield [message.SerializeToString()]
    yield from map(FETCH_DATA.pieces, parts)


def _rounds(blocks: Sequence[Block], layers_per_part: int) -> Iterator[Sequence[Block]]:
    """Yield what is sent together: all blocks, or the first part of each, the second, and so on."""
    if not layers_per_part:
        yield blocks
        return
    yield [_part(block, 0, layers_per_part) for block in blocks]
    num_layers = max((len(block.weight) for block in blocks if block.weight is not None), default=0)
    for first in range(layers_per_part, num_layers, layers_per_part):
        yield [
            _part(block, first, layers_per_part)
            for block in blocks
            if block.weight is not None and first < len(block.weight)
        ]


def _part(block: Block, first: int, count: int) -> Block:
    """Return some layers of a block, without a copy; where nothing of it travels, the block."""
    if block.weight is None:
        return block
    layers = block.weight[first : first + count]
    header = replace(
        block.header,
        num_bytes=layers.nbytes,
        crc32c=block.header.crc32c if len(layers) == len(block.weight) else crc32c(layers),
        first_layer=first,
        num_layers=len(layers),
    )
    return Block(header=header, weight=layers)
