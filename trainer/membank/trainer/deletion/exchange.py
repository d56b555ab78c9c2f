"""Putting trained blocks in the place of those that held what is to be deleted.

A swap alone would leave the old content in retained revisions, snapshots, journals and optimizer
state. So the blocks are deleted first, every version of them, and then created anew. A transaction
changes a block once; hence two. In between a reader's path ends above the first of these blocks:
the answer is shorter and says so, and nothing of the old content is served any more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from membank.client import BankClient, Transaction
from membank.wire.records import Applied
from membank.wire.spec import Array, BlockRef


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicWords:
    """What the tree says of a topic to people."""

    label: str
    """Its label; empty = none."""
    num_documents: int
    """Documents in it."""


class BlockExchange(Protocol):
    """The two transactions of a deletion; each may be repeated under its request id."""

    def destroy(
        self,
        topics: Collection[BlockRef],
        blocks: Collection[BlockRef],
        *,
        request_id: str,
        dry_run: bool = False,
    ) -> Applied:
        """Delete topics with all under them, and single blocks, in every retained version."""
        ...

    def install(
        self,
        contents: Mapping[BlockRef, Array],
        words: Mapping[BlockRef, TopicWords],
        *,
        expected: Mapping[BlockRef, int],
        request_id: str,
    ) -> Applied:
        """Create deleted blocks anew, with what the tree says of them."""
        ...


class ServedExchange:
    """The transactions of a served bank.

    Parameters
    ----------
    client
        A connected client that may delete; it stays the caller's to close.
    """

    def __init__(self, client: BankClient) -> None:
        self._client = client

    def destroy(
        self,
        topics: Collection[BlockRef],
        blocks: Collection[BlockRef],
        *,
        request_id: str,
        dry_run: bool = False,
    ) -> Applied:
        # docstring inherited
        with self._client.transaction(dry_run=dry_run, request_id=request_id) as transaction:
            for topic in sorted(topics):
                transaction.delete(topic)
            for ref in sorted(blocks):
                transaction.delete(ref, only_block=True)
        return _applied(transaction)

    def install(
        self,
        contents: Mapping[BlockRef, Array],
        words: Mapping[BlockRef, TopicWords],
        *,
        expected: Mapping[BlockRef, int],
        request_id: str,
    ) -> Applied:
        # docstring inherited
        with self._client.transaction(request_id=request_id) as transaction:
            for ref, weight in sorted(contents.items()):
                transaction.swap(ref, weight, expected_version=expected.get(ref))
            for ref, said in sorted(words.items()):
                transaction.place(ref, label=said.label, num_documents=said.num_documents)
        return _applied(transaction)


def _applied(transaction: Transaction) -> Applied:
    assert transaction.applied is not None  # it has steps, and its context ended well
    return transaction.applied
