"""Doing many small pieces of input side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
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

        # Futures of our own: where no thread can be started, the pool raises, and yet does what it
        # was handed as soon as one of its threads is free.
        helpers = [Future[None]() for _ in range(min(self._num_threads, len(items)) - 1)]
        with suppress(RuntimeError):  # that, or closed meanwhile: then without help
            for helper in helpers:
                self._pool.submit(_help, helper, work)
        try:
            work()
        finally:
            started = [helper for helper in helpers if not helper.cancel()]
            wait(started)
        for helper in started:
            helper.result()
        return loaded  # type: ignore[return-value]  # every place is filled by now

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()


def _help(helper: Future[None], work: Callable[[], None]) -> None:
    if not helper.set_running_or_notify_cancel():
        return
    try:
        work()
    except BaseException as err:
        helper.set_exception(err)
    else:
        helper.set_result(None)
