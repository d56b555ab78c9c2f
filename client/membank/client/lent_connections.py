"""Blocking connections that calls of an event loop borrow, each with a thread to work in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Generic, Protocol, TypeVar

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

    Belongs to the event loop that it was made in.

    Parameters
    ----------
    max_connections
        Most calls at a time, >= 1; further ones wait for their turn.
    thread_name
        Prefix of the names of their threads.
    """

    def __init__(self, max_connections: int, *, thread_name: str) -> None:
        self._free = asyncio.Semaphore(max_connections)
        self._threads = ThreadPoolExecutor(max_connections, thread_name_prefix=thread_name)
        self._idle: list[C] = []
        self._lent: set[C] = set()
        self._none_lent = asyncio.Event()
        self._none_lent.set()
        self._is_closed = False

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
        async with asyncio.timeout(ends - time.monotonic()):
            await self._free.acquire()
        try:
            connection = self._take() or await connect()
            self._lent.add(connection)
            self._none_lent.clear()
            try:
                yield connection
            finally:
                self._give_back(connection)
        finally:
            self._free.release()

    async def open(self, connect: Callable[[], C]) -> C:
        """Connect in a thread; a connection that nobody waits for any more is closed."""
        opening = asyncio.get_running_loop().run_in_executor(self._threads, connect)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_unclaimed)
            raise

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Close all connections; calls that still run have `grace_s` seconds to end."""
        self._is_closed = True
        while self._idle:
            self._idle.pop().close()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._none_lent.wait()
        for connection in self._lent:
            connection.abandon()
        self._threads.shutdown(wait=False)

    async def in_thread(self, call: Callable[[], T], *, on_cancel: Callable[[], None]) -> T:
        """Run a blocking call in a thread; a cancellation waits for its end, which `on_cancel` hastens."""
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

    def _take(self) -> C | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable():
                return connection
            connection.close()
        return None

    def _give_back(self, connection: C) -> None:
        self._lent.discard(connection)
        if not self._lent:
            self._none_lent.set()
        if connection.is_usable() and not self._is_closed:
            self._idle.append(connection)
        else:
            connection.close()


def _close_unclaimed(opening: asyncio.Future[C]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
