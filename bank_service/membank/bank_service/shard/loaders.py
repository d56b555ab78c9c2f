"""Doing many small pieces of input side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

_NUM_THREADS = 8


class Loaders:
    """Threads that wait for storage in the place of a caller.

    A fetch of blocks that are not in memory would else wait for one after the other: behind a
    network, a thousand of them took a thousand round trips.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="membank-load")

    def map(self, load: Callable[[S], T], items: Sequence[S]) -> list[T]:
        """Return what `load` makes of each of `items`, in their order; raise the first error."""
        if len(items) < 2:
            return [load(item) for item in items]
        # Each thread takes its share in one go: small blocks of a disk cost less than a hand-over.
        count = min(_NUM_THREADS, len(items))
        shares = [
            self._pool.submit(lambda share: [load(item) for item in share], items[first::count])
            for first in range(count)
        ]
        loaded: list[T | None] = [None] * len(items)
        for first, share in enumerate(shares):
            loaded[first::count] = share.result()
        return loaded  # type: ignore[return-value]  # every place is filled by now
