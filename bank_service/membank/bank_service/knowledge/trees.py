"""Tree documents of a bank: one is in force, and no other is kept.

Older documents would tell the labels and centroids of deleted topics, so a transaction that writes
a new document destroys the others once it is committed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from membank.bank_service.store import Bank
from membank.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from membank.wire.format import TreeDocument
from membank.wire.format.layout import TREES, number_in, tree_key
from membank.wire.records import CentroidChange, TreeChange
from membank.wire.spec import Array, BlockRef
from membank.wire.steps import Place


class TreeStore:
    """The tree documents of one bank.

    Parameters
    ----------
    bank
        The bank.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    def read_bytes(self, revision: int) -> bytes:
        """Return the document written at `revision`.

        Raises
        ------
        NotFoundError
            If the bank has no tree (NO_TREE).
        """
        try:
            return self._bank.objects.get(tree_key(revision))
        except NotFoundError as err:
            raise NotFoundError(
                "the bank has no tree: it was created without labels and retriever",
                reason=Reason.NO_TREE,
            ) from err

    def read(self, revision: int) -> TreeDocument:
        """Return the document written at `revision`, an empty one where the bank has no tree."""
        return self._bank.read_tree(revision) or TreeDocument()

    def write(self, revision: int, tree: TreeDocument) -> None:
        """Write the document that comes into force with `revision`."""
        # Replaces what a transaction of the same number may have left that was never committed.
        self._bank.write_tree(revision, tree)

    def destroy_others(self, revision: int) -> None:
        """Destroy every document but that of `revision`."""
        for key in self._bank.objects.list(TREES):
            if number_in(key, tree_key) not in {None, revision}:
                self._bank.objects.delete(key)


def placed(tree: TreeDocument, step: Place) -> TreeDocument:
    """Return `tree` after a topic was placed.

    Raises
    ------
    FailedPreconditionError
        If a centroid is to be set, and the level of the topic has none (NO_TREE).
    InvalidArgumentError
        If the centroid has not as many numbers as the others of its level (BAD_SHAPE).
    """
    labels, counts = dict(tree.labels), dict(tree.num_documents)
    if step.label is not None:
        labels[step.topic] = step.label
    if step.num_documents is not None:
        counts[step.topic] = step.num_documents
    return replace(
        tree,
        # What is empty or unknown is not there.
        labels={ref: label for ref, label in labels.items() if label},
        num_documents={ref: count for ref, count in counts.items() if count},
        centroids=_placed_centroids(tree, step),
    )


def tree_changes(before: TreeDocument, after: TreeDocument) -> tuple[TreeChange, ...]:
    """Return what differs between two trees of one bank, by topic."""
    labels = _differing(before.labels, after.labels)
    counts = _differing(before.num_documents, after.num_documents)
    centroids = dict(_centroid_changes(before.centroids, after.centroids))
    return tuple(
        TreeChange(
            topic=ref,
            changes_label=ref in labels,
            changes_num_documents=ref in counts,
            centroid_change=centroids.get(ref, CentroidChange.KEPT),
        )
        for ref in sorted(labels | counts | centroids.keys())
    )


def _placed_centroids(tree: TreeDocument, step: Place) -> tuple[Array, ...]:
    topic, row = step.topic, step.centroid
    level = topic.level - 1
    if row is None and not (step.remove_centroid and level < len(tree.centroids)):
        return tree.centroids
    if level >= len(tree.centroids):
        raise FailedPreconditionError(
            f"topic {topic} gets no centroid: the bank's tree has none at level {topic.level}; "
            "create the bank with a retriever",
            reason=Reason.NO_TREE,
            metadata={"topic": str(topic)},
        )
    arrays = [array.copy() for array in tree.centroids]
    dims = arrays[level].shape[1]
    if row is not None and row.shape != (dims,):
        raise InvalidArgumentError(
            f"the centroid of topic {topic} has {row.size} numbers; those of level {topic.level} "
            f"have {dims}",
            reason=Reason.BAD_SHAPE,
            metadata={"topic": str(topic)},
        )
    arrays[level][topic.cluster] = np.nan if row is None else row
    return tuple(arrays)


def _differing(
    before: Mapping[BlockRef, object], after: Mapping[BlockRef, object]
) -> set[BlockRef]:
    return {ref for ref in {*before, *after} if before.get(ref) != after.get(ref)}


def _centroid_changes(
    before: tuple[Array, ...], after: tuple[Array, ...]
) -> Iterator[tuple[BlockRef, CentroidChange]]:
    for level, (old, new) in enumerate(zip(before, after, strict=True), start=1):
        # NaN is a centroid that is not there, and equals itself here.
        differs = ~((old == new) | (np.isnan(old) & np.isnan(new))).all(axis=1)
        for cluster in np.flatnonzero(differs):
            removed = bool(np.isnan(new[cluster]).any())
            change = CentroidChange.REMOVED if removed else CentroidChange.SET
            yield BlockRef(level, int(cluster)), change
