"""Steps of a transaction: what there can be, and how they travel."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from membank.v1 import admin_service_pb2 as pb
from membank.wire.convert import step_from_pb, step_to_pb
from membank.wire.crc import crc32c
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import BlockRef
from membank.wire.steps import Combine, Delete, Place, Restore, Step, Swap, Withhold

A, B = BlockRef(1, 0), BlockRef(2, 3)


@pytest.mark.parametrize(
    "step",
    [
        Combine(ref=A, keep=0.7, other=B, add=0.3, expected_version=0, expected_other_version=5),
        Combine(ref=A, keep=-2.5, expected_version=7),
        Combine(ref=A, keep=0),
        Withhold(topic=A, only_block=True),
        Withhold(topic=A),
        Restore(topic=B),
        Delete(topic=B, only_block=True),
        Place(topic=A, label="iron and steel"),
        Place(topic=A, label="", num_documents=0),
        Place(topic=A, num_documents=2**40),
        Place(topic=A, remove_centroid=True),
    ],
)
def test_steps_travel(step: Step) -> None:
    sent = step_to_pb(step).SerializeToString()
    assert step_from_pb(pb.TransactionStep.FromString(sent)) == step


def test_a_centroid_travels_bit_for_bit() -> None:
    row = np.array([0.1, -0.0, 3e-42, 7], np.float32)
    step = step_from_pb(step_to_pb(Place(topic=A, centroid=row)))
    assert isinstance(step, Place)
    assert step.centroid is not None
    assert step.centroid.tobytes() == row.tobytes()
    assert not step.remove_centroid


def test_a_swap_travels_beside_its_content() -> None:
    weight = np.arange(6, dtype=np.float32)
    message = step_to_pb(Swap(ref=B, weight=weight, expected_version=0))
    assert (message.swap.num_bytes, message.swap.crc32c) == (24, crc32c(weight))
    step = step_from_pb(message, weight)
    assert isinstance(step, Swap)
    assert (step.ref, step.expected_version) == (B, 0)
    assert_array_equal(step.weight, weight)
    with pytest.raises(InvalidArgumentError):
        step_from_pb(message)


@pytest.mark.parametrize("share", [0.3, 1 / 3, 1e-30, 123456.789])
def test_factors_are_those_that_travel(share: float) -> None:
    step = Combine(ref=A, keep=1 - share, other=B, add=share)
    assert (step.keep, step.add) == (float(np.float32(1 - share)), float(np.float32(share)))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Combine(ref=A, keep=math.inf), Reason.NOT_FINITE),
        (lambda: Combine(ref=A, keep=1, other=B, add=math.nan), Reason.NOT_FINITE),
        (lambda: Combine(ref=A, keep=1e39), Reason.NOT_FINITE),
        (lambda: Combine(ref=A, keep=1, add=0.5), Reason.BAD_ARGUMENT),
        (lambda: Combine(ref=A, keep=1, expected_other_version=2), Reason.BAD_ARGUMENT),
        (lambda: Place(topic=A), Reason.BAD_ARGUMENT),
        (lambda: Place(topic=A, num_documents=-1), Reason.BAD_ARGUMENT),
        (lambda: Place(topic=A, centroid=np.ones((2, 2))), Reason.BAD_ARGUMENT),
        (lambda: Place(topic=A, centroid=np.array([1, np.nan])), Reason.BAD_ARGUMENT),
        (lambda: Place(topic=A, centroid=np.ones(2), remove_centroid=True), Reason.BAD_ARGUMENT),
        (lambda: step_from_pb(pb.TransactionStep()), Reason.BAD_ARGUMENT),
    ],
)
def test_what_is_no_step_is_refused(make: Callable[[], Step], reason: Reason) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make()
    assert caught.value.reason is reason


def test_a_centroid_is_kept_as_it_was_given() -> None:
    row = np.ones(2, np.float32)
    step = Place(topic=A, centroid=row)
    row[:] = 5
    assert step.centroid is not None
    assert_array_equal(step.centroid, [1, 1])
