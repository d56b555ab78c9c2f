"""New topics in a bank that is served: grown, split off, retired; each is one transaction."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from membank.client import BankClient, Transaction
from membank.client.retriever import Embedder, Retriever
from membank.trainer.corpus import Document
from membank.trainer.tree import (
    centroid_of,
    embedder_from_config,
    free_child,
    halves_of,
    has_centroid,
    views_of,
)
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.format import TreeDocument, initial_weight
from membank.wire.records import Topic, TransactionReport
from membank.wire.spec import Array, BankSpec, BlockRef


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """A topic that was put into a tree, or would be."""

    topic: BlockRef
    """The new topic."""
    report: TransactionReport
    """The transaction."""
    routed: Mapping[BlockRef | None, int]
    """How many of the documents go where from then on: topics of the new one's level; None = no topic
    of that level."""


class TreeGrower:
    """Changes the tree of a served bank.

    Parameters
    ----------
    client
        The bank.
    embedder
        Embeds documents; None = the one that the bank's tree names.
    """

    def __init__(self, client: BankClient, *, embedder: Embedder | None = None) -> None:
        self._client = client
        self._embedder = embedder

    def grow(
        self,
        parent: BlockRef | None,
        *,
        label: str,
        documents: Sequence[Document] = (),
        dry_run: bool = False,
    ) -> Growth:
        """Put a topic under another one, in a free cluster, with initial content.

        Parameters
        ----------
        parent
            The topic; None = the root.
        label
            Its label.
        documents
            Texts that it is for: their mean is its centroid. Without any it has none, and no text
            finds it before it is placed.
        dry_run
            True only finds out what would change.

        Raises
        ------
        ConflictError
            If somebody took the cluster at the same time; repeat it.
        FailedPreconditionError
            If no cluster is free (TREE_FULL), or there is no retriever for the documents (NO_TREE).
        InvalidArgumentError
            If nothing can be under `parent`, or the retriever knows no word of the documents.
        """
        spec, tree, topics = self._look(parent)
        child = free_child(spec, tree, topics, parent)
        transaction = Transaction(dry_run=dry_run)
        transaction.swap(child, initial_weight(spec, child), expected_version=topics[child].version)
        row = None
        if documents:
            row = centroid_of(views_of(self._embedder_of(tree), documents, _dims(tree, child)))
        transaction.place(child, label=label, num_documents=len(documents) or None, centroid=row)
        report = self._apply(transaction)
        rows = {} if row is None else {child: row}
        return Growth(topic=child, report=report, routed=self._routed(tree, rows, documents, child))

    def split(
        self,
        leaf: BlockRef,
        *,
        documents: Sequence[Document],
        label: str | None = None,
        seed: int = 0,
        dry_run: bool = False,
    ) -> Growth:
        """Split a leaf in two: a new leaf beside it begins as its copy and takes half of its texts.

        Parameters
        ----------
        leaf
            The leaf.
        documents
            Texts; those that are routed to the leaf are split by 2-means.
        label
            Label of the new leaf; None = that of the old one, with a number.
        seed
            Seed of the 2-means.
        dry_run
            True only finds out what would change.

        Raises
        ------
        ConflictError
            If somebody changed one of the two at the same time; repeat it.
        FailedPreconditionError
            If no cluster beside it is free (TREE_FULL), or the leaf is hidden.
        InvalidArgumentError
            If it is no leaf, or its documents cannot be told apart.
        """
        spec = self._client.info().spec
        spec.check_ref(leaf)
        if leaf.level != spec.num_levels:
            raise InvalidArgumentError(
                f"topic {leaf} is no leaf: only topics of level {spec.num_levels} are split"
            )
        parent = spec.path_to(leaf)[-2] if leaf.level > 1 else None
        spec, tree, topics = self._look(parent)
        own = self._routed_to(tree, documents, leaf)
        views = views_of(self._embedder_of(tree), own, _dims(tree, leaf))
        centroids, half_N = halves_of(views, seed)
        # The old leaf keeps the half that is more like it was.
        stays = int(np.argmax(centroids @ tree.centroids[leaf.level - 1][leaf.cluster]))
        child = free_child(spec, tree, topics, parent)
        counts = Counter(half_N.tolist())
        transaction = Transaction(dry_run=dry_run)
        transaction.copy(leaf, child, expected_version=topics[child].version)
        transaction.place(leaf, num_documents=counts[stays], centroid=centroids[stays])
        transaction.place(
            child,
            label=label or f"{topics[leaf].label or leaf} (2)",
            num_documents=counts[1 - stays],
            centroid=centroids[1 - stays],
        )
        report = self._apply(transaction)
        rows = {leaf: centroids[stays], child: centroids[1 - stays]}
        return Growth(topic=child, report=report, routed=self._routed(tree, rows, own, child))

    def _look(
        self, parent: BlockRef | None
    ) -> tuple[BankSpec, TreeDocument, dict[BlockRef, Topic]]:
        spec = self._client.info().spec
        topics = {topic.ref: topic for topic in self._client.topics(parent=parent)}
        return spec, self._client.tree(), topics

    def _embedder_of(self, tree: TreeDocument) -> Embedder:
        return self._embedder or embedder_from_config(tree)

    def _apply(self, transaction: Transaction) -> TransactionReport:
        return self._client.apply(transaction.steps, dry_run=transaction.dry_run).report

    def _routed_to(
        self, tree: TreeDocument, documents: Sequence[Document], leaf: BlockRef
    ) -> list[Document]:
        if not has_centroid(tree, leaf):
            raise FailedPreconditionError(
                f"leaf {leaf} has no centroid, so that no text finds it; place it first",
                reason=Reason.NO_TREE,
                metadata={"topic": str(leaf)},
            )
        retriever = Retriever.from_tree(tree, embedder=self._embedder_of(tree))
        paths = retriever.route_all([document.text for document in documents])
        own = [d for d, path in zip(documents, paths, strict=True) if path and path[-1] == leaf]
        if len(own) < 2:
            raise InvalidArgumentError(
                f"{len(own)} of the {len(documents)} documents are routed to leaf {leaf}; a split "
                "needs two"
            )
        return own

    def _routed(
        self,
        tree: TreeDocument,
        rows: Mapping[BlockRef, Array],
        documents: Sequence[Document],
        child: BlockRef,
    ) -> dict[BlockRef | None, int]:
        if not documents:
            return {}
        arrays = [array.copy() for array in tree.centroids]
        for ref, row in rows.items():
            arrays[ref.level - 1][ref.cluster] = row
        after = replace(tree, centroids=tuple(arrays))
        retriever = Retriever.from_tree(after, embedder=self._embedder_of(tree))
        paths = retriever.route_all([document.text for document in documents])
        level = child.level
        return dict(Counter(path[level - 1] if len(path) >= level else None for path in paths))


def _dims(tree: TreeDocument, ref: BlockRef) -> int:
    if ref.level > len(tree.centroids):
        raise FailedPreconditionError(
            f"the bank has no retriever at level {ref.level}, so that no text could find topic "
            f"{ref}; leave the documents out, or create the bank with a tree",
            reason=Reason.NO_TREE,
            metadata={"topic": str(ref)},
        )
    return int(tree.centroids[ref.level - 1].shape[1])
