"""Doing many small pieces of input side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

_NUM_THREADS = 8


class Loaders:
    """Threads that wait for storage, or for journals, beside a caller.

    A fetch of blocks that are not in memory would else wait for one after the other: behind a
    network, a thousand of them took a thousand round trips. The caller always takes part, so one
    that finds all threads at work is as fast as without them.

    Parameters
    ----------
    num_threads
        How many there are, and the most that work for one caller, itself included.
    name
        Begins the threads' names.
    """

    def __init__(self, num_threads: int = _NUM_THREADS, name: str = "membank-load") -> None:
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix=name)

    def map(self, load: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Return what `load` makes of each of `items`, in their order; raise the first error.

        Nothing is under way any more when it returns or raises.
        """
        loaded: list[T | None] = [None] * len(items)
        # Whoever is free takes the next one: an iterator of a range gives each number once.
        positions = iter(range(len(items)))

        def work() -> None:
            try:
                for position in positions:
                    loaded[position] = load(items[position])
            except BaseException:
                for _ in positions:
                    pass  # nobody needs the rest
                raise

        helpers = [_Helper(work) for _ in range(min(self._num_threads, len(items)) - 1)]
        with suppress(RuntimeError):  # closed meanwhile, or no thread can be started
            for helper in helpers:
                self._pool.submit(helper.run)
        try:
            work()
        finally:
            for helper in helpers:
                helper.end()
        for helper in helpers:
            helper.require_success()
        return loaded  # type: ignore[return-value]  # every place is filled by now

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


class _Helper:
    """Work that another thread does unless it is over by then.

    The pool's futures would tell the same, but not of work that the pool refused because it could
    start no thread, and yet does as soon as one of its threads is free. They also take longer.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self._running = Lock()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work, unless `end` was called."""
        with self._running:
            if self._work is None:
                return
            try:
                self._work()
            except BaseException as err:
                self._error = err

    def end(self) -> None:
        """Wait for the work if it has begun; it is not begun any more from then on."""
        with self._running:
            self._work = None

    def require_success(self) -> None:
        """After `end`: raise what the work ended with, if that was an error."""
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # Its traceback has this frame: together they would keep what was worked on.
                del error
