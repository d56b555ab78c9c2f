"""Where the benchmarks touch parts of the engine below `Shard` and `Bank`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from membank.bank_service.shard.optimizer import kernel_fingerprint
from membank.bank_service.shard.update_frame import AppliedBlock, encode_update
from membank.bank_service.store.journal import FrameKind, LocalJournal, Ownership, Payload
from membank.bank_service.store.journal.frames import encode_batch
from membank.wire.format import NO_SLOT, Entry
from membank.wire.records import Update, UpdateResult


@dataclass(frozen=True, slots=True)
class StagedUpdate:
    """An update whose gradients were all accepted, as a partition knows it before it is journalled."""

    update: Update
    """The push."""
    results: tuple[UpdateResult, ...]
    """What became of its gradients."""
    blocks: tuple[AppliedBlock, ...]
    """What it made of the blocks."""

    @classmethod
    def of(cls, update: Update) -> StagedUpdate:
        """Stage `update`, but for computing anything."""
        results = tuple(
            UpdateResult(ref=gradient.ref, accepted=True, version=gradient.base_version + 1)
            for gradient in update.gradients
        )
        blocks = tuple(
            AppliedBlock(
                gradient.ref,
                Entry(slot=NO_SLOT, version=gradient.base_version + 1, crcs=(0,)),
                gradient.values,
                gradient.crc32c,
            )
            for gradient in update.gradients
        )
        return cls(update, results, blocks)


class JournalRig:
    """A journal and what a partition does to append updates to it.

    Parameters
    ----------
    folder
        Directory of the journal.
    sync
        True where each batch survives a loss of power.
    """

    def __init__(self, folder: Path, *, sync: bool) -> None:
        self._journal = LocalJournal.open(folder, "bench/0", sync=sync)
        self._journal.begin(Ownership(1, "bench", ""), 0)
        self._kernel = kernel_fingerprint()

    def append(self, batch: Sequence[StagedUpdate]) -> None:
        """Append a batch of updates."""
        self._journal.append(FrameKind.UPDATE, [self._payload(staged) for staged in batch])

    def buffer_bytes(self, batch: Sequence[StagedUpdate]) -> list[int]:
        """Return the lengths of the buffers that appending `batch` writes, in their order."""
        payloads = [self._payload(staged) for staged in batch]
        return list(map(len, encode_batch(FrameKind.UPDATE, self._journal.last_lsn, payloads)))

    def clear(self) -> None:
        """Remove everything that was appended."""
        self._journal.trim(self._journal.last_lsn)

    def close(self) -> None:
        """Release the files."""
        self._journal.close()

    def _payload(self, staged: StagedUpdate) -> Payload:
        return encode_update(
            FrameKind.UPDATE, staged.update, staged.results, staged.blocks, self._kernel
        )
