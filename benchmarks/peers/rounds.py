"""Measuring in turn, so that a noisy machine does not decide, and what follows from the samples."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Round:
    """The calls of one contestant in one round."""

    calls_s: tuple[float, ...]
    """Seconds of each call, of all clients; not empty."""
    wall_s: float | None = None
    """Seconds from the first call to the end of the last, where several clients called at a time;
    None = there was one client."""

    @property
    def cost_s(self) -> float:
        """Seconds per call: the median of one client's calls, the share of the wall time of many's."""
        if self.wall_s is None:
            return statistics.median(self.calls_s)
        return self.wall_s / len(self.calls_s)


@dataclass(frozen=True, slots=True)
class Samples:
    """What one contestant did of one task."""

    rounds: tuple[Round, ...]
    """Rounds in the order in which they were taken; not empty."""

    @property
    def costs_s(self) -> tuple[float, ...]:
        """Seconds per call, round by round."""
        return tuple(taken.cost_s for taken in self.rounds)

    @property
    def cost_s(self) -> float:
        """Median of `costs_s`."""
        return statistics.median(self.costs_s)

    def percentile_s(self, percent: float) -> float:
        """Return the smallest of all calls' seconds that `percent` of them do not exceed."""
        calls = sorted(second for taken in self.rounds for second in taken.calls_s)
        return calls[max(0, math.ceil(len(calls) * percent / 100) - 1)]


Results = Mapping[str, Mapping[str, Samples]]
"""Samples by task, then by contestant."""

Measure = Callable[[str, int], Round]
"""Has a contestant make its calls of a round; the number of the round decides which blocks."""


def interleave(
    names: Sequence[str], num_rounds: int, measure: Measure
) -> tuple[dict[str, Samples], dict[str, str]]:
    """Measure contestants in turn.

    Who begins changes from round to round, and every second round goes the other way about, so that
    nobody always follows the same one. One more round is taken first and thrown away.

    Parameters
    ----------
    names
        Contestants.
    num_rounds
        Rounds that count.
    measure
        Measures one. Whatever it raises ends the part of that contestant alone.

    Returns
    -------
    dict[str, Samples], dict[str, str]
        Samples of each contestant, and of those that failed the reason instead.
    """
    taken: dict[str, list[Round]] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for number in range(num_rounds + 1):
        for name in _order(names, number):
            if name in failed:
                continue
            try:
                measured = measure(name, number)
            except Exception as err:
                failed[name] = str(err)
                continue
            if number:
                taken[name].append(measured)
    return {name: Samples(tuple(r)) for name, r in taken.items() if name not in failed}, failed


def _order(names: Sequence[str], number: int) -> list[str]:
    first = number % len(names) if names else 0
    turned = [*names[first:], *names[:first]]
    return turned[::-1] if number % 2 else turned
