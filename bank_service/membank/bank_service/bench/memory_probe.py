"""The process whose memory is measured: it trains and serves a bank larger than its budget."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from membank.bank_service.bench.banks import ADAMW, BLOCK_128KB, flat_spec
from membank.bank_service.bench.footprint import Footprint
from membank.bank_service.bench.pusher import Pusher
from membank.bank_service.shard import ShardConfig
from membank.bank_service.store.bank import Bank
from membank.wire.spec import BlockRef

_PUSH_EVERY = 4
"""In the second half of the run, one push comes after so many fetches."""


def measure(folder: Path, budget_bytes: int, bank_budgets: int) -> Footprint:
    """Train every block of a bank once, then fetch and train in random order.

    Parameters
    ----------
    folder
        Where the banks are made.
    budget_bytes
        Budget of the shard.
    bank_budgets
        Size of the bank, in budgets.

    Returns
    -------
    Footprint
        Peaks over the run.
    """
    one = flat_spec(BLOCK_128KB, 1, optimizer=ADAMW)
    block_bytes = one.weight_bytes(1) + one.optimizer_bytes(1)
    num_blocks = -(-bank_budgets * budget_bytes // block_bytes)
    # What is loaded and started once, however large the bank: kernels, threads, zarr.
    _drive(_pusher(folder / "rehearsal", 8, ShardConfig(consolidate_bytes=1)), 8)
    pusher = _pusher(folder / "bank", num_blocks, ShardConfig(resident_bytes=budget_bytes))
    before = _reset_peak()
    accounted = _drive(pusher, num_blocks)
    peak = None if before is None else _status_bytes("VmHWM") - before
    return Footprint(
        num_blocks=num_blocks,
        bank_bytes=num_blocks * block_bytes,
        peak_accounted_bytes=accounted,
        peak_rss_growth_bytes=peak,
    )


def _pusher(folder: Path, num_blocks: int, config: ShardConfig) -> Pusher:
    spec = flat_spec(BLOCK_128KB, num_blocks, optimizer=ADAMW)
    order = np.random.default_rng(0).permutation(num_blocks)
    refs = [BlockRef(1, int(cluster)) for cluster in order]
    return Pusher(Bank.create(str(folder), spec), refs, config)


def _drive(pusher: Pusher, num_blocks: int) -> int:
    """Train, then serve and train; return the peak of the accounted bytes."""
    peak = 0
    for _ in range(num_blocks):
        pusher.push(1)
        peak = max(peak, pusher.shard.stats().resident_bytes)
    rng = np.random.default_rng(1)
    for step in range(num_blocks):
        pusher.shard.fetch([BlockRef(1, int(rng.integers(num_blocks)))])
        if step % _PUSH_EVERY == 0:
            pusher.push(1)
        peak = max(peak, pusher.shard.stats().resident_bytes)
    pusher.shard.close()
    return peak


def _reset_peak() -> int | None:
    """Make the kernel count the peak of the resident set afresh; return the present size."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except OSError:
        return None


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


if __name__ == "__main__":
    _, _folder, _budget, _budgets = sys.argv
    print(json.dumps(asdict(measure(Path(_folder), int(_budget), int(_budgets)))))
