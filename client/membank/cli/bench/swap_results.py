"""What swaps cost those who fetch meanwhile: latencies without and with them, and their ratio."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from membank.cli.bench.results import Latencies
from membank.cli.bench.swap_clients import TimedCalls
from membank.cli.bench.swap_load import Span, SwapRun

TARGET_RATIO = 1.5
"""A swap may make the 99th percentile of fetches so many times as long, at most."""

_NAMED = (0.5, 0.95, 0.99)


@dataclass(frozen=True, kw_only=True, slots=True)
class SwapRow:
    """One run of swaps under load."""

    name: str
    """Name of the row; rows of the same name are compared with each other."""
    what: str
    """What was done, in a sentence."""
    run: SwapRun = field(repr=False)
    """What was seen."""
    path_bytes: int
    """Bytes of a swap."""

    @property
    def quiet(self) -> Latencies:
        """Fetches that began in phases without swaps."""
        return _within(self.run.readers, self.run.quiet)

    @property
    def swapping(self) -> Latencies:
        """Fetches that began in phases with swaps, between them too."""
        return _within(self.run.readers, self.run.swapping)

    @property
    def beside(self) -> Latencies:
        """Fetches among those that were under way while a swap was."""
        return _within(self.run.readers, self.run.swaps, overlap=True)

    @property
    def ratio(self) -> float | None:
        """99th percentile with swaps to that without, over all phases; None without fetches."""
        return _ratio(self.swapping, self.quiet, 0.99)

    @property
    def pair_ratios(self) -> tuple[float, ...]:
        """The same of each pair of phases; those without fetches are left out."""
        pairs = zip(self.run.swapping, self.run.quiet, strict=True)
        readers = self.run.readers
        ratios = (
            _ratio(_within(readers, [swapping]), _within(readers, [quiet]), 0.99)
            for swapping, quiet in pairs
        )
        return tuple(ratio for ratio in ratios if ratio is not None)

    @property
    def errors(self) -> Counter[str]:
        """Failed fetches and pushes, by reason."""
        calls = (*self.run.readers, *self.run.pushers)
        return sum((one.errors for one in calls), Counter())

    @property
    def num_mixed(self) -> int:
        """Fetches that were not wholly before or wholly after a swap."""
        return sum(reader.seen.num_mixed for reader in self.run.readers)

    @property
    def passed(self) -> bool:
        """Whether the ratio is reached, nothing failed and nothing was mixed."""
        ratio = self.ratio
        return (
            ratio is not None and ratio <= TARGET_RATIO and not self.errors and not self.num_mixed
        )

    @property
    def figures(self) -> dict[str, float]:
        """Figures that two runs can be compared by."""
        swap_ms = Latencies(seconds=np.array([swap.seconds for swap in self.run.swaps]))
        found: dict[str, float | None] = {
            "p99_ratio": self.ratio,
            "p99_ratio_median_of_pairs": _median(self.pair_ratios),
            **{f"quiet_{name}": value for name, value in _named(self.quiet).items()},
            **{f"swapping_{name}": value for name, value in _named(self.swapping).items()},
            **{f"beside_{name}": value for name, value in _named(self.beside).items()},
            "swap_p50_ms": swap_ms.quantile_ms(0.5),
            "swap_max_ms": swap_ms.quantile_ms(1.0),
        }
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> list[dict[str, object]]:
        """Return the comparison, and the latencies of either kind of phase, as JSON documents."""
        readers, pushers = self.run.readers, self.run.pushers
        calls = (*readers, *pushers)
        pushes = Latencies(seconds=np.concatenate([[], *(np.array(p.seconds) for p in pushers)]))
        comparison = {
            "name": self.name,
            "what": self.what,
            "target": f"p99_ratio <= {TARGET_RATIO:g}, no failed request, no mixture",
            "passed": self.passed,
            "figures": self.figures,
            "pair_p99_ratios": self.pair_ratios,
            "fetches": {
                "quiet": len(self.quiet.seconds),
                "swapping": len(self.swapping.seconds),
                "beside_a_swap": len(self.beside.seconds),
                "checked": sum(reader.seen.num_checked for reader in readers),
                "mixed": self.num_mixed,
                "examples": [text for reader in readers for text in reader.seen.examples],
                "swaps_seen": len(set().union(*(reader.seen.marks for reader in readers))),
            },
            "swaps": len(self.run.swaps),
            "swap_bytes": self.path_bytes,
            "swap_seconds": [swap.seconds for swap in self.run.swaps],
            "pushes": len(pushes.seconds),
            "push_latency_ms": pushes.to_json(),
            "errors": dict(self.errors),
            "last_error": next((one.last_error for one in calls if one.last_error), None),
            "gave_up": any(one.gave_up for one in calls),
        }
        return [
            comparison,
            _latency_row(f"{self.name}-quiet", "fetches in phases without swaps", self.quiet),
            _latency_row(f"{self.name}-swapping", "fetches in phases with swaps", self.swapping),
        ]


def _latency_row(name: str, what: str, latencies: Latencies) -> dict[str, object]:
    return {"name": name, "what": what, "latency_ms": latencies.to_json(), "figures": {}}


def _named(latencies: Latencies) -> dict[str, float | None]:
    return {f"p{100 * share:g}_ms": latencies.quantile_ms(share) for share in _NAMED}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _ratio(ours: Latencies, raw: Latencies, share: float) -> float | None:
    above, below = ours.quantile_ms(share), raw.quantile_ms(share)
    return above / below if above is not None and below else None


def _within(
    readers: Sequence[TimedCalls], spans: Sequence[Span], *, overlap: bool = False
) -> Latencies:
    """Return the calls that began in `spans`; with `overlap`, those that were under way in them."""
    begins = _joined([reader.begins for reader in readers])
    seconds = _joined([reader.seconds for reader in readers])
    inside = np.zeros(len(begins), bool)
    for span in spans:
        ends = begins + seconds if overlap else begins
        inside |= (ends >= span.begin) & (begins < span.end)
    return Latencies(seconds=seconds[inside])


def _joined(parts: Sequence[Sequence[float]]) -> npt.NDArray[np.float64]:
    return np.concatenate([np.empty(0), *(np.array(part, np.float64) for part in parts)])
