"""Packs in the bank's own store: kept by name, gone with what they hold, whoever dies when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.fsck import FindingKind, check_bank
from membank.wire.errors import (
    AlreadyExistsError,
    CorruptionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete, Withhold
from shard_rig import Crash, ShardRig, When, asked

TOPIC, LEAF, SIBLING, ELSEWHERE = BlockRef(1, 1), BlockRef(2, 2), BlockRef(2, 3), BlockRef(1, 2)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank")
    rig.push(TOPIC, "a")
    rig.push(LEAF, "b")
    yield rig
    rig.close()


def keep(rig: ShardRig, topic: BlockRef, name: str, since: str | None = None) -> None:
    rig.operations.store_pack(topic, name, since=since).close()


def names(rig: ShardRig) -> list[str]:
    return [pack.name for pack in rig.operations.list_packs()]


def kinds(rig: ShardRig) -> set[FindingKind]:
    return {finding.kind for finding in check_bank(rig.objects).findings}


def test_a_stored_pack_is_the_exported_one(rig: ShardRig) -> None:
    keep(rig, TOPIC, "kept")
    data = rig.export(TOPIC)
    assert rig.objects.get("packs/kept.pack") == data
    (pack,) = rig.operations.list_packs()
    assert (pack.name, pack.topic, pack.revision) == ("kept", TOPIC, 0)
    assert pack.num_bytes == len(data)
    assert kinds(rig) == set()


def test_a_stored_pack_is_installed_by_name(rig: ShardRig) -> None:
    keep(rig, TOPIC, "kept")
    before = rig.weight(LEAF)
    rig.push(LEAF, "later")
    report, topic = rig.operations.import_stored(asked("i"), "kept")
    assert (topic, len(report.changes)) == (TOPIC, 3)
    assert before is not None
    np.testing.assert_array_equal(rig.weight(LEAF), before)
    assert rig.log.committed.detail["stored_pack"] == "kept"


def test_a_name_stands_for_one_pack(rig: ShardRig) -> None:
    keep(rig, TOPIC, "kept")
    # A repetition of the export, whose first answer was lost.
    keep(rig, TOPIC, "kept")
    rig.push(LEAF, "later")
    with pytest.raises(AlreadyExistsError) as caught:
        keep(rig, TOPIC, "kept")
    assert caught.value.reason is Reason.PACK_EXISTS
    with pytest.raises(InvalidArgumentError):
        keep(rig, TOPIC, "../kept")


def test_a_pack_is_destroyed_by_name(rig: ShardRig) -> None:
    keep(rig, TOPIC, "kept")
    gone = rig.operations.delete_pack(asked("x"), "kept")
    assert (gone.name, gone.topic, gone.revision) == ("kept", TOPIC, 0)
    assert rig.objects.list("packs") == []
    for name in ("kept", "never", "Not A Name"):
        with pytest.raises(NotFoundError) as caught:
            rig.operations.delete_pack(asked("y"), name)
        assert caught.value.reason is Reason.UNKNOWN_PACK
        with pytest.raises(NotFoundError):
            rig.operations.import_stored(asked("i"), name)


def test_who_destroyed_a_pack_is_on_record(rig: ShardRig) -> None:
    keep(rig, TOPIC, "kept")
    before = rig.state()
    gone = rig.operations.delete_pack(asked("x", principal="bob"), "kept")
    (record, *_) = rig.operations.audit(1)
    assert (record.operation, record.principal, record.request_id) == ("delete-pack", "bob", "x")
    assert (record.detail["stored_pack"], record.detail["topic"]) == ("kept", str(TOPIC))
    assert rig.state() == before
    # A retry gets the first answer, also where another pack has the name by now.
    assert rig.operations.delete_pack(asked("x", principal="bob"), "kept") == gone
    keep(rig, ELSEWHERE, "kept")
    assert rig.operations.delete_pack(asked("x", principal="bob"), "kept") == gone
    with pytest.raises(InvalidArgumentError) as caught:
        rig.operations.delete_pack(asked("x", principal="bob"), "another")
    assert caught.value.reason is Reason.REQUEST_ID_REUSED
    rig.start_coordinator()
    assert names(rig) == ["kept"], "not even a restart takes it for the one that went"
    assert kinds(rig) == set()


@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize(
    "step", ["put_if_absent revisions", "delete packs/kept.pack", "delete packs/kept.json"]
)
def test_who_dies_while_a_pack_is_destroyed_by_name_has_it_destroyed_by_the_next(
    rig: ShardRig, step: str, when: When
) -> None:
    keep(rig, TOPIC, "kept")
    rig.faults.arm(step, when, Crash)
    with pytest.raises(Crash):
        rig.operations.delete_pack(asked("x"), "kept")
    is_committed = step != "put_if_absent revisions" or when is When.AFTER
    rig.start_coordinator()
    assert bool(rig.objects.list("packs")) is not is_committed
    assert rig.operations.delete_pack(asked("x"), "kept").topic == TOPIC
    assert rig.objects.list("packs") == []
    assert rig.log.last == 1


def test_a_dry_run_of_a_deletion_names_the_packs_that_would_go(rig: ShardRig) -> None:
    keep(rig, TOPIC, "topic")
    keep(rig, SIBLING, "sibling")
    keep(rig, LEAF, "leaf")
    dry = rig.operations.apply(asked("", dry_run=True), [Delete(topic=LEAF)]).report
    assert dry.packs == ("leaf", "topic")
    assert names(rig) == ["leaf", "sibling", "topic"]
    report = rig.operations.apply(asked("d"), [Delete(topic=LEAF)]).report
    assert report.packs == dry.packs
    assert names(rig) == ["sibling"]
    # So does the answer to a retry, and the account.
    assert rig.operations.apply(asked("d"), [Delete(topic=LEAF)]).report == report
    (record, *_) = rig.operations.audit(1)
    assert record.detail["packs"] == ["leaf", "topic"]
    assert rig.operations.apply(asked("w"), [Withhold(topic=SIBLING)]).report.packs == ()


@pytest.mark.parametrize(
    ("deleted", "left"),
    [
        (LEAF, ["elsewhere", "sibling"]),
        (TOPIC, ["elsewhere"]),
        (SIBLING, ["elsewhere", "leaf"]),
    ],
)
def test_a_deletion_destroys_every_pack_that_holds_a_block_of_it(
    rig: ShardRig, deleted: BlockRef, left: list[str]
) -> None:
    rig.operations.create_snapshot(asked("s"), "then")
    rig.push(LEAF, "c")
    keep(rig, TOPIC, "topic")
    keep(rig, LEAF, "leaf")
    keep(rig, SIBLING, "sibling")
    keep(rig, ELSEWHERE, "elsewhere")
    # Carries one block, and tells of all.
    keep(rig, TOPIC, "diff", since="then")
    rig.operations.apply(asked("d"), [Delete(topic=deleted)])
    assert names(rig) == left
    stored = {f"packs/{name}.{ending}" for name in left for ending in ("json", "pack")}
    assert set(rig.objects.list("packs")) == stored
    assert kinds(rig) == set()


def test_what_is_made_anew_is_kept_by_a_deletion_that_is_repeated(rig: ShardRig) -> None:
    pack = rig.export(TOPIC)
    rig.operations.apply(asked("d"), [Delete(topic=TOPIC)])
    rig.operations.import_topic(asked("i"), pack)
    keep(rig, TOPIC, "anew")
    deletion = rig.bank.require_record(1)
    rig.coordinator._packs.destroy_ended(deletion)  # as a restart would
    assert names(rig) == ["anew"]
    # A retry of the deletion deletes nothing that came after it.
    rig.operations.apply(asked("d"), [Delete(topic=TOPIC)])
    assert names(rig) == ["anew"]


def restart_coordinator(rig: ShardRig) -> None:
    rig.start_coordinator()


def restart_everything(rig: ShardRig) -> None:
    rig.kill_shards()
    rig.open_shards()
    rig.start_coordinator()


@pytest.mark.parametrize("restart", [restart_coordinator, restart_everything])
@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize(
    "step",
    [
        "put_if_absent revisions",
        "commit shard-1",
        "delete packs/kept.pack",
        "delete packs/kept.json",
    ],
)
def test_who_dies_while_packs_are_destroyed_has_them_destroyed_by_the_next(
    rig: ShardRig, step: str, when: When, restart: Callable[[ShardRig], None]
) -> None:
    keep(rig, TOPIC, "kept")
    rig.faults.arm(step, when, Crash)
    with pytest.raises(Crash):
        rig.operations.apply(asked("d"), [Delete(topic=LEAF)])
    is_committed = step != "put_if_absent revisions" or when is When.AFTER
    restart(rig)
    assert names(rig) == ([] if is_committed else ["kept"])
    assert (rig.status(LEAF).state is BlockState.DELETED) is is_committed
    assert bool(rig.objects.list("packs")) is not is_committed
    assert kinds(rig) == set()


def test_fsck_reports_a_pack_that_outlives_its_blocks(rig: ShardRig) -> None:
    keep(rig, TOPIC, "kept")
    rig.faults.arm("delete packs", When.BEFORE, Crash)
    with pytest.raises(Crash):
        rig.operations.apply(asked("d"), [Delete(topic=LEAF)])
    findings = check_bank(rig.objects).findings
    assert (FindingKind.REMOVAL_UNFINISHED, "packs/kept.pack") in {
        (f.kind, f.key) for f in findings
    }


@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize("step", ["put packs/kept.json", "put packs/kept.pack"])
def test_an_export_that_was_cut_off_leaves_no_pack(rig: ShardRig, step: str, when: When) -> None:
    rig.faults.arm(step, when, Crash)
    with pytest.raises(Crash):
        keep(rig, TOPIC, "kept")
    rig.start_coordinator()
    is_there = (step, when) == ("put packs/kept.pack", When.AFTER)
    assert names(rig) == (["kept"] if is_there else [])
    if rig.objects.list("packs") and not is_there:
        assert kinds(rig) == {FindingKind.PACK_UNFINISHED}
        with pytest.raises(NotFoundError):
            rig.operations.import_stored(asked("i"), "kept")
    # The name is free, and a deletion overlooks nothing.
    keep(rig, TOPIC, "kept")
    assert names(rig) == ["kept"]
    rig.operations.apply(asked("d"), [Delete(topic=TOPIC)])
    assert rig.objects.list("packs") == []


def test_garbage_collection_leaves_packs(rig: ShardRig) -> None:
    keep(rig, TOPIC, "kept")
    rig.operations.collect_garbage(asked("g"), keep_revisions=1)
    assert names(rig) == ["kept"]


def test_a_damaged_pack_is_refused_reported_and_can_be_destroyed(rig: ShardRig) -> None:
    keep(rig, TOPIC, "kept")
    data = bytearray(rig.objects.get("packs/kept.pack"))
    data[-1] ^= 1
    rig.objects.put("packs/kept.pack", bytes(data))
    with pytest.raises(CorruptionError):
        rig.operations.import_stored(asked("i"), "kept")
    assert kinds(rig) == {FindingKind.PACK_DAMAGED}
    rig.objects.put("packs/kept.json", b"{}")
    assert kinds(rig) == {FindingKind.PACK_DAMAGED}
    keep(rig, ELSEWHERE, "other")
    assert names(rig) == ["other"]
    rig.operations.delete_pack(asked("x"), "kept")
    assert kinds(rig) == set()


def test_a_pack_that_nobody_can_read_goes_with_any_deletion(rig: ShardRig) -> None:
    keep(rig, ELSEWHERE, "kept")
    rig.objects.put("packs/kept.json", b"{}")
    rig.operations.apply(asked("d"), [Delete(topic=TOPIC)])
    assert rig.objects.list("packs") == []


def test_labels_of_a_deleted_topic_are_in_no_pack_either(rig: ShardRig) -> None:
    keep(rig, TOPIC, "kept")
    rig.operations.apply(asked("d"), [Delete(topic=LEAF)])
    files = [path.read_bytes() for path in rig.objects.root.rglob("*") if path.is_file()]
    assert not [data for data in files if b"label of 2-2" in data]
