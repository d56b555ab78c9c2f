"""Reading a block that is not resident, beside reading its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import numpy as np

from membank.bank_service.bench.banks import (
    PLAIN_SGD,
    BlockSize,
    WrittenBank,
    flat_spec,
    written_bank,
)
from membank.bank_service.bench.contract import Progress, Row, Target
from membank.bank_service.bench.measure import interleave, rates, stopwatch
from membank.bank_service.bench.page_cache import drop, is_cached
from membank.bank_service.bench.scale import Scale
from membank.wire.crc import crc32c
from membank.wire.format.layout import slot_key
from membank.wire.spec import Role

_TARGET = Target(0.7, at_least=True)


class PageCache(StrEnum):
    """State of the page cache before each sample, the same for both sides."""

    WARM = "warm"
    COLD = "cold"


class ReadBench:
    """Reads every block of a bank once per sample.

    Parameters
    ----------
    folder
        Where the bank is made.
    size
        Size of its blocks.
    cache
        Whether files are in the page cache.
    scale
        How much is read.
    check_both
        True to compute the CRC on the plain side as well: how much of the difference is the check,
        and how much the store. For information.
    """

    def __init__(
        self,
        folder: Path,
        size: BlockSize,
        cache: PageCache,
        scale: Scale,
        *,
        check_both: bool = False,
    ) -> None:
        self._folder = folder
        self._size = size
        self._cache = cache
        self._scale = scale
        self._check_both = check_both
        self.name = f"read-{size.label}-{cache.value}{'-both-checked' if check_both else ''}"
        self.expected_s = 4.0

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        weight_bytes = flat_spec(self._size, 1, optimizer=PLAIN_SGD).weight_bytes(1)
        num_blocks = max(4, self._scale.sample_bytes // weight_bytes)
        spec = flat_spec(self._size, num_blocks, optimizer=PLAIN_SGD)
        written = written_bank(self._folder / self.name, spec)
        files = _slot_files(written)
        row = Row(
            name=self.name,
            what=f"weights of {num_blocks} blocks of {weight_bytes} bytes that are not resident, "
            f"CRC checked / np.fromfile of the same files{', and their CRC' * self._check_both}, "
            f"both with the page cache {self._cache.value}",
            unit="MB/s",
            target=None if self._check_both else _TARGET,
        )
        if self._cache is PageCache.COLD:
            drop(files)
            if is_cached(files[0]):
                return replace(row, reason="this file system keeps files in memory regardless")

        def ours() -> float:
            self._prepare(files)
            with stopwatch() as watch:
                for ref in written.records:
                    written.read(ref)
            return watch.seconds

        def raw() -> float:
            self._prepare(files)
            with stopwatch() as watch:
                for file in files:
                    data = np.fromfile(file, np.uint8)
                    if self._check_both:
                        crc32c(data)
                    # As for ours: what is read is let go of before the next is.
                    del data
            return watch.seconds

        pairs = interleave(ours, raw, num_pairs=self._scale.num_pairs, progress=progress)
        return replace(row, samples=rates(pairs, num_blocks * weight_bytes / 1e6))

    def _prepare(self, files: Sequence[Path]) -> None:
        if self._cache is PageCache.COLD:
            drop(files)


def _slot_files(written: WrittenBank) -> list[Path]:
    spec = written.bank.spec
    return [
        Path(written.bank.url)
        / slot_key(spec.partition_of(ref), ref.level, Role.WEIGHT, record.entry.slot)
        for ref, record in written.records.items()
    ]
