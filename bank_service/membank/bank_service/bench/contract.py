"""What a benchmark is, and what it reports."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

Progress = Callable[[float], None]
"""Takes the share of a benchmark that is done, 0 to 1."""


class Judged(StrEnum):
    """Which figure of a row is held against its target."""

    RATIO = "ratio"
    OURS = "ours"


@dataclass(frozen=True, slots=True)
class Target:
    """What a row must reach."""

    limit: float
    """The limit, in the unit of the judged figure."""
    at_least: bool
    """True where more is better."""
    judged: Judged = Judged.RATIO
    """The figure that is judged."""

    def is_met(self, value: float) -> bool:
        """Say whether `value` reaches the target."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{self.judged.value} {'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Pair:
    """One measurement of the store and one of the plain thing, taken one after the other."""

    ours: float
    """The store, in the unit of the row."""
    raw: float
    """The plain thing, in the unit of the row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure of the store beside that of the plain thing."""

    name: str
    """Name of the benchmark, such as ``read-4mb-warm``."""
    what: str
    """What was measured and against what, in a sentence."""
    unit: str
    """Unit of `ours` and `raw`."""
    target: Target | None
    """What must be reached; None = the row is for information."""
    samples: tuple[Pair, ...] = ()
    """The pairs, in the order in which they were taken, warm-up left out."""
    reason: str = ""
    """Why it was not run; empty = it was."""

    @property
    def ours(self) -> float | None:
        """Median of the store's measurements."""
        return statistics.median(pair.ours for pair in self.samples) if self.samples else None

    @property
    def raw(self) -> float | None:
        """Median of the plain thing's measurements."""
        return statistics.median(pair.raw for pair in self.samples) if self.samples else None

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours to raw, pair by pair."""
        return tuple(pair.ours / pair.raw for pair in self.samples)

    @property
    def ratio(self) -> float | None:
        """Median of the pairs' ratios, which a slow moment of the machine hardly moves."""
        return statistics.median(self.ratios) if self.samples else None

    @property
    def passed(self) -> bool | None:
        """Whether the target is reached; None where there is none, or nothing was measured."""
        if self.target is None or not self.samples:
            return None
        value = self.ratio if self.target.judged is Judged.RATIO else self.ours
        assert value is not None
        return self.target.is_met(value)

    def to_json(self) -> dict[str, object]:
        """Return the row as a JSON document."""
        return {
            "name": self.name,
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours,
            "raw": self.raw,
            "ratio": self.ratio,
            "ratio_min": min(self.ratios, default=None),
            "ratio_max": max(self.ratios, default=None),
            "target": None if self.target is None else str(self.target),
            "passed": self.passed,
            "not_run": self.reason or None,
            "samples": [[pair.ours, pair.raw] for pair in self.samples],
        }


class Bench(Protocol):
    """One row, measured on demand."""

    @property
    def name(self) -> str:
        """Name of the row; its first word names the kind of benchmark."""

    @property
    def expected_s(self) -> float:
        """Seconds that it takes on an ordinary machine; only for the display of time left."""

    def run(self, progress: Progress) -> Row:
        """Measure, telling `progress` of every step."""
