"""Which contents stay in memory."""

from __future__ import annotations

from collections import OrderedDict

from membank.bank_service.shard.content import BlockRecord
from membank.bank_service.shard.table import BlockTable
from membank.wire.spec import BlockRef


class Residency:
    """Keeps the contents of all partitions of a shard within a budget, the least recently used ones out.

    Only contents that storage holds too can be let go. Dirty ones count as well: partitions
    write theirs back before they fill their share, so that there is always something to let go.

    Parameters
    ----------
    budget_bytes
        Bytes of contents to keep at most.
    """

    # Threads: every method is called with the shard's state lock held.

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._sizes: dict[BlockRef, int] = {}
        self._clean: OrderedDict[BlockRef, BlockTable] = OrderedDict()
        self.num_bytes = 0
        """Bytes of all contents in memory."""

    def put(self, table: BlockTable, ref: BlockRef, record: BlockRecord) -> None:
        """Make `record` what `table` knows of `ref`; others may lose their content for it."""
        self._forget(ref)
        table.set(ref, record)
        if record.content is None:
            return
        size = record.content.num_bytes
        self._sizes[ref] = size
        self.num_bytes += size
        if not record.is_dirty:
            self._clean[ref] = table
        self._evict()

    def touch(self, ref: BlockRef) -> None:
        """Note that `ref` was used."""
        if ref in self._clean:
            self._clean.move_to_end(ref)

    def lend(self, num_bytes: int) -> None:
        """Count bytes that a consolidation holds although the blocks have moved on; negative ends it."""
        self.num_bytes += num_bytes
        self._evict()

    def _evict(self) -> None:
        while self.num_bytes > self._budget_bytes and self._clean:
            ref, table = next(iter(self._clean.items()))
            self._forget(ref)
            table.forget_content(ref)

    def _forget(self, ref: BlockRef) -> None:
        self.num_bytes -= self._sizes.pop(ref, 0)
        self._clean.pop(ref, None)
