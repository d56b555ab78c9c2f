"""What sealing costs: the same work on a sealed bank and on a plain one, in turn."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from membank.bank_service.bench.banks import (
    ADAMW,
    PLAIN_SGD,
    BlockSize,
    WrittenBank,
    flat_spec,
    written_bank,
)
from membank.bank_service.bench.contract import Progress, Row
from membank.bank_service.bench.measure import interleave, rates, stopwatch
from membank.bank_service.bench.page_cache import drop
from membank.bank_service.bench.pusher import Pusher
from membank.bank_service.bench.scale import Scale
from membank.bank_service.shard import ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.store.bank import Bank
from membank.bank_service.store.open_objects import open_objects

_CONFIG = ShardConfig(durability=Durability.STORE, consolidate_bytes=1 << 40)
"""The journal in the bank's storage, which a sealed bank needs; folded when the benchmark says so."""


class SealedFoldBench:
    """Folds the journal of a sealed bank, and that of a plain one.

    Parameters
    ----------
    folder
        Where both are made.
    size
        Size of their blocks.
    scale
        How much is written.
    """

    def __init__(self, folder: Path, size: BlockSize, scale: Scale) -> None:
        self._folder = folder
        self._size = size
        self._scale = scale
        self.name = f"seal-consolidate-{size.label}"
        self.expected_s = 30.0

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        folder = self._folder / self.name
        weight_bytes = flat_spec(self._size, 1, optimizer=ADAMW).weight_bytes(1)
        num_blocks = max(4, self._scale.sample_bytes // weight_bytes)
        spec = flat_spec(self._size, num_blocks, optimizer=ADAMW, num_partitions=1)
        total = num_blocks * (weight_bytes + spec.optimizer_bytes(1))
        refs = list(spec.blocks())
        sealed = Bank.create(str(folder / "bank"), spec, keyring=str(folder / "keyring"))
        ours = Pusher(sealed, refs, _CONFIG)
        raw = Pusher(Bank.create(str(folder / "plain"), spec), refs, _CONFIG)

        def fold(pusher: Pusher) -> float:
            pusher.push(num_blocks)
            # Both sides begin with nothing left to be written back.
            os.sync()
            with stopwatch() as watch:
                pusher.shard.consolidate()
            return watch.seconds

        pairs = interleave(
            lambda: fold(ours),
            lambda: fold(raw),
            num_pairs=self._scale.num_slow_pairs,
            progress=progress,
        )
        for pusher in (ours, raw):
            pusher.shard.close(consolidate=False)
        return Row(
            name=self.name,
            what=f"{num_blocks} changed blocks of {weight_bytes} bytes with AdamW's state ({total} "
            f"bytes, {num_blocks * len(spec.roles)} objects) of one partition folded, as many replaced "
            "ones and their journal removed, sealed / the same on a plain bank; durability store",
            unit="MB/s",
            target=None,
            samples=rates(pairs, total / 1e6),
        )


class SealedReadBench:
    """Reads blocks of a sealed bank that are not resident, and of a plain one.

    Parameters
    ----------
    folder
        Where both are made.
    size
        Size of their blocks.
    scale
        How much is read.
    """

    def __init__(self, folder: Path, size: BlockSize, scale: Scale) -> None:
        self._folder = folder
        self._size = size
        self._scale = scale
        self.name = f"seal-read-{size.label}"
        self.expected_s = 8.0

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        folder = self._folder / self.name
        weight_bytes = flat_spec(self._size, 1, optimizer=PLAIN_SGD).weight_bytes(1)
        num_blocks = max(4, self._scale.sample_bytes // weight_bytes)
        spec = flat_spec(self._size, num_blocks, optimizer=PLAIN_SGD)
        keyring = str(folder / "keyring")
        ours = written_bank(open_objects(str(folder / "bank"), keyring=keyring), spec)
        raw = written_bank(open_objects(str(folder / "plain")), spec)
        pairs = interleave(
            lambda: _read_all(ours, [folder / "bank", folder / "keyring"]),
            lambda: _read_all(raw, [folder / "plain"]),
            num_pairs=self._scale.num_pairs,
            progress=progress,
        )
        return Row(
            name=self.name,
            what=f"weights of {num_blocks} blocks of {weight_bytes} bytes that are not resident, "
            "opened and CRC checked, sealed / the same on a plain bank; both with the page cache cold",
            unit="MB/s",
            target=None,
            samples=rates(pairs, num_blocks * weight_bytes / 1e6),
        )


def _read_all(written: WrittenBank, folders: Iterable[Path]) -> float:
    drop(path for folder in folders for path in folder.rglob("*") if path.is_file())
    with stopwatch() as watch:
        for ref in written.records:
            written.read(ref)
    return watch.seconds
