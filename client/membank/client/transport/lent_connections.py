"""Blocking connections that calls borrow: those of an event loop with a thread to work in."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Generic, Protocol, TypeVar

from membank.client.inline import NeedsLoopError, is_inline

T = TypeVar("T")


class Lendable(Protocol):
    """A blocking connection; one call at a time, from any thread."""

    def is_usable(self) -> bool:
        """Say, without waiting for anything, whether another call may be made."""

    def abandon(self) -> None:
        """Make a call that another thread is in fail soon; from then on it is not usable."""

    def close(self) -> None:
        """End the connection; no other thread is using it."""


C = TypeVar("C", bound=Lendable)


class LentConnections(Generic[C]):
    """Connections to one endpoint, lent for one call at a time and kept in between.

    Belongs to the event loop that it was made in. Threads in `run_inline` may borrow what is idle.

    Parameters
    ----------
    max_connections
        Most calls at a time, >= 1; further ones wait for their turn.
    thread_name
        Prefix of the names of their threads.
    """

    # `_lock` guards `_num_free`, `_waiting`, `_idle`, `_lent` and what the end is known by.

    def __init__(self, max_connections: int, *, thread_name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(max_connections, thread_name_prefix=thread_name)
        self._lock = threading.Lock()
        self._max_connections = max_connections
        self._num_free = max_connections
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._idle: list[C] = []
        self._lent: set[C] = set()
        self._is_closed = False
        self._is_over = False  # calls under way have had the time that was theirs
        self._is_ended = False  # and none is left; there are no threads any more
        self._has_ended = asyncio.Event()

    async def call(
        self, work: Callable[[C], T], connect: Callable[[], Awaitable[C]], *, ends: float
    ) -> T:
        """Do blocking work on a connection, in a thread, and return what it returns.

        A call that is cancelled abandons its connection and goes on once the work has ended: that
        may write into memory of the caller, which must not be written to later.

        Parameters
        ----------
        work
            What to do.
        connect
            Opens a connection; called where none is idle.
        ends
            Point in time of `time.monotonic` up to which it waits for its turn.

        Raises
        ------
        TimeoutError
            If its turn did not come.
        """
        async with self.lend(connect, ends=ends) as connection:
            return await self.in_thread(lambda: work(connection), on_cancel=connection.abandon)

    @asynccontextmanager
    async def lend(self, connect: Callable[[], Awaitable[C]], *, ends: float) -> AsyncIterator[C]:
        """Lend a connection for as long as the context lasts; arguments and errors as of `call`."""
        if not self._take_turn():
            await self._wait_turn(ends)
        try:
            connection = self._take()
            if connection is None:
                connection = await self._connected(connect)
            try:
                yield connection
            finally:
                self._give_back(connection)
        finally:
            self._end_turn()

    async def open(self, connect: Callable[[], C]) -> C:
        """Connect in a thread; a connection that nobody waits for any more is closed.

        Raises
        ------
        ConnectionAbortedError
            If this was closed.
        """
        if self._is_ended:
            raise ConnectionAbortedError("the connections were closed")
        opening = asyncio.get_running_loop().run_in_executor(self._threads, connect)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unclaimed)
            raise

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Close all connections; calls that still run have `grace_s` seconds to end."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()
        self._end_after_last()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._has_ended.wait()
        with self._lock:
            self._is_over = True
            lent = list(self._lent)
        for connection in lent:
            connection.abandon()

    async def in_thread(self, call: Callable[[], T], *, on_cancel: Callable[[], None]) -> T:
        """Run a blocking call in a thread; a cancellation waits for its end, which `on_cancel` hastens.

        Inline, it runs right here.
        """
        if is_inline():
            return call()
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            # Not left to the future: the thread holds that for a while after it is done, and so
            # would keep the memory of an answer that nobody else has any more.
            try:
                results.append(call())
            except BaseException as err:
                errors.append(err)

        running = asyncio.get_running_loop().run_in_executor(self._threads, run)
        try:
            await asyncio.shield(running)
        except asyncio.CancelledError:
            on_cancel()
            while not running.done():
                with suppress(asyncio.CancelledError):
                    await asyncio.wait([running])
            raise
        if errors:
            raise errors.pop()
        return results.pop()

    def _take_turn(self) -> bool:
        """Take a turn if one is free; nobody is overtaken, as none is while somebody waits."""
        with self._lock:
            is_free = self._num_free > 0
            self._num_free -= is_free
        return is_free

    async def _wait_turn(self, ends: float) -> None:
        if is_inline():
            raise NeedsLoopError
        turn = self._loop.create_future()
        with self._lock:
            if self._num_free:
                self._num_free -= 1
                return
            self._waiting.append(turn)
        try:
            async with asyncio.timeout(ends - time.monotonic()):
                await turn
        except BaseException:
            with self._lock:
                is_waiting = turn in self._waiting
                if is_waiting:
                    self._waiting.remove(turn)
            if not is_waiting:
                self._end_turn()  # it came just as nobody waited for it any more
            raise

    def _end_turn(self) -> None:
        with self._lock:
            turn = self._waiting.popleft() if self._waiting else None
            self._num_free += turn is None
        if turn is not None:
            with suppress(RuntimeError):  # the loop has ended, and with it who waited
                self._loop.call_soon_threadsafe(_come, turn)
        elif self._is_closed:
            self._end_after_last()

    def _end_after_last(self) -> None:
        """Give the threads up, once nobody has a turn: who connects or waits still needs them."""
        with self._lock:
            if self._is_ended or self._num_free < self._max_connections:
                return
            self._is_ended = True
        self._threads.shutdown(wait=False)
        with suppress(RuntimeError):  # nobody waits any more: the loop has ended
            self._loop.call_soon_threadsafe(self._has_ended.set)

    def _take(self) -> C | None:
        while True:
            with self._lock:
                if not self._idle:
                    return None
                connection = self._idle.pop()
                self._lent.add(connection)
            if connection.is_usable():
                return connection
            self._give_back(connection)

    async def _connected(self, connect: Callable[[], Awaitable[C]]) -> C:
        if is_inline():
            raise NeedsLoopError
        connection = await connect()
        with self._lock:
            self._lent.add(connection)
            is_over = self._is_over
        if is_over:
            connection.abandon()
        return connection

    def _give_back(self, connection: C) -> None:
        is_usable = connection.is_usable()
        with self._lock:
            self._lent.discard(connection)
            is_kept = is_usable and not self._is_closed
            if is_kept:
                self._idle.append(connection)
        if not is_kept:
            connection.close()


def _come(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


def _close_unclaimed(opening: asyncio.Future[C]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
