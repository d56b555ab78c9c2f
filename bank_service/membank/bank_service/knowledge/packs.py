"""From a bank to a pack and back: what must agree, and what is installed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from membank.bank_service.shard.contract import BlockContent, SetContent
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.format import TreeDocument
from membank.wire.format.pack import Pack, PackedBlock, retriever_sha256
from membank.wire.spec import Array, BankSpec, BlockRef


def make_pack(
    spec: BankSpec,
    topic: BlockRef,
    contents: Iterable[BlockContent],
    tree: TreeDocument,
    *,
    revision: int,
    weights_only: bool = False,
) -> Pack:
    """Put a topic together.

    Parameters
    ----------
    spec
        Spec of the bank.
    topic
        The topic.
    contents
        Its blocks, in any order.
    tree
        The bank's tree document.
    revision
        Revision all of it was read at.
    weights_only
        True leaves the optimizer state out.

    Returns
    -------
    Pack
        The topic.
    """
    blocks = tuple(
        PackedBlock(
            ref=content.ref,
            version=content.version,
            step=0 if weights_only else content.step,
            weight=content.weight,
            optimizer_state={} if weights_only else dict(content.optimizer_state),
        )
        for content in sorted(contents, key=lambda content: content.ref)
    )
    refs = set(spec.subtree(topic))
    return Pack(
        spec=spec,
        topic=topic,
        revision=revision,
        blocks=blocks,
        labels={ref: label for ref, label in tree.labels.items() if ref in refs},
        num_documents={ref: count for ref, count in tree.num_documents.items() if ref in refs},
        centroids=_centroids(tree, refs),
        retriever_sha256=retriever_sha256(tree),
    )


def check_pack(pack: Pack, spec: BankSpec, tree: TreeDocument) -> None:
    """Raise unless `pack` can be installed in the bank of `spec` and `tree`.

    Raises
    ------
    FailedPreconditionError
        If it belongs to another anchor or retriever (FINGERPRINT_MISMATCH).
    InvalidArgumentError
        If shapes (BAD_SHAPE), element types (BAD_DTYPE) or the optimizer (BAD_PACK) differ, or
        the pack is not whole in itself.
    """
    _check_fingerprints(pack, spec, tree)
    _check_shape(pack.spec, spec, pack.topic)
    if pack.spec.dtype != spec.dtype:
        raise InvalidArgumentError(
            f"the pack holds {pack.spec.dtype} and the bank keeps {spec.dtype}; nothing is rounded "
            "silently: export it from a bank of that type",
            reason=Reason.BAD_DTYPE,
            metadata={"pack": pack.spec.dtype, "bank": spec.dtype},
        )
    topic_refs = set(spec.subtree(pack.topic))
    strays = [ref for ref in (*pack.labels, *pack.centroids) if ref not in topic_refs]
    for block in pack.blocks:
        if block.ref not in topic_refs:
            strays.append(block.ref)
        _check_block(block, spec)
    if strays:
        raise InvalidArgumentError(
            f"the pack of topic {pack.topic} holds {strays[0]}, which is not under it",
            reason=Reason.BAD_PACK,
        )


def contents_of(pack: Pack) -> tuple[SetContent, ...]:
    """Return the operations that install the blocks of `pack`."""
    return tuple(
        SetContent(
            ref=block.ref,
            weight=block.weight,
            optimizer_state=block.optimizer_state,
            step=block.step,
        )
        for block in pack.blocks
    )


def tree_with(pack: Pack, tree: TreeDocument) -> TreeDocument | None:
    """Return `tree` with the labels and centroids of `pack`; None where that changes nothing."""
    same_labels = all(tree.labels.get(ref) == label for ref, label in pack.labels.items())
    same_counts = all(tree.num_documents.get(ref) == n for ref, n in pack.num_documents.items())
    present = _centroids(tree, pack.centroids)
    same_centroids = present.keys() == pack.centroids.keys() and all(
        np.array_equal(present[ref], row) for ref, row in pack.centroids.items()
    )
    if same_labels and same_counts and (same_centroids or not tree.centroids):
        return None
    return tree.with_topic(pack.labels, pack.num_documents, pack.centroids)


def _centroids(tree: TreeDocument, refs: Iterable[BlockRef]) -> dict[BlockRef, Array]:
    rows = {
        ref: tree.centroids[ref.level - 1][ref.cluster]
        for ref in sorted(refs)
        if ref.level <= len(tree.centroids)
    }
    return {ref: row for ref, row in rows.items() if not np.isnan(row).any()}


def _check_fingerprints(pack: Pack, spec: BankSpec, tree: TreeDocument) -> None:
    if pack.spec.fingerprint != spec.fingerprint:
        raise _mismatch("anchor and tokenizer", pack.spec.fingerprint, spec.fingerprint)
    here = retriever_sha256(tree)
    # A pack without centroids fits any retriever, and a bank without one takes any pack.
    if pack.centroids and here and pack.retriever_sha256 != here:
        raise _mismatch("retriever", pack.retriever_sha256, here)


def _check_shape(pack: BankSpec, bank: BankSpec, topic: BlockRef) -> None:
    def shape(spec: BankSpec) -> dict[str, object]:
        below = spec.levels[topic.level - 1 :]
        return {
            "layers": spec.num_layers,
            "width": spec.width,
            "block widths": [level.block_width for level in below],
            "fan-out below the topic": [level.fan_out for level in below[1:]],
        }

    bank.check_ref(topic)
    for name, value in shape(pack).items():
        here = shape(bank)[name]
        if value != here:
            raise InvalidArgumentError(
                f"{name} of the pack: {value}; of the bank: {here}; the blocks do not fit",
                reason=Reason.BAD_SHAPE,
                metadata={"field": name, "pack": str(value), "bank": str(here)},
            )


def _check_block(block: PackedBlock, spec: BankSpec) -> None:
    shape = spec.block_shape(block.ref.level)
    arrays: dict[str, Array] = {"weight": block.weight}
    arrays.update({role.value: state for role, state in block.optimizer_state.items()})
    for name, array in arrays.items():
        if array.shape != shape:
            raise InvalidArgumentError(
                f"{name} of block {block.ref} in the pack has shape {array.shape}, not {shape}",
                reason=Reason.BAD_SHAPE,
                metadata={"block": str(block.ref)},
            )
    if block.weight.dtype != spec.numpy_dtype:
        raise InvalidArgumentError(
            f"the weight of block {block.ref} in the pack is {block.weight.dtype}",
            reason=Reason.BAD_DTYPE,
        )
    if block.optimizer_state and set(block.optimizer_state) != set(spec.optimizer.state_roles):
        raise InvalidArgumentError(
            f"the pack was trained with another optimizer (it holds "
            f"{', '.join(block.optimizer_state)}); the bank runs {spec.optimizer.kind.value}: "
            "export it with weights_only",
            reason=Reason.BAD_PACK,
            metadata={"block": str(block.ref)},
        )


def _mismatch(what: str, pack: str, bank: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the pack belongs to another {what} (pack {pack[:12] or 'none'}, bank "
        f"{bank[:12] or 'none'}); its content would mean nothing here",
        reason=Reason.FINGERPRINT_MISMATCH,
        metadata={"pack": pack, "bank": bank},
    )
