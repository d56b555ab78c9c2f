"""Looking at blocks where shards on this machine keep them, without a copy."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from membank.client.admin.calls import GatewayCalls
from membank.client.deadline import Deadline
from membank.client.memory import FetchedBlocks
from membank.client.shards import ShardMap
from membank.client.transport.same_host import NoWayError, SameHostTransport
from membank.wire.errors import UnavailableError
from membank.wire.records import Block
from membank.wire.spec import Array, BankSpec, BlockRef


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


class BorrowCalls(GatewayCalls):
    """The part of `AsyncBankClient` that lends blocks."""

    @abstractmethod
    async def fetch_blocks(
        self,
        refs: Iterable[BlockRef],
        *,
        dtype: str | None = None,
        held: Mapping[BlockRef, Block] | None = None,
        into: Mapping[BlockRef, Array] | None = None,
        snapshot: str | None = None,
        timeout_s: float | None = None,
    ) -> FetchedBlocks:
        """Fetch blocks whole."""

    @asynccontextmanager
    async def borrow(
        self, refs: Iterable[BlockRef], *, timeout_s: float | None = None
    ) -> AsyncIterator[FetchedBlocks]:
        """Look at blocks where the shard keeps them, without a copy, as long as the context lasts.

        Blocks of shards on this machine are read-only views of the shard's memory, whose bytes have
        been checked. Do not use them after the context has ended, nor in it for longer than the
        lease of the shard, 30 s: the shard then uses the memory for something else. Blocks of other
        shards are fetched.

        Parameters
        ----------
        refs
            The blocks.
        timeout_s
            Deadline of getting them.

        Yields
        ------
        FetchedBlocks
            As `fetch_blocks` returns them, of one revision, in the element type of the bank; the
            client's cache and `ClientConfig.snapshot` have no part in it.

        Raises
        ------
        UnavailableError
            At the end, if the shard had taken the memory back: what was read may be anything.
        """
        deadline = self._session.deadline(timeout_s)
        spec = await self._session.spec(deadline)
        wanted = list(dict.fromkeys(BlockRef(*ref) for ref in refs))
        for ref in wanted:
            spec.check_ref(ref)
        async with AsyncExitStack() as lease:
            try:
                blocks = await lease.enter_async_context(
                    borrowed_blocks(
                        self._session.shards,
                        spec,
                        wanted,
                        dtype=spec.dtype,
                        min_revision=self._session.revision,
                        deadline=deadline,
                    )
                )
                self._session.note_revision(blocks.revision)
            except (NoWayError, UnavailableError):
                # With its retries, a fetch also finds shards that have moved.
                blocks = await self.fetch_blocks(
                    wanted, snapshot="", timeout_s=deadline.remaining_s("borrow")
                )
            yield blocks
