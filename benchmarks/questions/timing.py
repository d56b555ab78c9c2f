"""Times of calls, their quantiles, and the line through them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.questions.scale import Scale


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds as a constant and a time per unit."""

    constant_s: float
    """Seconds of a call that moves nothing."""
    per_unit_s: float
    """Seconds for each unit, such as a byte."""

    @property
    def units_per_s(self) -> float:
        """Units per second beyond the constant; infinite where more units cost nothing."""
        return 1 / self.per_unit_s if self.per_unit_s else float("inf")

    @property
    def knee(self) -> float:
        """Units whose time is that of the constant: below, calls cost; above, units do."""
        return self.constant_s * self.units_per_s if self.constant_s else 0.0

    def to_json(self) -> dict[str, object]:
        """Return constant, rate and knee; None for what is infinite."""
        is_finite = self.per_unit_s > 0
        return {
            "constant_ms": 1e3 * self.constant_s,
            "units_per_s": self.units_per_s if is_finite else None,
            "knee_units": self.knee if is_finite else None,
        }


def fit_line(units: Sequence[float], seconds: Sequence[float]) -> Line:
    """Return the line of non-negative parts with the least sum of squared relative errors.

    Relative, because sizes span three orders of magnitude: the largest would decide alone.

    Parameters
    ----------
    units
        Size of each call, at least two different ones.
    seconds
        Time of each, > 0.
    """
    weight = 1 / np.asarray(seconds, dtype=np.float64)
    columns = np.stack([weight, np.asarray(units, dtype=np.float64) * weight], axis=1)
    (constant, slope), *_ = np.linalg.lstsq(columns, np.ones(len(weight)), rcond=None)
    if constant >= 0 and slope >= 0:
        return Line(float(constant), float(slope))
    # The least of a quadratic under such a bound lies on it: one of the parts is 0.
    lines = [_alone(columns, part) for part in range(2)]
    return min(lines, key=lambda line: _error(columns, line))


def _alone(columns: np.typing.NDArray[np.float64], part: int) -> Line:
    column = columns[:, part]
    value = float(column.sum() / (column @ column))
    return Line(value, 0.0) if part == 0 else Line(0.0, value)


def _error(columns: np.typing.NDArray[np.float64], line: Line) -> float:
    left = columns @ np.array([line.constant_s, line.per_unit_s]) - 1
    return float(left @ left)


def quantiles_ms(seconds: Sequence[float]) -> dict[str, object]:
    """Return p50, p95 and p99 in milliseconds, each the time of one of the calls, and the count."""
    named = {
        f"p{share}_ms": 1e3 * float(np.quantile(seconds, share / 100, method="inverted_cdf"))
        for share in (50, 95, 99)
    }
    return {**named, "calls": len(seconds)}


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    begin = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    # Only now: to let go of memory is not part of the call.
    del result
    return seconds


def repeat(
    call: Callable[[int], object], scale: Scale, *, before: Callable[[int], object] | None = None
) -> list[float]:
    """Make a call again and again.

    Parameters
    ----------
    call
        Given the number of the call; the first one is not counted.
    scale
        How often.
    before
        Given the same number; what it does is not timed.
    """
    seconds: list[float] = []
    until = time.perf_counter() + scale.budget_s
    for number in range(scale.max_calls + 1):
        if len(seconds) >= scale.min_calls and time.perf_counter() > until:
            break
        if before is not None:
            before(number)
        took = timed(lambda: call(number))  # noqa: B023  (called at once)
        if number:
            seconds.append(took)
    return seconds


def median_ms(seconds: Sequence[float]) -> float:
    """Return the median in milliseconds."""
    return 1e3 * statistics.median(seconds)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute by one thread: several that wait for each other measure who else is at work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
