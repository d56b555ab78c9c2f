"""What a partition knows of its blocks."""

from __future__ import annotations

from collections.abc import Mapping

from membank.bank_service.shard.content import INITIAL_ENTRY, BlockRecord
from membank.wire.format import Entry
from membank.wire.spec import BlockRef


class BlockTable:
    """The blocks of one partition: the manifest in force, and on top of it what is newer or in memory.

    A block that is neither newer than the manifest nor in memory takes no room here: a partition
    opens, and an update costs, the same whatever the number of its blocks.

    Parameters
    ----------
    entries
        Entries of the manifest in force; not changed by anybody from now on.
    """

    # Threads: every method is called with the shard's state lock held.

    def __init__(self, entries: Mapping[BlockRef, Entry]) -> None:
        self._entries = entries
        self._records: dict[BlockRef, BlockRecord] = {}
        self._dirty: dict[BlockRef, BlockRecord] = {}
        self.dirty_bytes = 0
        """Bytes of the contents that only memory and the journal hold."""

    def record(self, ref: BlockRef) -> BlockRecord:
        """Return what is known of `ref`."""
        record = self._records.get(ref)
        return record if record is not None else BlockRecord(self._entries.get(ref, INITIAL_ENTRY))

    def set(self, ref: BlockRef, record: BlockRecord) -> None:
        """Make `record` what is known of `ref`."""
        self._drop_dirty(ref)
        self._records[ref] = record
        if record.is_dirty and record.content is not None:
            self._dirty[ref] = record
            self.dirty_bytes += record.content.num_bytes

    def forget_content(self, ref: BlockRef) -> None:
        """Let go of the content of a clean block."""
        entry = self._records.pop(ref).entry
        if self._entries.get(ref, INITIAL_ENTRY) != entry:
            # The manifest does not say it yet: a transaction is being put in force.
            self._records[ref] = BlockRecord(entry)

    def dirty(self) -> dict[BlockRef, BlockRecord]:
        """Return the blocks whose content only memory and the journal hold."""
        return dict(self._dirty)

    def rebase(self, entries: Mapping[BlockRef, Entry]) -> None:
        """Take over a manifest that was put in force; it holds everything that is not dirty."""
        self._entries = entries
        bare = [ref for ref, record in self._records.items() if record.content is None]
        for ref in bare:
            del self._records[ref]

    def _drop_dirty(self, ref: BlockRef) -> None:
        old = self._dirty.pop(ref, None)
        if old is not None and old.content is not None:
            self.dirty_bytes -= old.content.num_bytes
