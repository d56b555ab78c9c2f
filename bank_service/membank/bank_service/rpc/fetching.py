"""A fetch, whoever asks for it: over gRPC, over a data connection, or on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.requests import read_fetch
from membank.bank_service.shard.contract import FetchResult, ShardApi
from membank.v1 import block_service_pb2 as pb
from membank.wire import convert
from membank.wire.data_messages import DataCodec
from membank.wire.framing import iter_parts
from membank.wire.http2.pieces import Piece

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


def answer_messages(result: FetchResult) -> Iterator[list[Piece]]:
    """Yield the serialized messages of an answer, each in pieces; payloads from where they lie."""
    headers = [convert.header_to_pb(block.header) for block in result.blocks]
    parts = iter_parts(block.weight for block in result.blocks if block.weight is not None)
    batches = [
        headers[start : start + _HEADERS_PER_MESSAGE]
        for start in range(0, len(headers), _HEADERS_PER_MESSAGE)
    ] or [[]]
    message = pb.FetchBlocksResponse(revision=result.revision)
    for batch in batches[:-1]:
        message.headers.extend(batch)
        yield [message.SerializeToString()]
        message = pb.FetchBlocksResponse()
    message.headers.extend(batches[-1])
    if sum(block.header.num_bytes for block in result.blocks) <= _SHARED_MESSAGE_BYTES:
        # A small fetch is one message.
        message.data = b"".join(next(parts, ()))
    yield [message.SerializeToString()]
    yield from map(FETCH_DATA.pieces, parts)
