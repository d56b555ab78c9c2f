"""Taking pairs of measurements, so that a noisy machine does not decide."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from membank.bank_service.bench.contract import Pair, Progress

Timed = Callable[[], float]
"""Does the work once and returns the seconds that the part to be measured took."""


class Stopwatch:
    """Holds the seconds that a `stopwatch` block took."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds, once the block has ended."""


@contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Measure the block."""
    watch = Stopwatch()
    begin = time.perf_counter()
    yield watch
    watch.seconds = time.perf_counter() - begin


def interleave(ours: Timed, raw: Timed, *, num_pairs: int, progress: Progress) -> list[Pair]:
    """Measure `ours` and `raw` in turn and return the pairs, in seconds.

    Every second pair is taken in the opposite order, so that neither profits from following the
    other. One more pair is taken first and thrown away.
    """
    pairs = []
    for index in range(num_pairs + 1):
        if index % 2:
            ours_s, raw_s = ours(), raw()
        else:
            raw_s, ours_s = raw(), ours()
        pairs.append(Pair(ours_s, raw_s))
        progress((index + 1) / (num_pairs + 1))
    return pairs[1:]


def rates(pairs: list[Pair], amount: float) -> tuple[Pair, ...]:
    """Turn seconds into `amount` per second."""
    return tuple(Pair(amount / pair.ours, amount / pair.raw) for pair in pairs)


def costs(pairs: list[Pair], count: int) -> tuple[Pair, ...]:
    """Turn seconds into seconds per piece of `count`."""
    return tuple(Pair(pair.ours / count, pair.raw / count) for pair in pairs)
