"""The two transactions of a deletion, on a bank in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from fake_bank import FakeBank
from fake_shard import Held
from membank.trainer.deletion import Destroyed, TopicWords
from membank.wire.records import TransactionReport
from membank.wire.spec import Array, BlockRef, BlockState


class FakeExchange:
    """Deletes and swaps as the service would, each request once; may be made to die.

    Parameters
    ----------
    bank
        The bank.
    """

    def __init__(self, bank: FakeBank) -> None:
        self._bank = bank
        self.die_after = ""
        """Name of the transaction whose answer is lost, once."""
        self.words: dict[BlockRef, TopicWords] = {}
        """What the tree was told."""
        self.calls: list[str] = []
        """Transactions, in order."""

    def destroy(
        self,
        topics: Collection[BlockRef],
        blocks: Collection[BlockRef],
        *,
        request_id: str,
        dry_run: bool = False,
    ) -> Destroyed:
        self.calls.append("destroy")
        refs = {ref for topic in topics for ref in self._bank.spec.subtree(topic)} | {*blocks}

        def delete(ref: BlockRef, kept: Held) -> None:
            kept.weight, kept.state = np.full_like(kept.weight, np.nan), BlockState.DELETED

        report = self._bank.transact(
            "delete", sorted(refs), delete, request_id=request_id, dry_run=dry_run
        )
        self._perhaps_die("destroy")
        return Destroyed(report=report, receipt=b"{}")

    def install(
        self,
        contents: Mapping[BlockRef, Array],
        words: Mapping[BlockRef, TopicWords],
        *,
        expected: Mapping[BlockRef, int],
        request_id: str,
    ) -> TransactionReport:
        self.calls.append("install")
        report = self._bank.swap(
            dict(contents), dict(expected), request_id=request_id, dry_run=False
        )
        self.words = dict(words)
        self._perhaps_die("install")
        return report

    def _perhaps_die(self, name: str) -> None:
        if self.die_after == name:
            self.die_after = ""
            raise KeyboardInterrupt(f"after {name}")
