"""The two transactions of a deletion, the answer to one of which may be lost with its caller."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from membank.trainer.deletion import BlockExchange, TopicWords
from membank.wire.records import Applied
from membank.wire.spec import Array, BlockRef


class DyingExchange:
    """Hands transactions on, and dies after one of them if it is told to.

    Parameters
    ----------
    exchange
        Where they are made.
    """

    def __init__(self, exchange: BlockExchange) -> None:
        self._exchange = exchange
        self.die_at = ""
        """Where the caller dies, once: ``before destroy``, ``after install`` and the like."""
        self.words: dict[BlockRef, TopicWords] = {}
        """What the tree was told at last."""
        self.calls: list[str] = []
        """Transactions, in order."""

    def destroy(
        self,
        topics: Collection[BlockRef],
        blocks: Collection[BlockRef],
        *,
        request_id: str,
        dry_run: bool = False,
    ) -> Applied:
        self._perhaps_die("before destroy")
        applied = self._exchange.destroy(topics, blocks, request_id=request_id, dry_run=dry_run)
        self._note("destroy")
        return applied

    def install(
        self,
        contents: Mapping[BlockRef, Array],
        words: Mapping[BlockRef, TopicWords],
        *,
        expected: Mapping[BlockRef, int],
        request_id: str,
    ) -> Applied:
        self._perhaps_die("before install")
        applied = self._exchange.install(contents, words, expected=expected, request_id=request_id)
        self.words = dict(words)
        self._note("install")
        return applied

    def _note(self, name: str) -> None:
        self.calls.append(name)
        self._perhaps_die(f"after {name}")

    def _perhaps_die(self, where: str) -> None:
        if self.die_at == where:
            self.die_at = ""
            raise KeyboardInterrupt(where)
