"""One request id stands for one request: a retry is answered again, anything else is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.format import encode_revision
from membank.wire.format.layout import revision_key
from membank.wire.format.revision import REQUEST_SHA256
from membank.wire.spec import Array, BlockRef
from membank.wire.steps import Combine, Delete, Place, Step, Swap, Withhold
from shard_rig import RIG_SPEC, ShardRig, asked

TOPIC, OTHER = BlockRef(1, 1), BlockRef(1, 2)
ROW = np.array([0.5, 0.25, -1.0], np.float32)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank")
    yield rig
    rig.close()


def filled(ref: BlockRef, value: float) -> Array:
    return np.full(RIG_SPEC.block_shape(ref.level), value, np.float32)


REUSES: dict[str, tuple[Callable[[ShardRig], object], Callable[[ShardRig], object]]] = {
    "another topic": (
        lambda rig: rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)]),
        lambda rig: rig.operations.apply(asked("r1"), [Withhold(topic=OTHER)]),
    ),
    "an option": (
        lambda rig: rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)]),
        lambda rig: rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC, only_block=True)]),
    ),
    "other content": (
        lambda rig: rig.operations.apply(asked("r1"), [Swap(ref=TOPIC, weight=filled(TOPIC, 1.0))]),
        lambda rig: rig.operations.apply(asked("r1"), [Swap(ref=TOPIC, weight=filled(TOPIC, 2.0))]),
    ),
    "another factor": (
        lambda rig: rig.operations.apply(asked("r1"), [Combine(ref=TOPIC, keep=0.5)]),
        lambda rig: rig.operations.apply(asked("r1"), [Combine(ref=TOPIC, keep=0.25)]),
    ),
    "another centroid": (
        lambda rig: rig.operations.apply(asked("r1"), [Place(topic=TOPIC, centroid=ROW)]),
        lambda rig: rig.operations.apply(asked("r1"), [Place(topic=TOPIC, centroid=-ROW)]),
    ),
    "another label": (
        lambda rig: rig.operations.apply(asked("r1"), [Place(topic=TOPIC, label="iron")]),
        lambda rig: rig.operations.apply(asked("r1"), [Place(topic=TOPIC, label="steel")]),
    ),
    "one step more": (
        lambda rig: rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)]),
        lambda rig: rig.operations.apply(
            asked("r1"), [Withhold(topic=TOPIC), Withhold(topic=OTHER)]
        ),
    ),
    "another operation": (
        lambda rig: rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)]),
        lambda rig: rig.operations.create_snapshot(asked("r1"), "one"),
    ),
    "another snapshot": (
        lambda rig: rig.operations.create_snapshot(asked("r1"), "one"),
        lambda rig: rig.operations.create_snapshot(asked("r1"), "two"),
    ),
    "another snapshot to give up": (
        lambda rig: rig.operations.delete_snapshot(asked("r1"), "pinned"),
        lambda rig: rig.operations.delete_snapshot(asked("r1"), "pinned-too"),
    ),
    "a rollback of another topic": (
        lambda rig: rig.operations.rollback(asked("r1"), "pinned", TOPIC),
        lambda rig: rig.operations.rollback(asked("r1"), "pinned", OTHER),
    ),
    "a rollback to another state": (
        lambda rig: rig.operations.rollback(asked("r1"), "pinned", TOPIC),
        lambda rig: rig.operations.rollback(asked("r1"), "pinned-too", TOPIC),
    ),
    "an import under another topic": (
        lambda rig: rig.operations.import_stored(asked("r1"), "kept"),
        lambda rig: rig.operations.import_stored(asked("r1"), "kept", topic=OTHER),
    ),
    "another pack": (
        lambda rig: rig.operations.import_stored(asked("r1"), "kept"),
        lambda rig: rig.operations.import_stored(asked("r1"), "kept-too"),
    ),
    "an import by force": (
        lambda rig: rig.operations.import_stored(asked("r1"), "kept"),
        lambda rig: rig.operations.import_stored(asked("r1"), "kept", force=True),
    ),
    "another amount of history": (
        lambda rig: rig.operations.collect_garbage(asked("r1"), keep_revisions=1),
        lambda rig: rig.operations.collect_garbage(asked("r1"), keep_revisions=2),
    ),
}


@pytest.fixture
def lived_in(rig: ShardRig) -> ShardRig:
    """A bank with two snapshots, stored packs and an earlier revision to give up."""
    for number, name in enumerate(("pinned", "pinned-too")):
        swap = Swap(ref=TOPIC, weight=filled(TOPIC, number + 5.0))
        rig.operations.apply(asked(f"swap-{number}"), [swap])
        rig.operations.create_snapshot(asked(f"snapshot-{number}"), name)
    for topic, name in ((TOPIC, "kept"), (OTHER, "kept-too")):
        rig.operations.store_pack(topic, name).close()
    rig.operations.apply(asked("swap-2"), [Swap(ref=TOPIC, weight=filled(TOPIC, 9.0))])
    return rig


@pytest.mark.parametrize("case", REUSES)
def test_a_request_id_that_is_reused_for_something_else_is_refused(
    lived_in: ShardRig, case: str
) -> None:
    first, other = REUSES[case]
    first(lived_in)
    before, state = lived_in.log.last, lived_in.state()
    lived_in.start_coordinator()
    with pytest.raises(InvalidArgumentError, match="id of its own") as caught:
        other(lived_in)
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    assert caught.value.metadata["request_id"] == "r1"
    assert (lived_in.log.last, lived_in.state()) == (before, state)
    first(lived_in)
    assert lived_in.log.last == before, "the same once more is a retry"


def test_steps_in_another_order_are_the_same_request(rig: ShardRig) -> None:
    steps: list[Step] = [Withhold(topic=TOPIC), Swap(ref=OTHER, weight=filled(OTHER, 1.0))]
    first = rig.operations.apply(asked("r1"), steps)
    assert rig.operations.apply(asked("r1"), steps[::-1]) == first


def test_a_record_of_an_earlier_version_says_only_which_operation_it_was(rig: ShardRig) -> None:
    first = rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)])
    record = rig.log.read(1)
    detail = {name: value for name, value in record.detail.items() if name != REQUEST_SHA256}
    assert detail.keys() < record.detail.keys()
    rig.objects.put(revision_key(1), encode_revision(replace(record, detail=detail)))
    rig.start_coordinator()
    assert rig.operations.apply(asked("r1"), [Withhold(topic=OTHER)]) == first
    with pytest.raises(InvalidArgumentError) as caught:
        rig.operations.apply(asked("r1"), [Delete(topic=TOPIC)])
    assert caught.value.reason is Reason.REQUEST_ID_REUSED


def test_the_digest_of_a_request_is_none_of_the_account(rig: ShardRig) -> None:
    rig.operations.apply(asked("r1"), [Withhold(topic=TOPIC)])
    (audited, *_) = rig.operations.audit(1)
    assert REQUEST_SHA256 not in audited.detail
