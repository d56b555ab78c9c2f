"""A coordinator, shards and a store that fail at every step: wholly done, or wholly undone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from membank.wire.errors import (
    ConflictError,
    DeadlineError,
    MembankError,
    NotFoundError,
    UnavailableError,
)
from membank.wire.format import decode_tree
from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete, Swap, Withhold
from shard_rig import RIG_SPEC, Crash, ShardRig, When, asked

TOPIC, OTHER = BlockRef(1, 1), BlockRef(1, 2)
ALL_TOPICS = [BlockRef(1, cluster) for cluster in range(4)]

SWAP_STEPS = [
    "prepare shard-0",
    "prepare shard-1",
    "put_if_absent revisions",
    "commit shard-0",
    "commit shard-1",
]
DELETE_STEPS = [
    "prepare shard-1",
    "put trees",
    "put_if_absent revisions",
    "commit shard-0",
    "commit shard-1",
    "delete trees",
]
SNAPSHOT_STEPS = [
    "prepare shard-0",
    "put_if_absent snapshots",
    "put_if_absent revisions",
    "commit shard-1",
]


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank")
    for ref in ALL_TOPICS:
        rig.push(ref, f"first-{ref}")
    yield rig
    rig.close()


def swap(rig: ShardRig, request_id: str = "r1") -> None:
    """Swap one block of every topic, so on both shards, in every partition."""
    rig.operations.apply(asked(request_id), swap_steps())


def swap_steps() -> list[Swap]:
    return [
        Swap(ref=ref, weight=np.full(RIG_SPEC.block_shape(1), 3.0, np.float32))
        for ref in ALL_TOPICS
    ]


def delete(rig: ShardRig, request_id: str = "r1") -> None:
    rig.operations.apply(asked(request_id), [Delete(topic=TOPIC)])


def snapshot(rig: ShardRig, request_id: str = "r1") -> None:
    rig.operations.create_snapshot(asked(request_id), "pinned")


def swapped_blocks(rig: ShardRig) -> int:
    weights = [rig.weight(ref) for ref in ALL_TOPICS]
    return sum(weight is not None and bool((weight == 3.0).all()) for weight in weights)


def is_deleted(rig: ShardRig) -> bool:
    refs = list(RIG_SPEC.subtree(TOPIC))
    states = {rig.status(ref).state for ref in refs}
    assert len(states) == 1, "a topic is deleted as a whole or not at all"
    (tree_key,) = rig.tree_keys()
    tree = decode_tree(rig.objects.get(tree_key), key=tree_key)
    deleted = states == {BlockState.DELETED}
    assert (TOPIC in tree.labels) is not deleted, "the tree says the same as the shards"
    return deleted


def check_usable(rig: ShardRig) -> None:
    """Whatever happened, the bank takes updates and transactions."""
    for ref in ALL_TOPICS:
        if rig.status(ref).state is BlockState.ACTIVE:
            before = rig.status(ref).version
            assert rig.push(ref, f"after-{ref}").results[0].version == before + 1
    report = rig.operations.apply(asked("after"), [Withhold(topic=OTHER)]).report
    assert {shard.revision for shard in rig.shards.values()} == {report.revision}
    assert rig.weight(OTHER) is None


def restart_coordinator(rig: ShardRig) -> None:
    rig.start_coordinator()


def restart_everything(rig: ShardRig) -> None:
    rig.kill_shards()
    rig.open_shards()
    rig.start_coordinator()


RESTARTS = [restart_coordinator, restart_everything]


@pytest.mark.parametrize("restart", RESTARTS)
@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize("step", SWAP_STEPS)
def test_coordinator_dies_in_a_swap(
    rig: ShardRig, step: str, when: When, restart: Callable[[ShardRig], None]
) -> None:
    rig.faults.arm(step, when, Crash)
    with pytest.raises(Crash):
        swap(rig)
    restart(rig)
    decided = step.startswith("commit") or (step.startswith("put") and when is When.AFTER)
    assert swapped_blocks(rig) == (4 if decided else 0)
    assert (rig.log.find("r1") is not None) is decided
    # A retry ends in the same state, once.
    swap(rig)
    assert swapped_blocks(rig) == 4
    assert {rig.status(ref).version for ref in ALL_TOPICS} == {2}
    check_usable(rig)


@pytest.mark.parametrize("restart", RESTARTS)
@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize("step", DELETE_STEPS)
def test_coordinator_dies_in_a_delete(
    rig: ShardRig, step: str, when: When, restart: Callable[[ShardRig], None]
) -> None:
    rig.faults.arm(step, when, Crash)
    with pytest.raises(Crash):
        delete(rig)
    restart(rig)
    decided = step.startswith(("commit", "delete")) or (
        step == "put_if_absent revisions" and when is When.AFTER
    )
    assert is_deleted(rig) is decided
    delete(rig)
    assert is_deleted(rig)
    check_usable(rig)


@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize("step", SNAPSHOT_STEPS)
def test_coordinator_dies_in_a_snapshot(rig: ShardRig, step: str, when: When) -> None:
    rig.faults.arm(step, when, Crash)
    with pytest.raises(Crash):
        snapshot(rig)
    restart_everything(rig)
    decided = step.startswith("commit") or (
        step == "put_if_absent revisions" and when is When.AFTER
    )
    assert [item.name for item in rig.operations.list_snapshots()] == ["pinned"] * decided
    if not decided:
        with pytest.raises(NotFoundError):
            rig.operations.rollback(asked("r2"), "pinned")
    snapshot(rig)
    (pinned,) = rig.operations.list_snapshots()
    content = rig.weight(TOPIC)
    rig.push(TOPIC, "later")
    rig.operations.rollback(asked("r3"), pinned.name)
    np.testing.assert_array_equal(rig.weight(TOPIC), content)
    check_usable(rig)


@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize("step", SWAP_STEPS)
def test_a_call_is_lost_in_a_swap(rig: ShardRig, step: str, when: When) -> None:
    rig.faults.arm(step, when, UnavailableError)
    try:
        swap(rig)
    except UnavailableError:
        # Said to be undone, or committed but not confirmed: never in between.
        assert swapped_blocks(rig) in {0, 2, 4}
        committed = rig.log.find("r1") is not None
        assert committed is step.startswith("commit")
    else:
        assert swapped_blocks(rig) == 4
    assert not rig.faults.is_armed
    swap(rig)
    assert swapped_blocks(rig) == 4
    assert {rig.status(ref).version for ref in ALL_TOPICS} == {2}
    check_usable(rig)


def test_lost_answer_of_the_store_is_recognised_as_a_commit(rig: ShardRig) -> None:
    rig.faults.arm("put_if_absent revisions", When.AFTER, UnavailableError)
    swap(rig)
    assert swapped_blocks(rig) == 4
    assert rig.log.last == 1


def test_a_store_that_stops_answering_after_it_created_the_record(rig: ShardRig) -> None:
    real_run = rig.faults.run
    created = False

    def run(step: str, action: Callable[[], object]) -> object:
        nonlocal created
        if not step.startswith("put_if_absent revisions"):
            return real_run(step, action)
        if not created:
            created = True
            action()
        raise UnavailableError("the store does not answer")

    rig.faults.run = run  # type: ignore[method-assign,assignment]  # a fault of its own
    swap(rig)
    assert swapped_blocks(rig) == 4
    assert rig.log.committed.request_id == "r1"


@pytest.mark.parametrize("change", [swap, delete])
def test_a_commit_that_the_store_kept_to_itself_is_not_acknowledged_before_it_is_in_force(
    rig: ShardRig, change: Callable[[ShardRig], None]
) -> None:
    real_run = rig.faults.run
    created = False

    def run(step: str, action: Callable[[], object]) -> object:
        nonlocal created
        if step.startswith("commit shard-1"):
            raise UnavailableError("the shard does not answer")
        if not step.startswith("put_if_absent revisions"):
            return real_run(step, action)
        if not created:
            created = True
            action()
        raise UnavailableError("the store does not answer")

    rig.faults.run = run  # type: ignore[method-assign,assignment]  # a fault of its own
    with pytest.raises(UnavailableError, match="committed"):
        change(rig)
    rig.faults.run = real_run  # type: ignore[method-assign]
    change(rig)
    assert {shard.revision for shard in rig.shards.values()} == {1}


def test_what_a_shard_gave_up_waiting_for_is_aborted_for_good(rig: ShardRig) -> None:
    real_run = rig.faults.run

    def run(step: str, action: Callable[[], object]) -> object:
        if step.startswith("put_if_absent revisions"):
            # The coordinator is slow here, and the shards lose patience.
            for shard in rig.shards.values():
                shard.settle(float("inf"))
        return real_run(step, action)

    rig.faults.run = run  # type: ignore[method-assign,assignment]  # a fault of its own
    with pytest.raises(ConflictError):
        swap(rig)
    rig.faults.run = real_run  # type: ignore[method-assign]
    assert swapped_blocks(rig) == 0
    swap(rig)
    assert swapped_blocks(rig) == 4
    check_usable(rig)


def test_whoever_is_gone_when_it_is_his_turn_changes_nothing(rig: ShardRig) -> None:
    def gone() -> None:
        with pytest.raises(UnavailableError), rig.coordinator.exclusive():
            pass  # so it is this one's turn, and nobody commits between this question and the change
        raise DeadlineError("the caller is gone")

    steps = swap_steps()
    with pytest.raises(DeadlineError):
        rig.operations.apply(replace(asked("gone"), check_wanted=gone), steps)
    assert (swapped_blocks(rig), rig.log.last) == (0, 0)
    done = rig.operations.apply(asked("gone"), steps)
    # A retry is answered from the record, and asks for nothing that could be unwanted.
    assert rig.operations.apply(replace(asked("gone"), check_wanted=gone), steps) == done


def test_an_abort_of_a_coordinator_that_is_gone_may_come_late(rig: ShardRig) -> None:
    real_run = rig.faults.run

    def run(step: str, action: Callable[[], object]) -> object:
        if step.startswith("put_if_absent revisions"):
            # What the next one has prepared goes by the same number.
            rig.shards["shard-0"].abort(rig.log.last + 1)
        return real_run(step, action)

    rig.faults.run = run  # type: ignore[method-assign,assignment]  # a fault of its own
    with pytest.raises(ConflictError):
        swap(rig)
    rig.faults.run = real_run  # type: ignore[method-assign]
    assert swapped_blocks(rig) == 0
    restart_everything(rig)
    swap(rig)
    assert swapped_blocks(rig) == 4
    check_usable(rig)


def test_a_shard_that_is_down_before_the_commit_undoes_it(rig: ShardRig) -> None:
    shard = rig.shards.pop("shard-1")
    with pytest.raises(UnavailableError):
        swap(rig)
    rig.shards["shard-1"] = shard
    assert swapped_blocks(rig) == 0
    check_usable(rig)


def test_a_delete_is_not_acknowledged_until_every_owner_has_done_it(rig: ShardRig) -> None:
    rig.faults.arm("commit shard-0", When.BEFORE, UnavailableError)
    with pytest.raises(UnavailableError, match="committed"):
        delete(rig)
    assert rig.shards["shard-0"].revision == 0
    delete(rig)
    assert {shard.revision for shard in rig.shards.values()} == {1}
    assert is_deleted(rig)


def test_a_delete_that_fails_half_way_is_finished_by_its_retry(rig: ShardRig) -> None:
    for shard in rig.shards.values():
        shard.consolidate()
    slots = "partitions/0001/level-1/*/c.*"
    stuck = max(rig.objects.root.glob(slots))
    # The storage will not remove what is a folder: the commit stands, the destruction fails.
    content = stuck.read_bytes()
    stuck.unlink()
    stuck.mkdir()
    with pytest.raises(UnavailableError, match="committed"):
        delete(rig)
    stuck.rmdir()
    stuck.write_bytes(content)
    delete(rig)
    assert not list(rig.objects.root.glob(slots))


def test_an_abort_that_is_lost_is_repeated_before_the_next_transaction(rig: ShardRig) -> None:
    rig.faults.arm("prepare shard-1", When.BEFORE, UnavailableError)
    real_run = rig.faults.run

    def run_losing_aborts(step: str, action: Callable[[], object]) -> object:
        if step.startswith("abort"):
            raise UnavailableError(f"lost: {step}")
        return real_run(step, action)

    rig.faults.run = run_losing_aborts  # type: ignore[method-assign,assignment]  # a fault of its own
    with pytest.raises(UnavailableError):
        swap(rig)
    rig.faults.run = real_run  # type: ignore[method-assign]
    swap(rig, "r2")
    assert swapped_blocks(rig) == 4
    check_usable(rig)


def test_a_second_coordinator_takes_the_revision_over(rig: ShardRig) -> None:
    zombie = rig.operations
    rig.faults.arm("put_if_absent revisions", When.BEFORE, Crash)
    with pytest.raises(Crash):
        swap(rig)
    rig.start_coordinator()
    # The first one is not dead after all, and knows nothing of the second.
    rig.operations.apply(asked("r2"), [Withhold(topic=OTHER)])
    with pytest.raises(MembankError):
        zombie.apply(asked("r3"), [Withhold(topic=BlockRef(1, 99))])
    report = zombie.apply(asked("r4"), [Withhold(topic=BlockRef(1, 3))]).report
    assert report.revision == rig.bank.latest_number()
    assert swapped_blocks(rig) == 0
    records = [rig.bank.record(number) for number in range(rig.bank.latest_number() + 1)]
    assert [record.committed for record in records if record is not None].count(False) == 1


def test_a_revision_is_claimed_though_its_shards_started_again(rig: ShardRig) -> None:
    rig.faults.arm("put_if_absent revisions", When.BEFORE, Crash)
    with pytest.raises(Crash):
        swap(rig)
    # Each shard publishes a manifest at its start, so the prepared one is not the newest any more.
    rig.kill_shards()
    rig.open_shards()
    rig.start_coordinator()
    claimed = rig.bank.record(1)
    assert claimed is not None
    assert not claimed.committed
    check_usable(rig)


def test_records_form_a_chain(rig: ShardRig) -> None:
    for number in range(3):
        swap(rig, f"r{number}")
    digests = [
        hashlib.sha256(rig.objects.get(f"revisions/{n:010d}.json")).hexdigest() for n in range(4)
    ]
    links = [rig.log.read(number).previous_sha256 for number in range(4)]
    assert links == ["", *digests[:3]]
