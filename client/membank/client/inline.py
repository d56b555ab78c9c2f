"""Calls that the thread of their caller makes by itself, as far as no event loop is needed.

A thread that waits for its answer may as well do the work: to hand a call to the loop, from there
to a thread that may block, and its answer all the way back changes threads four times, which takes
longer than a small fetch. So a call of a sync client is begun right where it was made. Whatever has
to wait for anything but its own connection gives up by `NeedsLoopError`, before it has done
anything that must not be done twice, and the call is made anew on the loop.
"""

from __future__ import annotations

import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class NeedsLoopError(BaseException):
    """A call cannot go on without an event loop. Never leaves a client.

    No `Exception`: to handlers of failures it is none.
    """


class _Thread(threading.local):
    is_caller = False


_thread = _Thread()


def is_inline() -> bool:
    """Say whether this thread is in `run_inline`: it may block, and runs no event loop."""
    return _thread.is_caller


def require_loop() -> None:
    """Raise `NeedsLoopError` in `run_inline`; called before whatever only a loop can bring about."""
    if _thread.is_caller:
        raise NeedsLoopError


def run_inline(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on this thread.

    Raises
    ------
    NeedsLoopError
        If it cannot get there without an event loop; it has been closed.
    """
    before, _thread.is_caller = _thread.is_caller, True
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        _thread.is_caller = before
        # Of a coroutine that has ended, nothing is left to close.
        coroutine.close()
    raise NeedsLoopError  # it waits for somebody else
