"""Connections are lent to calls of a loop and to threads of callers, never to two at a time."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from membank.client.inline import NeedsLoopError, run_inline
from membank.client.transport.lent_connections import LentConnections


class Connection:
    """A connection that knows who uses it; usable until it is abandoned or closed."""

    num_open = 0

    def __init__(self) -> None:
        self._users = threading.Semaphore(1)
        self._is_usable = True
        Connection.num_open += 1

    def work(self, do: Callable[[], None] = lambda: None) -> "Connection":
        """Do something that nobody else may do at the same time."""
        assert self._users.acquire(blocking=False)
        try:
            do()
            return self
        finally:
            self._users.release()

    def is_usable(self) -> bool:
        """Say whether another call may be made."""
        return self._is_usable

    def abandon(self) -> None:
        """Let nobody use it any more."""
        self._is_usable = False

    def close(self) -> None:
        """End it."""
        self._is_usable = False
        Connection.num_open -= 1


@pytest.fixture(autouse=True)
def _all_closed() -> Iterator[None]:
    Connection.num_open = 0
    yield
    assert Connection.num_open == 0


async def connected() -> Connection:
    """Open a connection."""
    return Connection()


def pause(entered: threading.Event, leave: threading.Event) -> None:
    """Say that this thread is here, and wait until it may go on."""
    entered.set()
    assert leave.wait(10)


def soon(seconds: float = 5.0) -> float:
    """Return a point in time."""
    return time.monotonic() + seconds


async def test_a_thread_borrows_what_is_idle() -> None:
    lent: LentConnections[Connection] = LentConnections(2, thread_name="test")
    first = await lent.call(Connection.work, connected, ends=soon())
    second = await asyncio.to_thread(run_inline, lent.call(Connection.work, connected, ends=soon()))
    assert second is first
    await lent.close()


async def test_where_none_is_idle_it_needs_the_loop() -> None:
    lent: LentConnections[Connection] = LentConnections(2, thread_name="test")
    with pytest.raises(NeedsLoopError):
        run_inline(lent.call(Connection.work, connected, ends=soon()))
    # The turn was given back: as many calls as before get theirs.
    await asyncio.gather(*(lent.call(Connection.work, connected, ends=soon()) for _ in range(4)))
    await lent.close()


async def test_a_call_waits_for_the_turn_of_a_thread() -> None:
    lent: LentConnections[Connection] = LentConnections(1, thread_name="test")
    await lent.call(Connection.work, connected, ends=soon())
    entered, leave = threading.Event(), threading.Event()

    def hold(connection: Connection) -> Connection:
        return connection.work(lambda: pause(entered, leave))

    holder = asyncio.create_task(
        asyncio.to_thread(run_inline, lent.call(hold, connected, ends=soon()))
    )
    await asyncio.to_thread(entered.wait, 10)
    with pytest.raises(TimeoutError):
        await lent.call(Connection.work, connected, ends=soon(0))
    with pytest.raises(NeedsLoopError):
        run_inline(lent.call(Connection.work, connected, ends=soon()))
    waiting = asyncio.create_task(lent.call(Connection.work, connected, ends=soon(30)))
    await asyncio.sleep(0)
    assert Connection.num_open == 1
    leave.set()
    assert await waiting is await holder
    await lent.close()


async def test_a_turn_that_comes_to_a_cancelled_call_is_passed_on() -> None:
    lent: LentConnections[Connection] = LentConnections(1, thread_name="test")
    async with lent.lend(connected, ends=soon()):
        first = asyncio.create_task(lent.call(Connection.work, connected, ends=soon(30)))
        second = asyncio.create_task(lent.call(Connection.work, connected, ends=soon(30)))
        await asyncio.sleep(0)
    # The turn is on its way to the first, who leaves before it arrives.
    first.cancel()
    await second
    assert first.cancelled()
    await lent.close()


async def test_close_waits_for_threads_and_then_abandons() -> None:
    lent: LentConnections[Connection] = LentConnections(1, thread_name="test")
    await lent.call(Connection.work, connected, ends=soon())
    entered, leave = threading.Event(), threading.Event()

    def hold(connection: Connection) -> bool:
        connection.work(lambda: pause(entered, leave))
        return connection.is_usable()

    holder = asyncio.create_task(
        asyncio.to_thread(run_inline, lent.call(hold, connected, ends=soon()))
    )
    await asyncio.to_thread(entered.wait, 10)
    await lent.close()
    leave.set()
    assert not await holder
    with pytest.raises(NeedsLoopError):
        run_inline(lent.call(Connection.work, connected, ends=soon()))


async def test_close_ends_as_soon_as_the_last_thread_is_done() -> None:
    lent: LentConnections[Connection] = LentConnections(1, thread_name="test")
    await lent.call(Connection.work, connected, ends=soon())
    entered, leave = threading.Event(), threading.Event()

    def hold(connection: Connection) -> bool:
        connection.work(lambda: pause(entered, leave))
        return connection.is_usable()

    holder = asyncio.create_task(
        asyncio.to_thread(run_inline, lent.call(hold, connected, ends=soon()))
    )
    await asyncio.to_thread(entered.wait, 10)
    closing = asyncio.create_task(lent.close(grace_s=30))
    await asyncio.sleep(0)
    leave.set()
    async with asyncio.timeout(10):
        await closing
    assert await holder


async def test_close_finds_calls_that_connect_or_wait() -> None:
    lent: LentConnections[Connection] = LentConnections(1, thread_name="test")
    may_connect = asyncio.Event()

    async def connected_later() -> Connection:
        await may_connect.wait()
        return await lent.open(Connection)

    connecting, waiting = (
        asyncio.create_task(lent.call(Connection.is_usable, connected_later, ends=soon()))
        for _ in range(2)
    )
    await asyncio.sleep(0)
    await lent.close()
    may_connect.set()
    # As of calls that were under way: their connections are of no use.
    assert [await connecting, await waiting] == [False, False]
    with pytest.raises(ConnectionAbortedError):
        await lent.call(Connection.work, connected_later, ends=soon())


async def test_close_gives_calls_that_connect_the_time_that_is_theirs() -> None:
    lent: LentConnections[Connection] = LentConnections(1, thread_name="test")
    may_connect = asyncio.Event()

    async def connected_later() -> Connection:
        await may_connect.wait()
        return await lent.open(Connection)

    connecting = asyncio.create_task(lent.call(Connection.is_usable, connected_later, ends=soon()))
    await asyncio.sleep(0)
    closing = asyncio.create_task(lent.close(grace_s=30))
    await asyncio.sleep(0)
    may_connect.set()
    assert await connecting
    async with asyncio.timeout(10):
        await closing


async def test_threads_and_calls_never_share_a_connection() -> None:
    lent: LentConnections[Connection] = LentConnections(3, thread_name="test")
    loop = asyncio.get_running_loop()

    def calls() -> int:
        num_inline = 0
        for _ in range(200):
            try:
                run_inline(lent.call(Connection.work, connected, ends=soon()))
                num_inline += 1
            except NeedsLoopError:
                call = lent.call(Connection.work, connected, ends=soon(60))
                asyncio.run_coroutine_threadsafe(call, loop).result()
        return num_inline

    with ThreadPoolExecutor(6) as threads:
        counts = await asyncio.gather(*(loop.run_in_executor(threads, calls) for _ in range(6)))
    assert sum(counts) > 0
    assert Connection.num_open <= 3
    await lent.close()
