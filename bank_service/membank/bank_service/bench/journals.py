"""Appending updates to the journal, beside appending as many bytes to a file."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from membank.bank_service.bench.banks import PLAIN_SGD, BlockSize, flat_spec, update_of
from membank.bank_service.bench.contract import Progress, Row, Target
from membank.bank_service.bench.engine import JournalRig, StagedUpdate
from membank.bank_service.bench.measure import interleave, rates, stopwatch
from membank.bank_service.bench.scale import Scale
from membank.bank_service.shard.config import Durability
from membank.bank_service.store.local_objects import write_fully
from membank.wire.spec import BlockRef

_TARGET = Target(0.8, at_least=True)
_BATCH_BYTES = 1 << 20
"""About what pushers that wait for a journal bring together: eight updates of 128 KB."""


class JournalBench:
    """Appends updates of one block each, in batches, as a partition under load does.

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
    alone
        True to append each update by itself, as a single pusher makes them; for information.
    """

    def __init__(
        self,
        folder: Path,
        size: BlockSize,
        durability: Durability,
        scale: Scale,
        *,
        alone: bool = False,
    ) -> None:
        self._folder = folder
        self._size = size
        self._durability = durability
        self._scale = scale
        self._alone = alone
        self.name = f"journal-{size.label}-{durability.value}{'-alone' if alone else ''}"
        self.expected_s = 3.0

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        folder = self._folder / self.name
        folder.mkdir(parents=True)
        spec = flat_spec(self._size, 1, optimizer=PLAIN_SGD)
        per_batch = 1 if self._alone else max(1, round(_BATCH_BYTES / spec.weight_bytes(1)))
        rng = np.random.default_rng(0)
        # Each has a gradient of its own: one would stay in the processor's cache.
        gradients = [rng.standard_normal(spec.block_shape(1), np.float32) for _ in range(per_batch)]
        batch = [
            StagedUpdate.of(update_of(f"request-{number}", BlockRef(1, 0), number, values))
            for number, values in enumerate(gradients)
        ]
        is_synced = self._durability is Durability.HOST
        rig = JournalRig(folder / "journal", sync=is_synced)
        lengths = rig.buffer_bytes(batch)
        count = max(4, self._scale.sample_bytes // sum(lengths))
        # Not zeros: those would all come from one page of the kernel's, which no real data does.
        plain = [os.urandom(length) for length in lengths]

        def ours() -> float:
            with stopwatch() as watch:
                for _ in range(count):
                    rig.append(batch)
            rig.clear()
            return watch.seconds

        def raw() -> float:
            path = folder / "plain"
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND)
            try:
                with stopwatch() as watch:
                    for _ in range(count):
                        write_fully(handle, plain)
                        if is_synced:
                            os.fdatasync(handle)
            finally:
                os.close(handle)
                # Before the kernel writes it back, which would slow whatever is measured next.
                path.unlink()
            return watch.seconds

        pairs = interleave(ours, raw, num_pairs=self._scale.num_pairs, progress=progress)
        rig.close()
        updates = f"{per_batch} updates of {spec.weight_bytes(1)} bytes"
        return Row(
            name=self.name,
            what=f"{count} batches of {updates} whose bytes were checked on arrival, encoded, "
            "checksummed and appended "
            f"({self._durability.value}) / writev of as many buffers of the same sizes to one file"
            + (", fdatasync after each" if is_synced else ""),
            unit="MB/s",
            target=None if self._alone else _TARGET,
            samples=rates(pairs, count * sum(lengths) / 1e6),
        )
