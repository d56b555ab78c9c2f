"""The changes of all shards as one stream."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from membank.client.config import ClientConfig
from membank.client.retrying import backoff_s, is_retryable
from membank.client.shards import ShardMap
from membank.client.transport.contract import WatchAnswer
from membank.wire.errors import MembankError, UnavailableError
from membank.wire.records import BlockEvent
from membank.wire.spec import BankSpec, BlockRef

_MAX_QUEUED = 64
"""Answers of shards that wait for the watcher; then the shards wait, and drop in the end."""

_spans = itertools.count(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """Changes of blocks of one shard."""

    events: tuple[BlockEvent, ...] = ()
    """The changes in the order in which they took effect."""
    is_gap: bool = False
    """True where changes before these may be missing; what is held must be fetched again."""


async def watch_shards(
    shards: ShardMap,
    spec: BankSpec,
    refs: Sequence[BlockRef],
    *,
    admin_only: bool,
    config: ClientConfig,
) -> AsyncGenerator[Changes]:
    """Yield the changes of `refs` (empty = all blocks) until closed; see `AsyncBankClient.watch`.

    Parameters
    ----------
    shards
        Where the shards are.
    spec
        Spec of the bank.
    refs
        The blocks.
    admin_only
        True leaves out changes by gradient updates.
    config
        Retries and deadlines.
    """
    watch = ShardWatch(shards, spec, refs, admin_only=admin_only, config=config)
    try:
        watch.follow_placement(is_gap=False)
        while True:
            yield await watch.next()
    finally:
        await watch.close()


class ShardWatch:
    """One task per shard, which feed one queue.

    Parameters
    ----------
    shards
        Where the shards are.
    spec
        Spec of the bank.
    refs
        The blocks; empty = all.
    admin_only
        True leaves out changes by gradient updates.
    config
        Retries and deadlines.
    """

    def __init__(
        self,
        shards: ShardMap,
        spec: BankSpec,
        refs: Sequence[BlockRef],
        *,
        admin_only: bool,
        config: ClientConfig,
    ) -> None:
        self._queue: asyncio.Queue[Changes | MembankError] = asyncio.Queue(_MAX_QUEUED)
        self._shards = shards
        self._spec = spec
        self._refs = refs
        self._admin_only = admin_only
        self._config = config
        self._parts: Mapping[str, Sequence[BlockRef]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ended: list[asyncio.Task[None]] = []
        self._not_on_yet: set[str] = set()
        self._is_on = False
        # Shards that are to be heard and are not, and the name of the time in which all were.
        self._silent: set[str] = set()
        self._span = next(_spans)

    @property
    def span(self) -> int | None:
        """Names the stretch of time in which no change is missed; None = some may be, now.

        It ends as soon as a stream breaks or drops a change, while `next` tells of a gap once it is
        mended and has come to its turn.
        """
        return None if self._silent or not self._parts else self._span

    def follow_news(self) -> None:
        """Watch the shards of a placement that somebody else has learnt."""
        if not self._refs and self._shards.endpoints() != set(self._parts):
            self.follow_placement(is_gap=True)

    async def next(self) -> Changes:
        """Return the next changes; errors as for `AsyncBankClient.watch`."""
        item = await self._queue.get()
        if isinstance(item, MembankError):
            raise item
        return item

    def follow_placement(self, *, is_gap: bool) -> None:
        """Watch the shards that serve the blocks now, and no others."""
        parts = self._group()
        if not self._is_on:
            self._not_on_yet = (self._not_on_yet & set(parts)) | (set(parts) - set(self._parts))
        self._silent &= set(parts)
        for endpoint, part in parts.items():
            if self._parts.get(endpoint) != part:
                self._end(endpoint)
                self._miss(endpoint)
                task = asyncio.create_task(self._follow(endpoint, part, is_gap=is_gap))
                self._tasks[endpoint] = task
        for endpoint in set(self._tasks) - set(parts):
            self._end(endpoint)
        self._parts = parts

    async def close(self) -> None:
        """End all tasks."""
        for endpoint in list(self._tasks):
            self._end(endpoint)
        await asyncio.gather(*self._ended, return_exceptions=True)

    def _group(self) -> Mapping[str, Sequence[BlockRef]]:
        if self._refs:
            return self._shards.group(self._refs, self._spec)
        return dict.fromkeys(self._shards.endpoints(), ())

    def _end(self, endpoint: str) -> None:
        task = self._tasks.pop(endpoint, None)
        if task is not None:
            if task is not asyncio.current_task():
                task.cancel()
            self._ended = [*(ended for ended in self._ended if not ended.done()), task]

    async def _follow(self, endpoint: str, part: Sequence[BlockRef], *, is_gap: bool) -> None:
        """Pass on the changes of one shard for as long as it serves `part`."""
        num_failures = 0
        while True:
            error: MembankError = UnavailableError(f"{endpoint} ended the watch")
            try:
                answers = self._shards.transport(endpoint).watch(part, admin_only=self._admin_only)
                async with aclosing(answers):
                    async for answer in answers:
                        num_failures = 0
                        self._note(endpoint, answer)
                        await self._say_on(endpoint, is_gap=is_gap)
                        is_gap = False
                        if self._is_on and (answer.events or answer.num_dropped):
                            item = Changes(events=answer.events, is_gap=answer.num_dropped > 0)
                            await self._queue.put(item)
            except MembankError as err:
                error = err
            if asyncio.current_task() is self._tasks.get(endpoint):
                self._miss(endpoint)
            num_failures += 1
            if not is_retryable(error) or num_failures >= self._config.retry.max_attempts:
                await self._queue.put(error)
                return
            await asyncio.sleep(backoff_s(self._config.retry, num_failures))
            is_gap = True
            await self._find_shards_again(error)
            if asyncio.current_task() is not self._tasks.get(endpoint):
                return

    def _note(self, endpoint: str, answer: WatchAnswer) -> None:
        """Begin a new span where changes before this answer were missed."""
        if endpoint in self._silent or answer.num_dropped:
            self._silent.discard(endpoint)
            self._span = next(_spans)

    def _miss(self, endpoint: str) -> None:
        """End the span: changes at `endpoint` are not heard for now."""
        self._silent.add(endpoint)
        self._span = next(_spans)

    async def _say_on(self, endpoint: str, *, is_gap: bool) -> None:
        if self._is_on:
            if is_gap:
                await self._queue.put(Changes(is_gap=True))
            return
        self._not_on_yet.discard(endpoint)
        if not self._not_on_yet:
            self._is_on = True
            await self._queue.put(Changes())

    async def _find_shards_again(self, error: MembankError) -> None:
        seen = self._shards.num_refreshes
        try:
            await self._shards.recover(error, timeout_s=self._config.timeout_s, seen=seen)
            self.follow_placement(is_gap=True)
        except UnavailableError:
            # Some partition has no shard now; its watch goes on trying.
            return
        except MembankError as err:
            await self._queue.put(err)
