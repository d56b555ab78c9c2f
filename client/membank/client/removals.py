"""What a client does when it hears that a block may not be used any more: overwrite idle memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from membank.wire.errors import Reason
from membank.wire.records import BlockHeader, TransactionReport, UpdateResult
from membank.wire.spec import BlockRef, BlockState
from membank.wire.wiping import wipe_pools

STATE_OF_REFUSAL = {
    Reason.BLOCK_WITHHELD: BlockState.WITHHELD,
    Reason.BLOCK_DELETED: BlockState.DELETED,
}
"""What a refused push says of its block."""

_MAX_KNOWN = 65_536
"""Removals that are remembered; one that was forgotten is heard of as if it were a new one."""


class HeardRemovals:
    """Wipes this process's pools, once for each removal that is heard of. Safe to use from threads.

    Memory into which blocks were fetched, or gradients copied to be sent, is used again by the next
    ones. Until then it holds what it held, whoever may not read it any more.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[BlockRef, int] = OrderedDict()

    def hear(self, ref: BlockRef, version: int, state: BlockState) -> None:
        """Take note of how a block is by now."""
        if self._is_new(ref, version, state):
            wipe_pools()

    def hear_answer(self, headers: Iterable[BlockHeader]) -> None:
        """Take note of what a fetch was answered."""
        self._hear_all((header.ref, header.version, header.state) for header in headers)

    def hear_results(self, results: Iterable[UpdateResult]) -> None:
        """Take note of what a push was answered."""
        self._hear_all(
            (result.ref, result.version, state)
            for result in results
            if result.reason is not None
            and (state := STATE_OF_REFUSAL.get(result.reason)) is not None
        )

    def hear_report(self, report: TransactionReport) -> None:
        """Take note of a transaction of the client's own."""
        self._hear_all((each.ref, each.version_after, each.state_after) for each in report.changes)

    def _hear_all(self, changes: Iterable[tuple[BlockRef, int, BlockState]]) -> None:
        # All are noted before anything is wiped, which is then done once.
        if [change for change in changes if self._is_new(*change)]:
            wipe_pools()

    def _is_new(self, ref: BlockRef, version: int, state: BlockState) -> bool:
        if state is BlockState.ACTIVE or self._known.get(ref, -1) >= version:
            return False
        self._known[ref] = version
        if len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)
        return True
