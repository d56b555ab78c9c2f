"""Banks whose blocks are all in files, and services of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from membank.bank_service.bench.banks import PLAIN_SGD, WrittenBank, written_bank
from membank.bank_service.bench.page_cache import drop, is_cached
from membank.cli.bench.embedded import EmbeddedService
from membank.cli.bench.presets import preset_spec
from membank.wire.errors import InternalError
from membank.wire.format.layout import slot_key
from membank.wire.spec import Array, BankSpec, BlockRef, LevelSpec, Role

PAPER_PRESET = "paper_410m"
"""The configuration whose load times the paper models."""
NOTHING_RESIDENT = 1
"""Bytes of memory of a shard that keeps no block: each is let go of once it was sent."""
ALL_RESIDENT = 2 << 30
"""Bytes of memory of a shard that keeps all blocks."""


def sized_spec(
    fan_outs: Sequence[int],
    block_widths: Sequence[int],
    *,
    num_layers: int = 8,
    width: int = 512,
    dtype: str = "float32",
) -> BankSpec:
    """Return a bank whose levels have blocks of different sizes and no optimizer state.

    Parameters
    ----------
    fan_outs
        Children per node at each level.
    block_widths
        r of each level; a block has ``3 * r * num_layers * width`` elements.
    num_layers
        Layers that a block is for.
    width
        Model width.
    dtype
        Element type.
    """
    levels = tuple(
        LevelSpec(fan_out=fan_out, block_width=block_width)
        for fan_out, block_width in zip(fan_outs, block_widths, strict=True)
    )
    return BankSpec(
        name="questions", num_layers=num_layers, width=width, levels=levels, dtype=dtype,
        optimizer=PLAIN_SGD, num_partitions=2, partition_level=1,
    )  # fmt: skip


def paper_spec() -> BankSpec:
    """Return a bank with blocks of the paper's sizes, of the 410M configuration, but two paths."""
    real = preset_spec(PAPER_PRESET)
    return sized_spec(
        (2, 1, 1), [level.block_width for level in real.levels],
        num_layers=real.num_layers, width=real.width, dtype=real.dtype,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class FiledBank:
    """A bank in a folder, with the file of each block."""

    folder: Path
    """Where it is."""
    written: WrittenBank
    """What was written."""

    @classmethod
    def make(cls, folder: Path, spec: BankSpec) -> FiledBank:
        """Make a bank of random blocks in a folder that does not exist yet."""
        return cls(folder, written_bank(folder, spec))

    @property
    def spec(self) -> BankSpec:
        """What it is."""
        return self.written.bank.spec

    def blocks(self, level: int) -> list[BlockRef]:
        """Return the blocks of a level."""
        return [BlockRef(level, n) for n in range(self.spec.num_clusters(level))]

    def file(self, ref: BlockRef) -> Path:
        """Return the file that holds a block's weight."""
        slot = self.written.records[ref].entry.slot
        return self.folder / slot_key(self.spec.partition_of(ref), ref.level, Role.WEIGHT, slot)

    def drop(self, refs: Sequence[BlockRef]) -> None:
        """Take the files of blocks out of the page cache."""
        drop([self.file(ref) for ref in refs])

    def can_drop(self) -> bool:
        """Say whether this file system gives pages up when told to."""
        ref = next(iter(self.written.records))
        self.drop([ref])
        return not is_cached(self.file(ref))

    def check(self, ref: BlockRef, weight: Array) -> None:
        """Compare what a fetch brought with what was written.

        Raises
        ------
        InternalError
            If they differ: what was measured was no fetch of the block.
        """
        if not np.array_equal(weight.view(np.uint8), self.written.read(ref).view(np.uint8)):
            raise InternalError(f"block {ref} came with another content than was written")

    @contextmanager
    def served(self, *, resident_bytes: int) -> Iterator[str]:
        """Serve the bank by one shard process; give its endpoint."""
        service = EmbeddedService(
            self.folder, self.spec, num_shards=1, resident_bytes=resident_bytes,
            make=lambda folder, spec: None,
        )  # fmt: skip
        with service:
            yield service.endpoint
