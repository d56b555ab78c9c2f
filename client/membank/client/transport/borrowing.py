"""Looking at blocks where shards on this machine keep them, without a copy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from membank.client.deadline import Deadline
from membank.client.memory import FetchedBlocks
from membank.client.shards import ShardMap
from membank.client.transport.same_host import NoWayError, SameHostTransport
from membank.wire.records import Block
from membank.wire.spec import BankSpec, BlockRef


@asynccontextmanager
async def borrowed_blocks(
    shards: ShardMap,
    spec: BankSpec,
    refs: Sequence[BlockRef],
    *,
    dtype: str,
    min_revision: int,
    deadline: Deadline,
) -> AsyncIterator[FetchedBlocks]:
    """Lend the blocks `refs`, all of one revision, as long as the context lasts.

    Raises
    ------
    NoWayError
        If they can only be fetched: a shard is elsewhere, or shards answer from different
        revisions, one of which would have to be asked again.
    UnavailableError
        If a shard does not answer; at the end, if one took its memory back before.
    """
    blocks: dict[BlockRef, Block] = {}
    revisions = {min_revision}
    async with AsyncExitStack() as leases:
        for endpoint, part in shards.group(refs, spec).items():
            transport = shards.transport(endpoint)
            if not isinstance(transport, SameHostTransport):
                raise NoWayError("not offered")
            answer = await leases.enter_async_context(
                transport.borrow(
                    part,
                    dtype=dtype,
                    min_revision=min_revision,
                    timeout_s=deadline.remaining_s("borrow"),
                )
            )
            revisions.add(answer.revision)
            blocks |= zip(part, answer.blocks, strict=True)
        if len(revisions - {min_revision}) > 1:
            raise NoWayError("revisions differ")
        yield FetchedBlocks(max(revisions), (blocks[ref] for ref in refs))
