"""What a fetch costs in a large bank, beside a small one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from membank.bank_service.bench import Row, Target, interleave
from membank.cli.bench.display import Notice
from membank.cli.bench.embedded import EmbeddedService
from membank.cli.bench.presets import two_level_spec
from membank.cli.bench.workload import ZipfPaths, choose_leaves, in_batches, touched_blocks
from membank.client import BankClient

_TARGET = Target(1.1, at_least=False)
# 3 KiB: what a call costs shows where the bytes do not.
_BLOCK_WIDTH = 1
_WIDTH = 32
_FAN_OUT_LARGE = 256
_FAN_OUT_SMALL = 16
_RESIDENT_BYTES = 2 << 30
_BATCH_BYTES = 4 << 20


def compare_scales(folder: Path, *, seed: int, quick: bool, notice: Notice) -> Row:
    """Fetch paths of a bank of 65,536 leaves and of one of 256, in turn.

    Both have two levels and the same blocks, and every leaf of both was fetched before; popularity
    follows Zipf over all leaves, so that the large bank is used in its whole breadth.

    Parameters
    ----------
    folder
        Where the banks are made.
    seed
        Seed of popularity and order.
    quick
        Whether to make the large bank and the samples tiny.
    notice
        Told how far it is.

    Returns
    -------
    Row
        Median latency in both, in seconds.
    """
    fan_out = _FAN_OUT_SMALL * 2 if quick else _FAN_OUT_LARGE
    num_fetches, num_pairs = (20, 2) if quick else (400, 15)
    with ExitStack() as stack:
        large, small = (
            _fetcher(stack, folder / f"bank-of-{n * n}", n, num_fetches, seed, notice)
            for n in (fan_out, _FAN_OUT_SMALL)
        )
        pairs = interleave(
            large, small, num_pairs=num_pairs,
            progress=lambda share: notice("path fetches", share * num_pairs, num_pairs),
        )  # fmt: skip
    num_bytes = two_level_spec(fan_out, block_width=_BLOCK_WIDTH, width=_WIDTH).weight_bytes(1)
    return Row(
        name=f"path-fetch-{fan_out * fan_out}",
        what=f"median latency of {num_fetches} fetches of a path of 2 blocks of {num_bytes} bytes "
        f"by one client, in a bank of {fan_out * fan_out} leaves / in one of {_FAN_OUT_SMALL**2}, "
        "Zipf exponent 1 over all leaves, all in the memory of one shard",
        unit="s",
        target=_TARGET,
        samples=tuple(pairs),
    )


def _fetcher(
    stack: ExitStack, folder: Path, fan_out: int, num_fetches: int, seed: int, notice: Notice
) -> Callable[[], float]:
    """Serve a bank and fetch all of it; return what measures the median latency of some fetches."""
    spec = two_level_spec(fan_out, block_width=_BLOCK_WIDTH, width=_WIDTH)
    service = stack.enter_context(
        EmbeddedService(folder, spec, num_shards=1, resident_bytes=_RESIDENT_BYTES)
    )
    bank = stack.enter_context(BankClient.connect(service.endpoint))
    leaves = choose_leaves(spec, max_bytes=_RESIDENT_BYTES, with_optimizer=False, seed=seed)
    refs = touched_blocks(spec, leaves)
    done = 0
    for batch in in_batches(spec, refs, _BATCH_BYTES):
        bank.fetch_blocks(batch)
        done += len(batch)
        notice(f"warm-up of {len(leaves)} leaves", done, len(refs))
    paths = iter(ZipfPaths(spec, leaves, 1.0, (seed,)))

    def median_latency() -> float:
        seconds = []
        for _ in range(num_fetches):
            path = next(paths)
            begin = time.perf_counter()
            bank.fetch(path)
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)

    return median_latency
