"""The one background event loop of a process, on which all sync clients run."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from membank.wire.errors import FailedPreconditionError

T = TypeVar("T")

_STOP_TIMEOUT_S = 2.0
"""A call that does not end must not keep the process from ending."""


class LoopThread:
    """An event loop in a daemon thread.

    `run` may be called from any thread but the loop's own.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="membank-client", daemon=True
        )
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and return its result; an interrupt cancels it."""
        if self.is_current():
            coroutine.close()
            raise FailedPreconditionError(
                "a sync client was called on its own event loop; use AsyncBankClient there"
            )
        if self._loop.is_closed():
            coroutine.close()
            raise FailedPreconditionError("the process is ending; no call is made any more")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            # Such as KeyboardInterrupt while waiting; has no effect on a call that has ended.
            future.cancel()
            raise

    def is_current(self) -> bool:
        """Say whether this thread is the loop's own."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """End what still runs on the loop, then the loop and its thread."""
        ended = asyncio.run_coroutine_threadsafe(_end_all(), self._loop)
        with contextlib.suppress(TimeoutError):
            ended.result(_STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _end_all() -> None:
    # What asyncio.run does at its end; without it, tasks that are destroyed complain at exit.
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


_lock = threading.Lock()
_loop_thread: LoopThread | None = None
_was_forked_in_use = False


def loop_thread() -> LoopThread:
    """Return the loop thread of this process; the first call starts it.

    Raises
    ------
    FailedPreconditionError
        If this process was forked from one that was using it: gRPC's threads do not survive a fork,
        and a call would hang or crash.
    """
    global _loop_thread  # one per process is the point
    with _lock:
        if _was_forked_in_use:
            raise FailedPreconditionError(
                "this process was forked from one that had a connected membank client, which gRPC "
                "does not survive; start processes with 'spawn', or connect after the fork only"
            )
        if _loop_thread is None:
            _loop_thread = LoopThread()
            atexit.register(_loop_thread.stop)
        return _loop_thread


def may_block() -> bool:
    """Say whether a call may run in this thread: not where the loop does, nor where `run` refuses."""
    known = _loop_thread
    return known is not None and not known.is_current()


def _reset_after_fork() -> None:
    global _lock, _loop_thread, _was_forked_in_use
    # The lock may have been held by a thread that does not exist here.
    _lock = threading.Lock()
    if _loop_thread is not None:
        atexit.unregister(_loop_thread.stop)
        _was_forked_in_use = True
    _loop_thread = None


os.register_at_fork(after_in_child=_reset_after_fork)
