"""What steps make of a bank, by the model: each sees the bank as it was, and the first wrong one refuses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bank_model import ACTIVE, DELETED, WITHHELD, BankModel, Refused
from membank.wire.errors import Reason
from membank.wire.spec import Array, BlockRef
from membank.wire.steps import Combine, Delete, Place, Restore, Step, Swap, Withhold


def applied(before: BankModel, steps: Sequence[Step]) -> BankModel:
    """Return the bank after a transaction, or raise `Refused`."""
    _require_apart(before, steps)
    for step in steps:
        if isinstance(step, Combine) and step.other is not None:
            _require_other(before, step.other, step.expected_other_version)
    for step in steps:
        if isinstance(step, Withhold | Restore | Delete):
            before.present(step.topic, step.only_block)
    after = before
    for step in steps:
        after = _changed(after, step, before)
    for step in steps:
        if isinstance(step, Place):
            after = _placed(after, step)
    return after


def _changed(model: BankModel, step: Step, before: BankModel) -> BankModel:
    match step:
        case Swap(ref=ref, weight=weight):
            _require_version(before, ref, step.expected_version)
            return model.with_content(ref, weight, ACTIVE)
        case Combine(ref=ref):
            _require_version(before, ref, step.expected_version)
            state = before.blocks[ref].state
            weight = _combined(before, step)
            return model.with_content(ref, weight, ACTIVE if state is DELETED else state)
        case Withhold(topic=topic, only_block=only_block):
            return model.set_state(topic, WITHHELD, only_block)
        case Restore(topic=topic, only_block=only_block):
            return model.set_state(topic, ACTIVE, only_block)
        case Delete(topic=topic, only_block=only_block):
            return model.delete(topic, only_block)
        case Place():
            return model


def _combined(before: BankModel, step: Combine) -> Array:
    total = np.zeros(before.spec.block_shape(step.ref.level), np.float32)
    if step.keep:
        total = np.float32(step.keep) * _weight(before, step.ref)
    if step.add and step.other is not None:
        other = np.float32(step.add) * _weight(before, step.other)
        total = total + other if step.keep else other
    return total.astype(before.spec.numpy_dtype)


def _weight(model: BankModel, ref: BlockRef) -> npt.NDArray[np.float32]:
    content = model.blocks[ref].content
    if content is None:
        raise Refused(Reason.BLOCK_DELETED)
    return content.weight.astype(np.float32)


def _placed(model: BankModel, step: Place) -> BankModel:
    if step.label is None:
        return model
    if model.blocks[step.topic].state is DELETED:
        raise Refused(Reason.BLOCK_DELETED)
    return model.labelled(step.topic, step.label)


def _require_apart(model: BankModel, steps: Sequence[Step]) -> None:
    changed = [ref for step in steps if not isinstance(step, Place) for ref in _scope(model, step)]
    placed = [step.topic for step in steps if isinstance(step, Place)]
    if len({*changed}) < len(changed) or len({*placed}) < len(placed):
        raise Refused(Reason.BAD_ARGUMENT)


def _scope(model: BankModel, step: Step) -> list[BlockRef]:
    if isinstance(step, Swap | Combine):
        return [step.ref]
    if isinstance(step, Place) or step.only_block:
        return [step.topic]
    return list(model.spec.subtree(step.topic))


def _require_other(model: BankModel, other: BlockRef, expected_version: int | None) -> None:
    state = model.blocks[other].state
    if state is WITHHELD:
        raise Refused(Reason.BLOCK_WITHHELD)
    if state is DELETED:
        raise Refused(Reason.BLOCK_DELETED)
    _require_version(model, other, expected_version)


def _require_version(model: BankModel, ref: BlockRef, expected_version: int | None) -> None:
    if expected_version not in {None, model.blocks[ref].version}:
        raise Refused(Reason.VERSION_MISMATCH)
