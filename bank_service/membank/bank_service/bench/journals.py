"""Appending an update to the journal, beside appending as many bytes to a file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from membank.bank_service.bench.banks import PLAIN_SGD, BlockSize, flat_spec, update_of
from membank.bank_service.bench.contract import Progress, Row, Target
from membank.bank_service.bench.engine import JournalRig
from membank.bank_service.bench.measure import interleave, rates, stopwatch
from membank.bank_service.bench.scale import Scale
from membank.bank_service.shard.config import Durability
from membank.wire.spec import BlockRef

_TARGET = Target(0.8, at_least=True)


class JournalBench:
    """Appends updates of one block each, one after the other, as a single pusher makes them.

    Parameters
    ----------
    folder
        Where the journal lies.
    size
        Size of the block; the gradient has as many bytes.
    durability
        What an append survives.
    scale
        How much is appended.
    """

    def __init__(self, folder: Path, size: BlockSize, durability: Durability, scale: Scale) -> None:
        self._folder = folder
        self._size = size
        self._durability = durability
        self._scale = scale
        self.name = f"journal-{size.label}-{durability.value}"
        self.expected_s = 3.0

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        folder = self._folder / self.name
        folder.mkdir(parents=True)
        spec = flat_spec(self._size, 1, optimizer=PLAIN_SGD)
        ref = BlockRef(1, 0)
        values = np.random.default_rng(0).standard_normal(spec.block_shape(1), np.float32)
        update = update_of("request", ref, 0, values)
        is_synced = self._durability is Durability.HOST
        rig = JournalRig(folder / "journal", sync=is_synced)
        num_bytes = rig.frame_bytes(update)
        count = max(4, self._scale.sample_bytes // num_bytes)
        # Not zeros: those would all come from one page of the kernel's, which no real data does.
        plain = os.urandom(num_bytes)

        def ours() -> float:
            with stopwatch() as watch:
                for _ in range(count):
                    rig.append(update)
            rig.clear()
            return watch.seconds

        def raw() -> float:
            path = folder / "plain"
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND)
            try:
                with stopwatch() as watch:
                    for _ in range(count):
                        _append(handle, plain)
                        if is_synced:
                            os.fdatasync(handle)
            finally:
                os.close(handle)
                # Before the kernel writes it back, which would slow whatever is measured next.
                path.unlink()
            return watch.seconds

        pairs = interleave(ours, raw, num_pairs=self._scale.num_pairs, progress=progress)
        rig.close()
        return Row(
            name=self.name,
            what=f"{count} frames of {num_bytes} bytes, encoded, checksummed and appended "
            f"({self._durability.value}) / writev of as many bytes to one file"
            + (", fdatasync after each" if is_synced else ""),
            unit="MB/s",
            target=_TARGET,
            samples=rates(pairs, count * num_bytes / 1e6),
        )


def _append(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.writev(handle, [view]) :]
