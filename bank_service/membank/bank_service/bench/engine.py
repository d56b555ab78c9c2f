"""Where the benchmarks touch parts of the engine below `Shard` and `Bank`."""

from __future__ import annotations

from pathlib import Path

from membank.bank_service.shard.optimizer import kernel_fingerprint
from membank.bank_service.shard.update_frame import AppliedBlock, encode_update
from membank.bank_service.store.journal import FrameKind, LocalJournal, Ownership
from membank.wire.format import NO_SLOT, Entry
from membank.wire.records import Update, UpdateResult


class JournalRig:
    """A journal and what a partition does to append an update to it.

    Parameters
    ----------
    folder
        Directory of the journal.
    sync
        True where each append survives a loss of power.
    """

    def __init__(self, folder: Path, *, sync: bool) -> None:
        self._journal = LocalJournal.open(folder, "bench/0", sync=sync)
        self._journal.begin(Ownership(1, "bench", ""), 0)
        self._kernel = kernel_fingerprint()

    def append(self, update: Update) -> None:
        """Append an update whose gradients were all accepted."""
        self._journal.append(FrameKind.UPDATE, [self._payload(update)])

    def clear(self) -> None:
        """Remove everything that was appended."""
        self._journal.trim(self._journal.last_lsn)

    def close(self) -> None:
        """Release the files."""
        self._journal.close()

    def frame_bytes(self, update: Update) -> int:
        """Return the bytes that appending `update` adds to the journal."""
        before = self._journal.num_bytes
        self.append(update)
        added = self._journal.num_bytes - before
        self.clear()
        return added

    def _payload(self, update: Update) -> list[bytes | memoryview]:
        results = [
            UpdateResult(ref=gradient.ref, accepted=True, version=gradient.base_version + 1)
            for gradient in update.gradients
        ]
        # The CRC of what the update makes of the block is the optimizer's business, not the log's.
        applied = [
            AppliedBlock(
                gradient.ref,
                Entry(slot=NO_SLOT, version=gradient.base_version + 1, crcs=(0,)),
                gradient.values,
            )
            for gradient in update.gradients
        ]
        return encode_update(FrameKind.UPDATE, update, results, applied, self._kernel)
