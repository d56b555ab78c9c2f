"""From a bank to a pack and back: what is put together, and what is installed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from membank.bank_service.shard.contract import BlockContent, SetContent
from membank.wire.format import TreeDocument
from membank.wire.format.pack import BlockBase, Pack, PackedBlock, retriever_sha256
from membank.wire.spec import Array, BankSpec, BlockRef


def head_of(
    spec: BankSpec,
    topic: BlockRef,
    tree: TreeDocument,
    *,
    revision: int,
) -> Pack:
    """Return all that a pack says beside its blocks.

    Parameters
    ----------
    spec
        Spec of the bank.
    topic
        The topic.
    tree
        The bank's tree document.
    revision
        Revision all of it is read at.
    """
    refs = set(spec.subtree(topic))
    return Pack(
        spec=spec,
        topic=topic,
        revision=revision,
        blocks=(),
        labels={ref: label for ref, label in tree.labels.items() if ref in refs},
        num_documents={ref: count for ref, count in tree.num_documents.items() if ref in refs},
        centroids=_centroids(tree, refs),
        retriever_sha256=retriever_sha256(tree),
    )


def packed(
    content: BlockContent, *, weights_only: bool, base: BlockBase | None = None
) -> PackedBlock:
    """Return a block as a pack holds it."""
    return PackedBlock(
        ref=content.ref,
        version=content.version,
        step=0 if weights_only else content.step,
        weight=content.weight,
        optimizer_state={} if weights_only else dict(content.optimizer_state),
        base=base,
    )


def contents_of(pack: Pack, expected: Mapping[BlockRef, int]) -> tuple[SetContent, ...]:
    """Return the operations that install the blocks of `pack`.

    Parameters
    ----------
    pack
        The pack.
    expected
        Versions that blocks must still have; others may have any.
    """
    return tuple(
        SetContent(
            ref=block.ref,
            weight=block.weight,
            optimizer_state=block.optimizer_state,
            step=block.step,
            expected_version=expected.get(block.ref),
        )
        for block in pack.blocks
    )


def tree_with(pack: Pack, tree: TreeDocument, *, is_moved: bool = False) -> TreeDocument | None:
    """Return `tree` with the labels and centroids of `pack`; None where that changes nothing.

    Parameters
    ----------
    pack
        The pack.
    tree
        The bank's tree document.
    is_moved
        True where the topic is another than the pack was made of: what was said of the blocks that it
        replaces is not true any more.
    """
    kept = _without(tree, {block.ref for block in pack.blocks}) if is_moved else tree
    labels = {**kept.labels, **pack.labels}
    num_documents = {**kept.num_documents, **pack.num_documents}
    present = _centroids(tree, pack.centroids)
    same_centroids = present.keys() == pack.centroids.keys() and all(
        np.array_equal(present[ref], row) for ref, row in pack.centroids.items()
    )
    same_names = labels == tree.labels and num_documents == tree.num_documents
    if same_names and (same_centroids or not tree.centroids):
        return None
    return kept.with_topic(pack.labels, pack.num_documents, pack.centroids)


def _without(tree: TreeDocument, refs: Collection[BlockRef]) -> TreeDocument:
    return replace(
        tree,
        labels={ref: label for ref, label in tree.labels.items() if ref not in refs},
        num_documents={ref: n for ref, n in tree.num_documents.items() if ref not in refs},
    )


def _centroids(tree: TreeDocument, refs: Iterable[BlockRef]) -> dict[BlockRef, Array]:
    rows = {
        ref: tree.centroids[ref.level - 1][ref.cluster]
        for ref in sorted(refs)
        if ref.level <= len(tree.centroids)
    }
    return {ref: row for ref, row in rows.items() if not np.isnan(row).any()}
