"""Hearing of changes for as long as a client lives, however often streams break."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from membank.client.config import RetryConfig
from membank.client.retrying import backoff_s
from membank.client.watching import ShardWatch
from membank.wire.errors import MembankError
from membank.wire.records import BlockEvent

_LOGGER = logging.getLogger(__name__)


class Ear(Protocol):
    """Hears of changes of blocks."""

    @property
    def span(self) -> int | None:
        """Names the stretch of time in which no change is missed; None = some may be, now."""

    def listen(self, hear: Callable[[BlockEvent], None], hear_again: Callable[[], None]) -> None:
        """Call `hear` with every change from now on; without effect where it listens already.

        Where changes may have been missed, `hear_again` is called once none is missed any more.
        """

    async def close(self) -> None:
        """Listen no longer."""


class WatchEar:
    """Listens to the watch streams of all shards; belongs to one event loop.

    A watch that ends for good, such as because too many others watch, is begun again: nobody waits
    for it, and until it is on the service is asked every time.

    Parameters
    ----------
    open_watch
        Makes a watch of all blocks.
    retry
        Waits between two watches.
    """

    def __init__(self, open_watch: Callable[[], ShardWatch], retry: RetryConfig) -> None:
        self._open_watch = open_watch
        self._retry = retry
        self._watch: ShardWatch | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def span(self) -> int | None:
        # docstring inherited
        if self._watch is None:
            return None
        self._watch.follow_news()
        return self._watch.span

    def listen(self, hear: Callable[[BlockEvent], None], hear_again: Callable[[], None]) -> None:
        # docstring inherited
        if self._task is None:
            self._task = asyncio.create_task(self._listen(hear, hear_again))

    async def close(self) -> None:
        # docstring inherited
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _listen(
        self, hear: Callable[[BlockEvent], None], hear_again: Callable[[], None]
    ) -> None:
        num_failures = 0
        while True:
            watch = self._watch = self._open_watch()
            try:
                watch.follow_placement(is_gap=False)
                while True:
                    changes = await watch.next()
                    num_failures = 0
                    if changes.is_gap or not changes.events:  # the watch is on, anew
                        hear_again()
                    for event in changes.events:
                        hear(event)
            except MembankError as err:
                _LOGGER.debug("changes are not heard for now: %s", err)
            finally:
                self._watch = None
                await watch.close()
            num_failures += 1
            await asyncio.sleep(backoff_s(self._retry, num_failures))
