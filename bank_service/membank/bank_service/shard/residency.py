"""Which contents stay in memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from membank.bank_service.shard.content import BlockRecord
from membank.wire.spec import BlockRef

Records = dict[BlockRef, BlockRecord]
"""Blocks of one partition; a missing one was never changed and is not resident."""


class Residency:
    """Keeps contents of all partitions of a shard in memory, the least recently used ones out.

    Only contents that storage holds too can be let go; dirty ones are kept besides the budget
    until a consolidation has written them.

    Parameters
    ----------
    budget_bytes
        Bytes of contents to keep at most, dirty ones not counted.
    """

    # Threads: every method is called with the shard's state lock held.

    def __init__(self, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._sizes: dict[BlockRef, int] = {}
        self._clean: OrderedDict[BlockRef, Records] = OrderedDict()
        self._clean_bytes = 0
        self.num_bytes = 0
        """Bytes of all contents in memory."""

    def put(self, records: Records, ref: BlockRef, record: BlockRecord) -> None:
        """Make `record` what `records` knows of `ref`; others may lose their content for it."""
        self._forget(ref)
        records[ref] = record
        if record.content is None:
            return
        size = record.content.num_bytes
        self._sizes[ref] = size
        self.num_bytes += size
        if not record.is_dirty:
            self._clean[ref] = records
            self._clean_bytes += size
            self._evict()

    def touch(self, ref: BlockRef) -> None:
        """Note that `ref` was used."""
        if ref in self._clean:
            self._clean.move_to_end(ref)

    def _evict(self) -> None:
        while self._clean_bytes > self._budget_bytes:
            ref, records = next(iter(self._clean.items()))
            self._forget(ref)
            records[ref] = replace(records[ref], content=None)

    def _forget(self, ref: BlockRef) -> None:
        size = self._sizes.pop(ref, 0)
        self.num_bytes -= size
        if self._clean.pop(ref, None) is not None:
            self._clean_bytes -= size
