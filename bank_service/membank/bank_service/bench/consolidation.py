"""Folding updates into slots, beside writing as many bytes."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path

from membank.bank_service.bench.banks import ADAMW, BlockSize, flat_spec
from membank.bank_service.bench.contract import Progress, Row, Target
from membank.bank_service.bench.measure import interleave, rates, stopwatch
from membank.bank_service.bench.pusher import Pusher
from membank.bank_service.bench.scale import Scale
from membank.bank_service.store.bank import Bank
from membank.bank_service.store.local_objects import sync_folder

_TARGET = Target(0.5, at_least=True)
_SYNC_THREADS = 8
"""As many as a local bank uses."""
_TRAILER_BYTES = 4
"""What a slot holds besides the content: its CRC."""


class Plain(StrEnum):
    """The plain way to write the same bytes."""

    FILES = "files"
    """As many files of the same size, written one after the other, synced by 8 threads."""
    ONE_FILE = "one-file"
    """One file, synced once."""


class ConsolidationBench:
    """Updates every block of a partition, then folds its journal.

    By default a partition is folded when its journal holds 64 MB, so that many are updated.

    Parameters
    ----------
    folder
        Where the bank is made.
    size
        Size of its blocks.
    plain
        What it is compared with.
    scale
        How much is written.
    """

    def __init__(self, folder: Path, size: BlockSize, plain: Plain, scale: Scale) -> None:
        self._folder = folder
        self._size = size
        self._plain = plain
        self._scale = scale
        suffix = "" if plain is Plain.FILES else f"-{plain.value}"
        self.name = f"consolidate-{size.label}{suffix}"
        self.expected_s = 15.0

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        folder = self._folder / self.name
        one = flat_spec(self._size, 1, optimizer=ADAMW)
        block_bytes = one.weight_bytes(1) + one.optimizer_bytes(1)
        num_blocks = max(4, self._scale.sample_bytes // one.weight_bytes(1))
        spec = flat_spec(self._size, num_blocks, optimizer=ADAMW, num_partitions=1)
        num_files = num_blocks * len(spec.roles)
        pusher = Pusher(Bank.create(str(folder / "bank"), spec), list(spec.blocks()))
        # Not zeros: those would all come from one page of the kernel's, which no real data does.
        data = os.urandom(block_bytes // len(spec.roles) + _TRAILER_BYTES)

        def ours() -> float:
            pusher.push(num_blocks)
            # Both sides begin with nothing left to be written back.
            os.sync()
            with stopwatch() as watch:
                pusher.shard.consolidate()
            return watch.seconds

        def raw() -> float:
            plain = folder / "plain"
            plain.mkdir()
            os.sync()
            with stopwatch() as watch:
                _write(plain, data, num_files, self._plain)
            shutil.rmtree(plain)
            return watch.seconds

        pairs = interleave(ours, raw, num_pairs=self._scale.num_slow_pairs, progress=progress)
        pusher.shard.close(consolidate=False)
        total = num_blocks * block_bytes
        how = (
            f"writing {num_files} files of the same size one after the other, then fdatasync by "
            f"{_SYNC_THREADS} threads and fsync of the folder"
            if self._plain is Plain.FILES
            else "writing one file and one fdatasync"
        )
        return Row(
            name=self.name,
            what=f"{num_blocks} changed blocks with optimizer state ({total} bytes, {num_files} "
            f"files) of one partition written, synced and named by a manifest, the journal trimmed "
            f"and as many replaced files removed / {how}; nothing is removed there",
            unit="MB/s",
            target=_TARGET if self._plain is Plain.FILES else None,
            samples=rates(pairs, total / 1e6),
        )


def _write(folder: Path, data: bytes, count: int, plain: Plain) -> None:
    if plain is Plain.ONE_FILE:
        with (folder / "one").open("xb", buffering=0) as file:
            for _ in range(count):
                file.write(data)
            os.fdatasync(file.fileno())
        return
    paths = [folder / str(index) for index in range(count)]
    for path in paths:
        with path.open("xb", buffering=0) as file:
            file.write(data)
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        list(pool.map(_sync, paths))
    sync_folder(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(handle)
    finally:
        os.close(handle)
