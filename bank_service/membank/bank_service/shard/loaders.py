"""Doing many small pieces of input side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

_NUM_THREADS = 8


class Loaders:
    """Threads that wait for storage beside a caller.

    A fetch of blocks that are not in memory would else wait for one after the other: behind a
    network, a thousand of them took a thousand round trips. The caller always takes part, so one
    that finds all threads at work is as fast as without them.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="membank-load")

    def map(self, load: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Return what `load` makes of each of `items`, in their order; raise the first error."""
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

        num_helpers = min(_NUM_THREADS, len(items)) - 1
        helpers: list[Future[None]] = []
        with suppress(RuntimeError):  # closed meanwhile: then without help
            helpers += (self._pool.submit(work) for _ in range(num_helpers))
        try:
            work()
        finally:
            started = [helper for helper in helpers if not helper.cancel()]
        for helper in started:
            helper.result()
        return loaded  # type: ignore[return-value]  # every place is filled by now

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
