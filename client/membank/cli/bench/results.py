"""What a run came to: latencies, rates, memory, errors; as a table row and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from membank.cli.bench.process_watch import ProcessFigures
from membank.cli.bench.workload import Operation

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
"""Quantiles that results name."""

# Dense where tails are: for curves drawn from a file of results.
_CURVE = (*np.linspace(0, 0.98, 50).tolist(), 0.99, 0.995, 0.999, 0.9999, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Latencies:
    """Times of single calls, every one of them kept."""

    seconds: npt.NDArray[np.float64] = field(repr=False)
    """(N,) float64, seconds of each call that succeeded."""

    def quantile_ms(self, share: float) -> float | None:
        """Return the time within which `share` of the calls ended; None where there is none.

        It is the time of one of the calls: none is made up between two of them.
        """
        if not len(self.seconds):
            return None
        return 1e3 * float(np.quantile(self.seconds, share, method="inverted_cdf"))

    def to_json(self) -> dict[str, object]:
        """Return quantiles, mean and extremes in milliseconds, and the curve of all quantiles."""
        if not len(self.seconds):
            return {}
        named = {f"p{100 * share:g}": self.quantile_ms(share) for share in QUANTILES}
        return {
            **named,
            "mean": 1e3 * float(self.seconds.mean()),
            "min": 1e3 * float(self.seconds.min()),
            "max": 1e3 * float(self.seconds.max()),
            "curve": [[share, self.quantile_ms(share)] for share in _CURVE],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRow:
    """One kind of call in one run."""

    name: str
    """Name of the row; rows of the same name are compared with each other."""
    what: str
    """What was done, in a sentence."""
    operation: Operation
    """Kind of call."""
    seconds: float
    """From the beginning of the first client to the end of the last one."""
    latencies: Latencies
    """Of the calls of this kind that succeeded."""
    num_bytes: int
    """Payload bytes that those moved."""
    num_gradients: int
    """Gradients that were pushed."""
    num_refused: int
    """Gradients among them that the service refused."""
    run_bytes: int
    """Payload bytes of calls of every kind in this run, which the processes' figures are for."""
    errors: Counter[str]
    """Failed calls of every kind, by reason."""
    last_error: str
    """What the last of them said."""
    gave_up: bool
    """Whether a client gave up after too many errors."""
    client: ProcessFigures | None
    """All clients together; None where they cannot be seen."""
    server: ProcessFigures | None
    """All shards together; None where they cannot be seen, as on another machine."""
    warm_up_s: float
    """Seconds that the first fetch of everything took, before the run."""

    @property
    def num_requests(self) -> int:
        """Calls that succeeded."""
        return len(self.latencies.seconds)

    @property
    def bytes_per_s(self) -> float:
        """Payload bytes of all clients per second."""
        return self.num_bytes / self.seconds if self.seconds else 0.0

    @property
    def requests_per_s(self) -> float:
        """Calls of all clients per second."""
        return self.num_requests / self.seconds if self.seconds else 0.0

    @property
    def is_good(self) -> bool:
        """Whether nothing failed or was refused, and no memory grew that could be seen."""
        flat = [group.is_flat for group in (self.client, self.server) if group is not None]
        return not (self.errors or self.num_refused or self.gave_up) and False not in flat

    @property
    def figures(self) -> dict[str, float]:
        """Figures that two runs can be compared by."""
        found: dict[str, float | None] = {
            **{f"p{100 * q:g}_ms": self.latencies.quantile_ms(q) for q in (0.5, 0.95, 0.99)},
            "mb_per_s": self.bytes_per_s / 1e6,
            "requests_per_s": self.requests_per_s,
            "client_cpu_s_per_gb": _per_gb(self.client, self.run_bytes),
            "server_cpu_s_per_gb": _per_gb(self.server, self.run_bytes),
        }
        return {name: value for name, value in found.items() if value is not None}

    def to_json(self) -> dict[str, object]:
        """Return the row as a JSON document."""
        return {
            "name": self.name,
            "what": self.what,
            "operation": self.operation.value,
            "figures": self.figures,
            "latency_ms": self.latencies.to_json(),
            "requests": self.num_requests,
            "seconds": self.seconds,
            "warm_up_s": self.warm_up_s,
            "bytes": self.num_bytes,
            "gradients": self.num_gradients,
            "gradients_refused": self.num_refused,
            "errors": dict(self.errors),
            "last_error": self.last_error or None,
            "gave_up": self.gave_up,
            "client": _group_json(self.client, self.run_bytes),
            "server": _group_json(self.server, self.run_bytes),
        }


def _per_gb(group: ProcessFigures | None, num_bytes: int) -> float | None:
    return group.cpu_s / (num_bytes / 1e9) if group is not None and num_bytes else None


def _group_json(group: ProcessFigures | None, num_bytes: int) -> Mapping[str, object] | None:
    return None if group is None else group.to_json(num_bytes)
