"""Memory and CPU time of the processes of a run, as the kernel tells them."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_SAMPLE_EVERY_S = 0.1
_MIN_SAMPLES = 9
_FLAT_BYTES = 8 << 20
_FLAT_SHARE = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessFigures:
    """What some processes used together during a run."""

    num_processes: int
    """Processes."""
    cpu_s: float
    """CPU seconds of all their threads, in user and kernel mode."""
    rss_begin_bytes: int
    """Sum of their resident sets when the run began; shared pages count in each."""
    rss_end_bytes: int
    """The same at the end."""
    rss_growth_bytes: int | None
    """Growth of that sum over the last two thirds of the run, by a line fitted to it; None where
    the run was too short to tell (fewer than 1,000 calls, or less than a second)."""

    @property
    def is_flat(self) -> bool | None:
        """Whether memory stayed as it was, once warm: it grew by at most 8 MiB or 2 %."""
        if self.rss_growth_bytes is None:
            return None
        return self.rss_growth_bytes <= max(_FLAT_BYTES, _FLAT_SHARE * self.rss_end_bytes)

    def to_json(self, payload_bytes: int) -> dict[str, object]:
        """Return the figures as a JSON document, for a run that moved `payload_bytes`."""
        return {
            "processes": self.num_processes,
            "cpu_s": self.cpu_s,
            "cpu_s_per_gb": self.cpu_s / (payload_bytes / 1e9) if payload_bytes else None,
            "rss_begin_bytes": self.rss_begin_bytes,
            "rss_end_bytes": self.rss_end_bytes,
            "rss_growth_bytes": self.rss_growth_bytes,
            "rss_flat": self.is_flat,
        }


class ProcessWatch:
    """Watches processes of this machine from when it is made.

    Parameters
    ----------
    pids
        The processes; they must outlive the last `sample`.

    Notes
    -----
    On systems without ``/proc`` there is nothing to see: `figures` returns None.
    """

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = tuple(pids)
        self._times: list[float] = []
        self._rss: list[int] = []
        self._cpu_begin_s = self._cpu_s()
        self.sample(force=True)

    def sample(self, *, force: bool = False) -> None:
        """Note the present memory, unless the last note is less than 0.1 s old."""
        now = time.monotonic()
        if not force and self._times and now - self._times[-1] < _SAMPLE_EVERY_S:
            return
        rss = [_rss_bytes(pid) for pid in self._pids]
        if None not in rss:
            self._times.append(now)
            self._rss.append(sum(size or 0 for size in rss))

    def figures(self) -> ProcessFigures | None:
        """Return what was seen up to now; None where the processes cannot be seen."""
        self.sample(force=True)
        cpu_end_s = self._cpu_s()
        if not self._pids or not self._rss or cpu_end_s is None or self._cpu_begin_s is None:
            return None
        return ProcessFigures(
            num_processes=len(self._pids),
            cpu_s=cpu_end_s - self._cpu_begin_s,
            rss_begin_bytes=self._rss[0],
            rss_end_bytes=self._rss[-1],
            rss_growth_bytes=growth(self._times, self._rss),
        )

    def _cpu_s(self) -> float | None:
        seconds = [_cpu_s(pid) for pid in self._pids]
        return None if None in seconds else sum(s or 0.0 for s in seconds)


def growth(times: Sequence[float], sizes: Sequence[int]) -> int | None:
    """Return by how much `sizes` grew over the last two thirds of `times`, along a fitted line.

    Parameters
    ----------
    times
        Moments, in seconds, ascending.
    sizes
        Bytes at each of them.

    Returns
    -------
    int or None
        Bytes, negative where they shrank; None with fewer than 9 moments.
    """
    if len(times) < _MIN_SAMPLES:
        return None
    # What is allocated once, by the first calls, is no growth.
    begin = times[0] + (times[-1] - times[0]) / 3
    warm = [(t - begin, size) for t, size in zip(times, sizes, strict=True) if t >= begin]
    moments, kept = (np.array(values, np.float64) for values in zip(*warm, strict=True))
    slope = float(np.polyfit(moments, kept, 1)[0])
    return round(slope * float(moments[-1] - moments[0]))


def _rss_bytes(pid: int) -> int | None:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpu_s(pid: int) -> float | None:
    try:
        # The name, in parentheses, may hold spaces; user and system time are fields 14 and 15.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None
