"""All benchmarks of the store, and their report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from membank.bank_service.bench.applies import ApplyBench
from membank.bank_service.bench.banks import BLOCK_4MB, BLOCK_16MB, BLOCK_128KB, Shelf
from membank.bank_service.bench.consolidation import ConsolidationBench, Plain
from membank.bank_service.bench.contract import Bench, Row
from membank.bank_service.bench.journals import JournalBench
from membank.bank_service.bench.memory import Memory, MemoryBench, MemoryRun
from membank.bank_service.bench.opening import OpenBench
from membank.bank_service.bench.reads import PageCache, ReadBench
from membank.bank_service.bench.s3 import S3ReadBench
from membank.bank_service.bench.scale import FULL, Scale
from membank.bank_service.bench.sealing import SealedFoldBench, SealedReadBench
from membank.bank_service.bench.updates import UpdateBench
from membank.bank_service.shard.config import Durability
from membank.wire.errors import InvalidArgumentError, Reason

Notice = Callable[[str, float, float], None]
"""Takes the name of the running benchmark, the seconds' worth of work done, and all of it."""


def store_benches(folder: Path, scale: Scale = FULL, *, s3_url: str | None = None) -> list[Bench]:
    """Return every benchmark of the store.

    Parameters
    ----------
    folder
        Where they write.
    scale
        How much they measure.
    s3_url
        Where the benchmark of a bucket writes; None = it is not run.
    """
    sizes = (BLOCK_4MB, BLOCK_128KB)
    shelf = Shelf(folder)
    run = MemoryRun(folder / "memory", scale)
    return [
        *(ReadBench(folder, size, cache, scale) for size in sizes for cache in PageCache),
        *(ReadBench(folder, size, PageCache.WARM, scale, check_both=True) for size in sizes),
        *(JournalBench(folder, size, level, scale)
          for size in sizes for level in (Durability.PROCESS, Durability.HOST)),
        JournalBench(folder, BLOCK_128KB, Durability.PROCESS, scale, alone=True),
        ApplyBench(folder, BLOCK_16MB, 1, scale, target=True),
        ApplyBench(folder, BLOCK_128KB, 64, scale, target=False),
        *(ConsolidationBench(folder, size, plain, scale) for size in sizes for plain in Plain),
        *(SealedFoldBench(folder, size, scale) for size in sizes),
        *(SealedReadBench(folder, size, scale) for size in sizes),
        S3ReadBench(s3_url, scale),
        OpenBench(shelf, scale),
        UpdateBench(shelf, scale),
        *(MemoryBench(run, kind) for kind in Memory),
    ]  # fmt: skip


def select(benches: Sequence[Bench], names: Sequence[str]) -> list[Bench]:
    """Return the benchmarks whose name is one of `names` or begins with one and a hyphen.

    Raises
    ------
    InvalidArgumentError
        If one of `names` fits none (BAD_CONFIG).
    """
    for name in names:
        if not any(_fits(bench.name, name) for bench in benches):
            raise InvalidArgumentError(
                f"there is no benchmark {name!r}; "
                f"accepted: {', '.join(bench.name for bench in benches)}, or a first word of them",
                reason=Reason.BAD_CONFIG,
            )
    return [b for b in benches if not names or any(_fits(b.name, name) for name in names)]


def run_benches(benches: Sequence[Bench], notice: Notice) -> list[Row]:
    """Run `benches` one after the other."""
    total = sum(bench.expected_s for bench in benches)
    rows, done = [], 0.0
    for bench in benches:
        notice(bench.name, done, total)
        rows.append(_run(bench, done, total, notice))
        done += bench.expected_s
    notice("", total, total)
    return rows


def _run(bench: Bench, done: float, total: float, notice: Notice) -> Row:
    def progress(share: float) -> None:
        notice(bench.name, done + share * bench.expected_s, total)

    return bench.run(progress)


def report(rows: Sequence[Row], made_with: Mapping[str, object], scale: Scale) -> dict[str, object]:
    """Return the document of a run: commit, versions, machine, configuration, rows.

    Parameters
    ----------
    rows
        What was measured.
    made_with
        Time, commit, versions and machine, JSON-able.
    scale
        How much was measured.
    """
    return {
        "format": 1,
        **made_with,
        "config": asdict(scale),
        "rows": [row.to_json() for row in rows],
    }


def _fits(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}-")
