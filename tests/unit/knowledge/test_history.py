"""Earlier states of a bank over two shards: back to them, giving them up, and what goes then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.store import LocalObjects
from membank.bank_service.store.objects import PROBES
from membank.wire.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format.layout import snapshot_key, tree_key
from membank.wire.records import GarbageKind, GarbageReport, Snapshot
from membank.wire.spec import Array, BlockRef, BlockState
from membank.wire.steps import Delete, Restore, Swap, Withhold
from shard_rig import RIG_SPEC, Crash, ShardRig, When, asked

TOPIC, OTHER = BlockRef(1, 1), BlockRef(1, 2)
UNDER = (BlockRef(2, 2), BlockRef(2, 3))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank")
    yield rig
    rig.close()


def filled(ref: BlockRef, value: float) -> Array:
    return np.full(RIG_SPEC.block_shape(ref.level), value, np.float32)


def swap(rig: ShardRig, request_id: str, *refs: BlockRef, value: float = 1.0) -> int:
    contents = [Swap(ref=ref, weight=filled(ref, value)) for ref in refs]
    return rig.operations.apply(asked(request_id), contents).report.revision


def full_of(rig: ShardRig, ref: BlockRef) -> tuple[int, bytes, dict[str, bytes]]:
    """Return step, weight and optimizer state of a block."""
    (content,) = rig.owner(ref).read([ref])
    state = {role.value: array.tobytes() for role, array in content.optimizer_state.items()}
    return content.step, content.weight.tobytes(), state


# ---- rollback to a revision


def test_back_to_the_end_of_a_revision_with_optimizer_state_and_step(rig: ShardRig) -> None:
    swap(rig, "r1", TOPIC)
    rig.push(TOPIC, "p1")
    rig.push(TOPIC, "p2")
    end_of_1 = full_of(rig, TOPIC)
    swap(rig, "r2", TOPIC, value=9.0)
    rig.push(TOPIC, "p3")
    before = rig.status(TOPIC).version
    report = rig.operations.rollback(asked("r3"), 1)
    assert [(c.ref, c.version_after) for c in report.changes] == [(TOPIC, before + 1)]
    assert full_of(rig, TOPIC) == end_of_1
    assert end_of_1[0] == 2
    # And on from there, as if nothing had happened.
    assert rig.push(TOPIC, "p4").results[0].accepted


def test_the_end_of_a_revision_holds_what_was_folded_during_it(rig: ShardRig) -> None:
    initial = full_of(rig, TOPIC), full_of(rig, OTHER)
    rig.push(TOPIC, "p1")
    rig.push(OTHER, "p2")
    trained = full_of(rig, OTHER)
    # A commit folds the partition that it changes, and that one alone.
    swap(rig, "r1", OTHER)
    swap(rig, "r2", TOPIC)
    rig.operations.rollback(asked("r3"), 0)
    assert (full_of(rig, TOPIC), full_of(rig, OTHER)) == (initial[0], trained)
    rig.operations.rollback(asked("r4"), 1, TOPIC)
    assert full_of(rig, TOPIC)[0] == 1


def test_a_rollback_can_be_rolled_back(rig: ShardRig) -> None:
    swap(rig, "r1", TOPIC, value=1.0)
    swap(rig, "r2", TOPIC, value=2.0)
    rig.push(TOPIC, "p1")
    lost = full_of(rig, TOPIC)
    rig.operations.rollback(asked("r3"), 1)
    assert full_of(rig, TOPIC) != lost
    rig.operations.rollback(asked("r4"), 2)
    assert full_of(rig, TOPIC) == lost


@pytest.mark.parametrize(
    ("topic", "only_block", "changed"),
    [
        (None, False, {TOPIC, *UNDER, OTHER}),
        (TOPIC, False, {TOPIC, *UNDER}),
        (TOPIC, True, {TOPIC}),
        (UNDER[1], True, {UNDER[1]}),
    ],
)
@pytest.mark.parametrize("to_snapshot", [True, False])
def test_of_the_bank_a_topic_or_a_block(
    rig: ShardRig,
    topic: BlockRef | None,
    changed: set[BlockRef],
    *,
    only_block: bool,
    to_snapshot: bool,
) -> None:
    refs = (TOPIC, *UNDER, OTHER)
    swap(rig, "r1", *refs, value=1.0)
    rig.operations.create_snapshot(asked("r2"), "then")
    swap(rig, "r3", *refs, value=2.0)
    report = rig.operations.rollback(
        asked("r4"), "then" if to_snapshot else 2, topic, only_block=only_block
    )
    assert {change.ref for change in report.changes} == changed
    for ref in refs:
        np.testing.assert_array_equal(rig.weight(ref), filled(ref, 1.0 if ref in changed else 2.0))


def test_a_dry_run_says_what_would_change(rig: ShardRig) -> None:
    swap(rig, "r1", TOPIC)
    swap(rig, "r2", TOPIC, value=2.0)
    state = rig.state()
    dry = rig.operations.rollback(asked("", dry_run=True), 1)
    assert rig.state() == state
    assert rig.log.last == 2
    assert dry.changes == rig.operations.rollback(asked("r3"), 1).changes


def test_a_revision_does_not_lead_behind_a_delete(rig: ShardRig) -> None:
    swap(rig, "r1", TOPIC, UNDER[0], OTHER)
    rig.operations.apply(asked("r2"), [Delete(topic=TOPIC)])
    swap(rig, "r3", UNDER[0], OTHER, value=5.0)
    report = rig.operations.rollback(asked("r4"), 1)
    assert {change.ref for change in report.changes} == {OTHER}
    assert rig.status(TOPIC).state is BlockState.DELETED
    np.testing.assert_array_equal(rig.weight(UNDER[0]), filled(UNDER[0], 5.0))


def test_a_withheld_block_comes_back_as_it_was(rig: ShardRig) -> None:
    swap(rig, "r1", TOPIC)
    rig.operations.apply(asked("r2"), [Withhold(topic=TOPIC)])
    rig.operations.apply(asked("r3"), [Restore(topic=TOPIC)])
    rig.operations.rollback(asked("r4"), 2)
    assert rig.status(TOPIC).state is BlockState.WITHHELD
    assert rig.log.committed.removal_revision == 4
    rig.operations.rollback(asked("r5"), 1)
    np.testing.assert_array_equal(rig.weight(TOPIC), filled(TOPIC, 1.0))


@pytest.mark.slow
def test_what_there_is_no_way_back_to_is_said(rig: ShardRig) -> None:
    for number in range(1, 13):
        swap(rig, f"r{number}", TOPIC, value=float(number))
        if number == 2:
            rig.operations.create_snapshot(asked("s"), "early")
    present = rig.log.last
    with pytest.raises(InvalidArgumentError, match="in force"):
        rig.operations.rollback(asked("x1"), present)
    for unknown in (present + 1, 10_000):
        with pytest.raises(NotFoundError) as caught:
            rig.operations.rollback(asked("x2"), unknown)
        assert caught.value.reason is Reason.UNKNOWN_REVISION
    with pytest.raises(NotFoundError) as caught:
        rig.operations.rollback(asked("x3"), 1)
    # The eight newest of 0..13 are kept.
    assert caught.value.reason is Reason.UNKNOWN_REVISION
    assert caught.value.metadata == {"revision": "1", "oldest": "6"}
    assert "early (3)" in caught.value.message
    with pytest.raises(InvalidArgumentError):
        rig.operations.rollback(asked("x4"), 6, only_block=True)
    assert rig.log.last == present
    for target, value in ((6, 5.0), (3, 2.0)):
        rig.operations.rollback(asked(f"back-{target}"), target)
        np.testing.assert_array_equal(rig.weight(TOPIC), filled(TOPIC, value))


def test_a_revision_that_was_given_up_is_none(rig: ShardRig) -> None:
    swap(rig, "r1", TOPIC)
    rig.faults.arm("put_if_absent revisions", When.BEFORE, Crash)
    with pytest.raises(Crash):
        swap(rig, "r2", TOPIC, value=2.0)
    rig.start_coordinator()
    assert not rig.log.read(2).committed
    swap(rig, "r3", TOPIC, value=3.0)
    with pytest.raises(NotFoundError):
        rig.operations.rollback(asked("x"), 2)
    rig.operations.rollback(asked("r4"), 1)
    np.testing.assert_array_equal(rig.weight(TOPIC), filled(TOPIC, 1.0))


@pytest.mark.slow
def test_a_block_may_go_further_back_than_the_bank(rig: ShardRig) -> None:
    # OTHER lies in a partition that the later swaps pass by.
    swap(rig, "r0", OTHER, value=1.0)
    swap(rig, "r1", OTHER, value=2.0)
    for number in range(10):
        swap(rig, f"s{number}", TOPIC, value=float(number))
    with pytest.raises(NotFoundError):
        rig.operations.rollback(asked("x"), 1)
    rig.operations.rollback(asked("back"), 1, OTHER)
    np.testing.assert_array_equal(rig.weight(OTHER), filled(OTHER, 1.0))


@pytest.mark.slow
def test_the_audit_log_lists_the_ways_back(rig: ShardRig) -> None:
    rig.operations.create_snapshot(asked("s"), "early")
    for number in range(1, 12):
        swap(rig, f"r{number}", TOPIC)
    listed = [record.revision for record in rig.operations.audit(100, retained_only=True)]
    assert listed == [11, 10, 9, 8, 7, 6, 5, 1]
    assert [r.revision for r in rig.operations.audit(2, retained_only=True)] == [11, 10]
    for number, revision in enumerate(listed):
        rig.operations.rollback(asked("", dry_run=True), revision)
        assert number < 8
    for revision in set(range(12)) - set(listed):
        with pytest.raises(NotFoundError):
            rig.operations.rollback(asked("", dry_run=True), revision)


def test_a_rollback_says_on_record_where_it_went(rig: ShardRig) -> None:
    swap(rig, "r1", TOPIC)
    swap(rig, "r2", TOPIC, value=2.0)
    rig.operations.rollback(asked("r3"), 1, TOPIC, only_block=True)
    (record,) = rig.operations.audit(1)
    assert record.operation == "rollback"
    assert record.detail["to_revision"] == 1
    assert (record.detail["topic"], record.detail["only_block"]) == ("1/1", True)


# ---- giving a snapshot up


def test_a_snapshot_is_given_up_on_record(rig: ShardRig) -> None:
    snapshot = rig.operations.create_snapshot(asked("r1"), "then")
    given_up, revision = rig.operations.delete_snapshot(asked("r2"), "then")
    assert (given_up, revision) == (snapshot, 2)
    assert rig.operations.list_snapshots() == ()
    assert rig.objects.list("snapshots") == []
    (record,) = rig.operations.audit(1)
    assert (record.operation, record.principal) == ("delete-snapshot", "alice")
    assert record.detail["snapshot"] == "then"
    # A retry gets the first answer, also from a coordinator that starts anew.
    assert rig.operations.delete_snapshot(asked("r2"), "then") == (given_up, revision)
    rig.start_coordinator()
    assert rig.operations.delete_snapshot(asked("r2"), "then") == (given_up, revision)
    with pytest.raises(NotFoundError) as caught:
        rig.operations.delete_snapshot(asked("r3"), "then")
    assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT


@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize("step", ["put_if_absent revisions", "commit shard-1", "delete snapshots"])
def test_it_is_given_up_or_it_is_there_whenever_the_coordinator_dies(
    rig: ShardRig, step: str, when: When
) -> None:
    rig.push(TOPIC, "p1")
    rig.operations.create_snapshot(asked("r1"), "then")
    rig.faults.arm(step, when, Crash)
    with pytest.raises(Crash):
        rig.operations.delete_snapshot(asked("r2"), "then")
    rig.start_coordinator()
    is_given_up = rig.log.find("r2") is not None
    assert is_given_up == (step != "put_if_absent revisions" or when is When.AFTER)
    assert (rig.objects.list("snapshots") == []) == is_given_up
    assert (rig.operations.list_snapshots() == ()) == is_given_up
    # A new one of the same name is another.
    if is_given_up:
        again = rig.operations.create_snapshot(asked("r3"), "then")
        rig.start_coordinator()
        assert rig.operations.list_snapshots() == (again,)
    else:
        rig.operations.rollback(asked("r4"), "then")


def test_a_shard_that_is_down_keeps_the_name_until_it_knows(rig: ShardRig) -> None:
    rig.operations.create_snapshot(asked("r1"), "then")
    down = rig.shards["shard-1"]
    rig.faults.arm("commit shard-1", When.BEFORE, UnavailableError)
    with pytest.raises(UnavailableError):
        rig.operations.delete_snapshot(asked("r2"), "then")
    # It would not know why what it reads is gone.
    assert rig.objects.list("snapshots") == [snapshot_key("then")]
    assert rig.operations.list_snapshots() == ()
    assert down.revision == 1
    rig.operations.delete_snapshot(asked("r2"), "then")
    assert down.revision == 2
    assert rig.objects.list("snapshots") == []


# ---- garbage


def kinds(report: GarbageReport) -> dict[GarbageKind, int]:
    return {garbage.kind: garbage.num_objects for garbage in report.garbage}


def litter(rig: ShardRig) -> None:
    """Leave what crashes leave among the documents of a bank."""
    rig.objects.put(tree_key(77), b"a tree that was never in force")
    rig.bank.create_snapshot(Snapshot(name="never", revision=99, create_time_s=0.0))
    rig.objects.put(f"{PROBES}/0123", b"first")


class _Listed(LocalObjects):
    """Notes what is listed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.prefixes: list[str] = []

    def list(self, prefix: str) -> list[str]:
        self.prefixes.append(prefix)
        return super().list(prefix)


def test_a_collection_does_not_list_the_whole_bank(rig: ShardRig) -> None:
    litter(rig)
    objects = _Listed(rig.objects.root)
    rig.objects = objects
    rig.start_coordinator()
    objects.prefixes.clear()
    assert GarbageKind.PROBE in kinds(rig.operations.collect_garbage(asked("g")))
    assert "" not in objects.prefixes


def test_documents_that_nobody_needs_go(rig: ShardRig) -> None:
    swap(rig, "r1", TOPIC)
    snapshot = rig.operations.create_snapshot(asked("r2"), "then")
    litter(rig)
    before = {
        key: len(rig.objects.get(key)) for key in rig.objects.list("") if "journal" not in key
    }
    dry = rig.operations.collect_garbage(asked("", dry_run=True))
    assert dry.dry_run
    assert kinds(dry) == {GarbageKind.SNAPSHOT: 1, GarbageKind.TREE: 1, GarbageKind.PROBE: 1}
    wet = rig.operations.collect_garbage(asked("g"))
    assert wet.garbage == dry.garbage
    keys = {key for garbage in wet.garbage for key in garbage.keys}
    assert keys == {tree_key(77), snapshot_key("never"), f"{PROBES}/0123"}
    assert wet.num_bytes == sum(before[key] for key in keys)
    left = {key for key in rig.objects.list("") if "journal" not in key}
    assert left == before.keys() - keys
    assert rig.operations.list_snapshots() == (snapshot,)
    assert rig.operations.collect_garbage(asked("g2")).garbage == ()
    # No history was given up, so there is nothing to account for.
    assert rig.log.last == 2


def test_history_is_given_up_on_record_and_for_good(rig: ShardRig) -> None:
    for number in range(1, 6):
        swap(rig, f"r{number}", TOPIC, OTHER, value=float(number))
        rig.push(TOPIC, f"p{number}")
    state = rig.state()
    dry = rig.operations.collect_garbage(asked("", dry_run=True), keep_revisions=2)
    assert rig.log.last == 5
    wet = rig.operations.collect_garbage(asked("g", principal="root"), keep_revisions=2)
    assert kinds(dry).keys() == {GarbageKind.RETIRED_MANIFEST, GarbageKind.RETIRED_SLOT}
    assert kinds(wet).keys() == kinds(dry).keys()
    (record,) = rig.operations.audit(1)
    assert (record.operation, record.principal, record.revision) == ("gc", "root", 6)
    assert record.detail["keep_revisions"] == 2
    assert wet.history_from == record.detail["history_from"] == 5
    assert rig.state() == state
    assert [r.revision for r in rig.operations.audit(9, retained_only=True)] == [5]
    with pytest.raises(NotFoundError):
        rig.operations.rollback(asked("x"), 4)
    # Again, and from cron every night: there is nothing more to give up.
    assert rig.operations.collect_garbage(asked("g2"), keep_revisions=2).garbage == ()
    assert rig.log.last == 6
    rig.operations.rollback(asked("back"), 5)


def test_one_revision_is_the_present_alone(rig: ShardRig) -> None:
    rig.push(UNDER[0], "p0")
    rig.operations.create_snapshot(asked("s"), "then")
    rig.push(UNDER[0], "p1")
    swap(rig, "r1", TOPIC)
    rig.operations.delete_snapshot(asked("d"), "then")
    state = rig.state()
    rig.operations.collect_garbage(asked("g"), keep_revisions=1)
    assert rig.state() == state
    assert rig.operations.audit(9, retained_only=True) == ()
    for partition in range(RIG_SPEC.num_partitions):
        # A swapped block has a weight alone, an updated one every role.
        keys = rig.objects.list(f"partitions/{partition:04d}")
        slots = [key for key in keys if "/weight/c." in key]
        written = [ref for ref, (version, _, _) in state.items() if version]
        here = [ref for ref in written if RIG_SPEC.partition_of(ref) == partition]
        assert len(slots) == len(here)
        assert {key.replace("/exp_avg_sq/", "/weight/") for key in keys if "_sq/c." in key} <= {
            *slots
        }


def test_a_snapshot_outlives_the_history_around_it(rig: ShardRig) -> None:
    rig.push(TOPIC, "p1")
    then = full_of(rig, TOPIC)
    rig.operations.create_snapshot(asked("s"), "then")
    for number in range(3):
        swap(rig, f"r{number}", TOPIC)
    rig.operations.collect_garbage(asked("g"), keep_revisions=1)
    rig.operations.rollback(asked("back"), "then")
    assert full_of(rig, TOPIC) == then


def test_a_retry_of_giving_up_goes_on_where_it_was(rig: ShardRig) -> None:
    for number in range(1, 6):
        swap(rig, f"r{number}", TOPIC, OTHER, value=float(number))
    rig.faults.arm("collect 2", When.BEFORE, UnavailableError)
    with pytest.raises(UnavailableError):
        rig.operations.collect_garbage(asked("g"), keep_revisions=2)
    assert rig.log.committed.operation == "gc"
    swap(rig, "later", TOPIC)
    report = rig.operations.collect_garbage(asked("g"), keep_revisions=2)
    assert report.history_from == 5
    assert all("0002" in key for garbage in report.garbage for key in garbage.keys)
    assert rig.log.committed.operation == "swap"
    with pytest.raises(ConflictError):
        rig.operations.collect_garbage(asked("g", principal="mallory"), keep_revisions=2)


def test_a_name_that_is_being_pinned_is_not_taken_for_garbage(rig: ShardRig) -> None:
    rig.push(TOPIC, "p1")
    rig.faults.arm("put_if_absent revisions", When.BEFORE, Crash)
    with pytest.raises(Crash):
        rig.operations.create_snapshot(asked("s"), "then")
    assert rig.objects.list("snapshots") == [snapshot_key("then")]
    # The coordinator that comes first settles what was under way; then it is a name of nothing.
    rig.start_coordinator()
    report = rig.operations.collect_garbage(asked("g"))
    assert kinds(report) == {GarbageKind.SNAPSHOT: 1}
    assert rig.operations.create_snapshot(asked("s2"), "then").name == "then"
