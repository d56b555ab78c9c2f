"""Whether a pack fits a bank, and a pack under another topic."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.format.pack.contract import Pack, PackedBlock, retriever_sha256
from membank.wire.format.tree import TreeDocument
from membank.wire.spec import Array, BankSpec, BlockRef


def moved(pack: Pack, topic: BlockRef, spec: BankSpec) -> Pack:
    """Return `pack` as if `topic` had been exported, to be installed under that in a bank.

    Parameters
    ----------
    pack
        The pack.
    topic
        A topic of the bank, of the level of the pack's; the blocks under it take the places of
        those under the pack's topic, in their order.
    spec
        Spec of the bank.

    Raises
    ------
    NotFoundError
        If the bank has no such topic.
    InvalidArgumentError
        If the topic is of another level, or levels or fan-outs below it differ (BAD_SHAPE).
    """
    spec.check_ref(topic)
    if topic.level != pack.topic.level:
        raise InvalidArgumentError(
            f"the pack holds topic {pack.topic}, of level {pack.topic.level}, and {topic} is of level "
            f"{topic.level}; blocks of different levels have different places in the model: choose a "
            f"topic {pack.topic.level}/CLUSTER",
            reason=Reason.BAD_SHAPE,
            metadata={"pack": str(pack.topic), "topic": str(topic)},
        )
    _check_shape(pack.spec, spec, topic)
    places = dict(zip(pack.spec.subtree(pack.topic), spec.subtree(topic), strict=True))
    try:
        base = pack.base
        if base is not None:
            unchanged = {places[ref]: held for ref, held in base.unchanged.items()}
            base = replace(base, unchanged=unchanged)
        return replace(
            pack,
            topic=topic,
            blocks=tuple(replace(block, ref=places[block.ref]) for block in pack.blocks),
            labels={places[ref]: label for ref, label in pack.labels.items()},
            num_documents={places[ref]: count for ref, count in pack.num_documents.items()},
            centroids={places[ref]: row for ref, row in pack.centroids.items()},
            base=base,
        )
    except KeyError as err:
        raise _stray(pack.topic, err.args[0]) from err


def check_fits(pack: Pack, spec: BankSpec, tree: TreeDocument) -> None:
    """Raise unless `pack` can be installed in the bank of `spec` and `tree`, under its topic.

    Raises
    ------
    FailedPreconditionError
        If it belongs to another anchor or retriever (FINGERPRINT_MISMATCH).
    NotFoundError
        If the bank has no such topic.
    InvalidArgumentError
        If shapes (BAD_SHAPE), element types (BAD_DTYPE) or the optimizer (BAD_PACK) differ, a
        centroid is not finite (NOT_FINITE), or the pack is not whole in itself.
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
    under = set(spec.subtree(pack.topic))
    for ref in (*pack.refs, *pack.centroids):
        if ref not in under:
            raise _stray(pack.topic, ref)
    for block in pack.blocks:
        _check_block(block, spec)
    for ref, row in pack.centroids.items():
        if ref.level <= len(tree.centroids):
            _check_centroid(ref, row, dims=tree.centroids[ref.level - 1].shape[1])


def _check_fingerprints(pack: Pack, spec: BankSpec, tree: TreeDocument) -> None:
    if pack.spec.fingerprint != spec.fingerprint:
        raise _mismatch("anchor and tokenizer", pack.spec.fingerprint, spec.fingerprint)
    here = retriever_sha256(tree)
    # A pack without centroids fits any retriever, and a bank without one takes any pack.
    if pack.centroids and here and pack.retriever_sha256 != here:
        raise _mismatch("retriever", pack.retriever_sha256, here)


def _check_shape(pack: BankSpec, bank: BankSpec, topic: BlockRef) -> None:
    """Raise unless what lies at and below a topic has the same shape in both banks."""

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


def _check_centroid(ref: BlockRef, row: Array, *, dims: int) -> None:
    what = f"the centroid of topic {ref} in the pack"
    metadata = {"topic": str(ref)}
    if row.shape != (dims,):
        raise InvalidArgumentError(
            f"{what} has shape {row.shape}; those of the bank have {(dims,)}",
            reason=Reason.BAD_SHAPE,
            metadata=metadata,
        )
    if row.dtype != np.float32:
        raise InvalidArgumentError(
            f"{what} is {row.dtype}; centroids are float32",
            reason=Reason.BAD_DTYPE,
            metadata=metadata,
        )
    # A row of NaN would be none: packs leave those out.
    if not np.isfinite(row).all():
        raise InvalidArgumentError(
            f"{what} is not finite", reason=Reason.NOT_FINITE, metadata=metadata
        )


def _mismatch(what: str, pack: str, bank: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"the pack belongs to another {what} (pack {pack[:12] or 'none'}, bank "
        f"{bank[:12] or 'none'}); its content would mean nothing here",
        reason=Reason.FINGERPRINT_MISMATCH,
        metadata={"pack": pack, "bank": bank},
    )


def _stray(topic: BlockRef, ref: BlockRef) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"the pack of topic {topic} holds {ref}, which is not under it", reason=Reason.BAD_PACK
    )
