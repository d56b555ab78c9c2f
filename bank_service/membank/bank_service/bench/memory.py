"""How much memory a shard takes that is given a budget and a bank ten times as large."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from functools import cached_property
from pathlib import Path

from membank.bank_service.bench.contract import Pair, Progress, Row, Target
from membank.bank_service.bench.footprint import Footprint
from membank.bank_service.bench.scale import Scale

_TARGET = Target(1.10, at_least=False)


class Memory(StrEnum):
    """What is counted."""

    ACCOUNTED = "accounted"
    """Bytes of blocks that the shard says it keeps."""
    RSS = "rss"
    """Growth of the resident set of its process."""


class MemoryRun:
    """One run in a process of its own, made when a row first asks for it.

    Parameters
    ----------
    folder
        Where the bank is made.
    scale
        Size of budget and bank.
    """

    def __init__(self, folder: Path, scale: Scale) -> None:
        self._folder = folder
        self.scale = scale

    @cached_property
    def footprint(self) -> Footprint:
        """What was seen."""
        command = [
            sys.executable, "-m", "membank.bank_service.bench.memory_probe", str(self._folder),
            str(self.scale.budget_bytes), str(self.scale.bank_budgets),
        ]  # fmt: skip
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return Footprint(**json.loads(answer.stdout))


class MemoryBench:
    """Compares the peak of what a shard keeps with its budget.

    Parameters
    ----------
    run
        The run that all rows of this kind share.
    kind
        What is counted.
    """

    def __init__(self, run: MemoryRun, kind: Memory) -> None:
        self._run = run
        self._kind = kind
        self.name = f"memory-{kind.value}"
        self.expected_s = 20.0 if kind is Memory.ACCOUNTED else 0.1

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        scale = self._run.scale
        footprint = self._run.footprint
        progress(1.0)
        row = Row(
            name=self.name,
            what=f"peak of {_WHAT[self._kind]} while a shard with resident_bytes="
            f"{scale.budget_bytes} trains and serves {footprint.num_blocks} blocks of together "
            f"{footprint.bank_bytes} bytes / that budget",
            unit="bytes",
            target=_TARGET,
        )
        peak = _PEAK[self._kind](footprint)
        if peak is None:
            return replace(row, reason="this kernel does not tell the peak of a resident set")
        return replace(row, samples=(Pair(peak, scale.budget_bytes),))


_WHAT = {
    Memory.ACCOUNTED: "resident bytes of blocks by the shard's own account",
    Memory.RSS: "the growth of the process's resident set",
}
_PEAK: dict[Memory, Callable[[Footprint], int | None]] = {
    Memory.ACCOUNTED: lambda footprint: footprint.peak_accounted_bytes,
    Memory.RSS: lambda footprint: footprint.peak_rss_growth_bytes,
}
