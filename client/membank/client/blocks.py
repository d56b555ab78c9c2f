"""The blocks of a whole bank: fetches and pushes over all of its shards.

`BlockSource` is the seam where a cache, an opened snapshot or a prefetcher takes its place.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from typing import Any, Protocol

from membank.client.config import ClientConfig
from membank.client.deadline import Deadline
from membank.client.inline import NeedsLoopError, is_inline
from membank.client.memory import FetchedBlocks
from membank.client.removals import HeardRemovals
from membank.client.retrying import call_with_retries, is_retryable
from membank.client.shards import ShardMap
from membank.client.transport.contract import PushAnswer
from membank.wire.codec import fetch_codec
from membank.wire.errors import (
    ConflictError,
    InternalError,
    MembankError,
    Reason,
    UnavailableError,
)
from membank.wire.records import Block, Update, UpdateResult
from membank.wire.spec import Array, BankSpec, BlockRef

MAX_REFS = 65_536
"""Most blocks that one request may name."""


class BlockSource(Protocol):
    """Where the blocks of a bank come from and updates go."""

    async def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held: Mapping[BlockRef, Block],
        dtype: str,
        min_revision: int,
        snapshot: str,
        into: Mapping[BlockRef, Array] | None = None,
        deadline: Deadline,
    ) -> FetchedBlocks:
        """Return the blocks `refs` (no block twice), all of one revision, at least `min_revision`.

        With `snapshot` not empty, as that pins them. A block in `held` whose version is the one
        asked for is returned as it is. Content may land `into` memory that nobody else refers to;
        who keeps what it fetched uses its own.
        """

    async def push(self, update: Update, *, deadline: Deadline) -> PushAnswer:
        """Apply an update once; its results are in the order of its gradients."""


@dataclass(frozen=True, slots=True)
class _Fetched:
    revision: int
    block: Block


class ShardedBlocks:
    """Fetches from and pushes to the shards of a service, several at a time.

    Parameters
    ----------
    shards
        Where the shards are.
    spec
        Spec of the bank.
    config
        Retries and bounds.
    """

    def __init__(self, shards: ShardMap, spec: BankSpec, config: ClientConfig) -> None:
        self._shards = shards
        self._spec = spec
        self._config = config
        self.removals = HeardRemovals()
        """Wipes idle memory of what was deleted; told of what others hear, too."""

    async def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held: Mapping[BlockRef, Block],
        dtype: str,
        min_revision: int,
        snapshot: str,
        into: Mapping[BlockRef, Array] | None = None,
        deadline: Deadline,
    ) -> FetchedBlocks:
        """Return the blocks `refs`, all of one revision.

        Shards answer at the revision that each has installed. Those behind the newest one are
        asked again for that revision, holding what they have sent already. A snapshot has the
        same revision everywhere.

        Raises
        ------
        UnavailableError
            If shards do not answer, or do not agree on a revision, within the budget.
        NotFoundError
            If there is no such snapshot.
        ConflictError
            If the name came to mean another snapshot while it was read.
        """
        if snapshot:
            return await self._fetch_pinned(
                refs,
                held=held,
                dtype=dtype,
                min_revision=min_revision,
                snapshot=snapshot,
                into=into,
                deadline=deadline,
            )
        fetched: dict[BlockRef, _Fetched] = {}
        revision = min_revision
        # + 1: the first round is the fetch itself.
        for _ in range(self._config.max_revision_rounds + 1):
            behind = [ref for ref in refs if ref not in fetched or fetched[ref].revision < revision]
            if not behind:
                return FetchedBlocks(revision, (fetched[ref].block for ref in refs))
            sent = {ref: item.block for ref, item in fetched.items()}
            fetched |= await self._fetch_round(
                behind,
                held={**held, **sent},
                dtype=dtype,
                min_revision=revision,
                # What landed there is held from now on, and must not change under who holds it.
                into=None if sent else into,
                deadline=deadline,
            )
            revision = max(item.revision for item in fetched.values())
        raise UnavailableError(
            f"bank {self._spec.name}: its shards did not agree on a revision in "
            f"{self._config.max_revision_rounds} rounds; it is being changed all the time",
            reason=Reason.BEHIND_REVISION,
        )

    async def _fetch_pinned(
        self,
        refs: Sequence[BlockRef],
        *,
        held: Mapping[BlockRef, Block],
        dtype: str,
        min_revision: int,
        snapshot: str,
        into: Mapping[BlockRef, Array] | None,
        deadline: Deadline,
    ) -> FetchedBlocks:
        fetched = await self._fetch_round(
            refs,
            held=held,
            dtype=dtype,
            min_revision=min_revision,
            snapshot=snapshot,
            into=into,
            deadline=deadline,
        )
        revisions = sorted({item.revision for item in fetched.values()})
        if len(revisions) > 1:
            raise ConflictError(
                f"snapshot {snapshot!r} was replaced while it was read: shards answered with its "
                f"revisions {revisions[0]} and {revisions[-1]}; read it again",
                reason=Reason.UNKNOWN_SNAPSHOT,
                metadata={"snapshot": snapshot},
            )
        return FetchedBlocks(max(revisions, default=0), (fetched[ref].block for ref in refs))

    async def push(self, update: Update, *, deadline: Deadline) -> PushAnswer:
        """Apply an update: each shard gets its gradients under the same request id.

        Raises
        ------
        UnavailableError, DeadlineError
            If a shard does not answer; its part, and no other, may or may not have been applied.
        """
        gradients = {gradient.ref: gradient for gradient in update.gradients}
        results: dict[BlockRef, UpdateResult] = {}
        duplicate = False

        async def attempt(timeout_s: float) -> None:
            nonlocal duplicate
            pending = [ref for ref in gradients if ref not in results]
            groups = self._shards.group(pending, self._spec)

            async def push_part(endpoint: str, part: list[BlockRef]) -> None:
                nonlocal duplicate
                answer = await self._shards.transport(endpoint).push(
                    replace(update, gradients=tuple(gradients[ref] for ref in part)),
                    timeout_s=timeout_s,
                )
                _check_order(endpoint, part, [result.ref for result in answer.results])
                self.removals.hear_results(answer.results)
                results.update(zip(part, answer.results, strict=True))
                duplicate |= answer.duplicate

            await _all(push_part(endpoint, part) for endpoint, part in groups.items())

        await self.with_retries(attempt, what=f"push {update.request_id}", deadline=deadline)
        return PushAnswer(results=tuple(results[ref] for ref in gradients), duplicate=duplicate)

    async def _fetch_round(
        self,
        refs: Sequence[BlockRef],
        *,
        held: Mapping[BlockRef, Block],
        dtype: str,
        min_revision: int,
        snapshot: str = "",
        into: Mapping[BlockRef, Array] | None = None,
        deadline: Deadline,
    ) -> dict[BlockRef, _Fetched]:
        """Fetch each of `refs` once, from whichever revisions its shards have."""
        usable = {
            ref: block
            for ref, block in held.items()
            if block.weight is not None and block.header.dtype == dtype
        }
        fetched: dict[BlockRef, _Fetched] = {}

        async def fetch_part(endpoint: str, part: list[BlockRef], timeout_s: float) -> None:
            answer = await self._shards.transport(endpoint).fetch(
                part,
                held_versions=[usable[ref].version if ref in usable else None for ref in part],
                dtype=dtype,
                min_revision=min_revision,
                snapshot=snapshot,
                into=into,
                timeout_s=timeout_s,
            )
            _check_order(endpoint, part, [block.ref for block in answer.blocks])
            self.removals.hear_answer(block.header for block in answer.blocks)
            for block in answer.blocks:
                kept = usable[block.ref] if block.header.unchanged else block
                if _is_another(kept, block):
                    del usable[block.ref]  # and so the next attempt asks for the content
                else:
                    fetched[block.ref] = _Fetched(answer.revision, kept)

        async def attempt(timeout_s: float) -> None:
            pending = [ref for ref in refs if ref not in fetched]
            groups = self._shards.group(pending, self._spec)
            await _all(
                fetch_part(endpoint, part, timeout_s)
                for endpoint, group in groups.items()
                for part in self.parts(group, dtype)
            )

        while len(fetched) < len(refs):
            what = f"fetch of {len(refs)} blocks"
            await self.with_retries(attempt, what=what, deadline=deadline)
        return fetched

    def parts(self, refs: Sequence[BlockRef], dtype: str) -> Iterator[list[BlockRef]]:
        """Cut what one shard is asked for into requests of a bounded size."""
        codec = fetch_codec(dtype)
        part: list[BlockRef] = []
        part_bytes = 0
        for ref in refs:
            num_bytes = codec.num_bytes(self._spec.block_params(ref.level))
            is_full = part_bytes + num_bytes > self._config.max_request_bytes
            if part and (is_full or len(part) == MAX_REFS):
                yield part
                part, part_bytes = [], 0
            part.append(ref)
            part_bytes += num_bytes
        if part:
            yield part

    async def with_retries(
        self, attempt: Callable[[float], Awaitable[None]], *, what: str, deadline: Deadline
    ) -> None:
        """Make attempts as `call_with_retries` does, and learn in between where shards are."""
        seen = self._shards.num_refreshes

        async def once(timeout_s: float) -> None:
            nonlocal seen
            seen = self._shards.num_refreshes
            await attempt(timeout_s)

        async def recover(error: MembankError) -> None:
            await self._shards.recover(error, timeout_s=deadline.remaining_s(what), seen=seen)

        await call_with_retries(
            once, what=what, deadline=deadline, config=self._config.retry, recover=recover
        )


def _is_another(held: Block, answered: Block) -> bool:
    """Say whether a block that is called unchanged has other content than the one that is held.

    A bank that lost a machine may count versions again.
    """
    known, right = held.header.crc32c, answered.header.crc32c
    return known != 0 and right != 0 and known != right


async def _all(calls: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all to their end, then raise what matters most: an answer before a missing one."""
    coroutines = list(calls)
    if len(coroutines) == 1:
        await coroutines[0]
        return
    if is_inline():
        for coroutine in coroutines:
            coroutine.close()
        raise NeedsLoopError  # to run them at the same time
    outcomes = await asyncio.gather(*coroutines, return_exceptions=True)
    failures = [outcome for outcome in outcomes if outcome is not None]
    if failures:
        # Retrying is pointless where one part was refused for good.
        raise min(failures, key=is_retryable)


def _check_order(endpoint: str, asked: Sequence[BlockRef], answered: Sequence[BlockRef]) -> None:
    if list(asked) != list(answered):
        raise InternalError(
            f"{endpoint} answered for other blocks than were asked for; please report this",
            metadata={"endpoint": endpoint},
        )
