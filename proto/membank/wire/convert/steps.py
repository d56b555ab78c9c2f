"""Mappings of the steps of a transaction."""

from __future__ import annotations

from typing import assert_never

import numpy as np

from membank.v1 import admin_service_pb2 as admin_pb
from membank.wire.convert.data_path import dtype_to_pb, ref_from_pb, ref_to_pb
from membank.wire.crc import crc32c
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import Array, BlockRef
from membank.wire.steps import Combine, Delete, Place, Restore, Step, Swap, Withhold


def step_to_pb(step: Step) -> admin_pb.TransactionStep:
    """Encode a step, without the content that a swap has; that is to be C-contiguous.

    Raises
    ------
    InvalidArgumentError
        If the element type of that content does not travel.
    """
    message = admin_pb.TransactionStep()
    match step:
        case Swap():
            message.swap.CopyFrom(_swap_to_pb(step))
        case Combine():
            message.combine.CopyFrom(_combine_to_pb(step))
        case Withhold(topic=topic, only_block=only_block):
            message.withhold.CopyFrom(_topic_to_pb(topic, only_block))
        case Restore(topic=topic, only_block=only_block):
            message.restore.CopyFrom(_topic_to_pb(topic, only_block))
        case Delete(topic=topic, only_block=only_block):
            message.delete.CopyFrom(_topic_to_pb(topic, only_block))
        case Place():
            message.place.CopyFrom(_place_to_pb(step))
        case _:
            assert_never(step)
    return message


def step_from_pb(message: admin_pb.TransactionStep, weight: Array | None = None) -> Step:
    """Decode a step.

    Parameters
    ----------
    message
        The step.
    weight
        (L, P, R, D): the content that a swap has; None for any other step.

    Raises
    ------
    InvalidArgumentError
        If it says nothing, nothing that this side knows, or what cannot be.
    """
    match message.WhichOneof("step"):
        case "swap" if weight is not None:
            swap = message.swap
            return Swap(
                ref=ref_from_pb(swap.ref),
                weight=weight,
                expected_version=_expected_from_pb(swap.expected_version_plus_one),
            )
        case "combine":
            return _combine_from_pb(message.combine)
        case "withhold":
            topic = message.withhold
            return Withhold(topic=ref_from_pb(topic.topic), only_block=topic.only_block)
        case "restore":
            topic = message.restore
            return Restore(topic=ref_from_pb(topic.topic), only_block=topic.only_block)
        case "delete":
            topic = message.delete
            return Delete(topic=ref_from_pb(topic.topic), only_block=topic.only_block)
        case "place":
            return _place_from_pb(message.place)
        case _:
            raise InvalidArgumentError("a step of the transaction says nothing that is known here")


def _swap_to_pb(step: Swap) -> admin_pb.SwapStep:
    return admin_pb.SwapStep(
        ref=ref_to_pb(step.ref),
        expected_version_plus_one=_expected_to_pb(step.expected_version),
        dtype=dtype_to_pb(step.weight.dtype.name),
        num_bytes=step.weight.nbytes,
        crc32c=crc32c(step.weight),
    )


def _combine_to_pb(step: Combine) -> admin_pb.CombineStep:
    return admin_pb.CombineStep(
        ref=ref_to_pb(step.ref),
        expected_version_plus_one=_expected_to_pb(step.expected_version),
        keep=step.keep,
        other=None if step.other is None else ref_to_pb(step.other),
        add=step.add,
        expected_other_version_plus_one=_expected_to_pb(step.expected_other_version),
    )


def _combine_from_pb(message: admin_pb.CombineStep) -> Combine:
    return Combine(
        ref=ref_from_pb(message.ref),
        keep=message.keep,
        other=ref_from_pb(message.other) if message.HasField("other") else None,
        add=message.add,
        expected_version=_expected_from_pb(message.expected_version_plus_one),
        expected_other_version=_expected_from_pb(message.expected_other_version_plus_one),
    )


def _topic_to_pb(topic: BlockRef, only_block: bool) -> admin_pb.TopicStep:
    return admin_pb.TopicStep(topic=ref_to_pb(topic), only_block=only_block)


def _place_to_pb(step: Place) -> admin_pb.PlaceStep:
    change = admin_pb.CENTROID_CHANGE_UNSPECIFIED
    if step.remove_centroid:
        change = admin_pb.CENTROID_CHANGE_REMOVE
    elif step.centroid is not None:
        change = admin_pb.CENTROID_CHANGE_SET
    return admin_pb.PlaceStep(
        topic=ref_to_pb(step.topic),
        label=step.label,
        num_documents=step.num_documents,
        centroid_change=change,
        centroid=() if step.centroid is None else step.centroid.tolist(),
    )


def _place_from_pb(message: admin_pb.PlaceStep) -> Place:
    is_set = message.centroid_change == admin_pb.CENTROID_CHANGE_SET
    if message.centroid and not is_set:
        raise InvalidArgumentError(
            f"a centroid of topic {ref_from_pb(message.topic)} is given and not to be set"
        )
    return Place(
        topic=ref_from_pb(message.topic),
        label=message.label if message.HasField("label") else None,
        num_documents=message.num_documents if message.HasField("num_documents") else None,
        centroid=np.array(message.centroid, np.float32) if is_set else None,
        remove_centroid=message.centroid_change == admin_pb.CENTROID_CHANGE_REMOVE,
    )


def _expected_to_pb(version: int | None) -> int:
    return 0 if version is None else version + 1


def _expected_from_pb(plus_one: int) -> int | None:
    return plus_one - 1 if plus_one else None
