"""A bank damaged in one way gives one finding, which names the object; a whole one gives none."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from damaging import check, flip, found, slot_of
from membank.bank_service.fsck import FindingKind, Severity, check_bank
from membank.bank_service.shard import Shard
from membank.bank_service.store import Bank, LocalObjects
from membank.bank_service.store.bank import UNPIN_OPERATION
from membank.bank_service.store.objects import PROBES, storage_error
from membank.wire.errors import FailedPreconditionError, NotFoundError, Reason
from membank.wire.format import (
    TreeDocument,
    encode_revision,
    encode_snapshot,
    encode_tree,
)
from membank.wire.format.layout import revision_key
from membank.wire.records import Snapshot
from tiny_bank import create_bank
from whole_bank import SNAPSHOT, A, commit, take_snapshot


def test_a_whole_bank_is_clean(template: Path) -> None:
    report = check(template)
    assert report.findings == ()
    assert report.counts == {}
    assert report.is_clean
    assert report.revision == 3
    assert report.checked.num_revisions == 4
    assert report.checked.num_manifests == len(list(template.glob("partitions/*/manifests/*")))
    assert report.checked.num_slots == len(list(template.glob("partitions/*/*/*/c.*")))
    assert report.checked.num_bytes == sum(
        path.stat().st_size for path in template.glob("partitions/*/*/*/c.*")
    )


def test_a_quick_check_reads_no_slot(root: Path) -> None:
    flip(root / slot_of(root, A))
    report = check(root, deep=False)
    assert report.is_clean
    assert report.checked.num_slots > 0
    assert report.checked.num_bytes == 0
    (root / slot_of(root, A)).unlink()
    assert found(root, deep=False) == {(FindingKind.SLOT_MISSING, slot_of(root, A))}


def test_nothing_is_written(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    check(root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


# ---- bank.json


def test_no_bank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        check(tmp_path)
    assert caught.value.reason is Reason.NOT_A_BANK


def test_a_newer_bank_is_refused(root: Path) -> None:
    document = json.loads((root / "bank.json").read_bytes())
    (root / "bank.json").write_text(json.dumps({**document, "format": 3}))
    with pytest.raises(FailedPreconditionError) as caught:
        check(root)
    assert caught.value.reason is Reason.FORMAT_TOO_NEW


def test_a_missing_spec(root: Path) -> None:
    (root / "bank.json").unlink()
    assert found(root) == {(FindingKind.SPEC_MISSING, "bank.json")}


def test_a_damaged_spec_does_not_hide_the_records(root: Path) -> None:
    flip(root / "bank.json")
    (root / revision_key(1)).write_bytes(b"")
    assert found(root) == {
        (FindingKind.SPEC_DAMAGED, "bank.json"),
        (FindingKind.RECORD_DAMAGED, revision_key(1)),
    }


# ---- records


@pytest.mark.parametrize("revision", [0, 1, 2])
def test_a_missing_record(root: Path, revision: int) -> None:
    (root / revision_key(revision)).unlink()
    assert found(root) == {(FindingKind.RECORD_MISSING, revision_key(revision))}


def test_a_record_of_a_far_revision(root: Path) -> None:
    # Looking at every number in between would take days.
    (root / revision_key(9_999_999_999)).write_bytes((root / revision_key(1)).read_bytes())
    report = check(root)
    assert report.counts[FindingKind.RECORD_MISSING] > 50
    assert report.of(FindingKind.RECORD_MISSING)[0].key == revision_key(4)
    assert report.of(FindingKind.RECORD_DAMAGED)[0].key == revision_key(9_999_999_999)


def test_the_newest_record_is_missed_by_what_belongs_to_it(root: Path) -> None:
    (root / revision_key(3)).unlink()
    missing = {(kind, key) for kind, key in found(root) if kind.severity is Severity.DAMAGE}
    assert missing == {(FindingKind.RECORD_MISSING, revision_key(3))}


@pytest.mark.parametrize("revision", range(4))
def test_a_damaged_record(root: Path, revision: int) -> None:
    path = root / revision_key(revision)
    flip(path, path.read_bytes().index(b'"operation"') + 1)
    assert found(root) == {(FindingKind.RECORD_DAMAGED, revision_key(revision))}


def test_a_record_under_another_number(root: Path) -> None:
    (root / revision_key(2)).write_bytes((root / revision_key(1)).read_bytes())
    assert found(root) == {(FindingKind.RECORD_DAMAGED, revision_key(2))}


def test_a_record_that_was_replaced(root: Path) -> None:
    bank = Bank.open(LocalObjects(root))
    record = bank.record(2)
    assert record is not None
    forged = encode_revision(dataclasses.replace(record, principal="somebody else"))
    (root / revision_key(2)).write_bytes(forged)
    assert found(root) == {(FindingKind.CHAIN_BROKEN, revision_key(3))}


# ---- trees and snapshots


def test_a_missing_tree(root: Path) -> None:
    (root / "trees/0000000003.safetensors").unlink()
    assert found(root) == {(FindingKind.TREE_MISSING, "trees/0000000003.safetensors")}


def test_a_damaged_tree(root: Path) -> None:
    flip(root / "trees/0000000003.safetensors")
    assert found(root) == {(FindingKind.TREE_DAMAGED, "trees/0000000003.safetensors")}


def test_a_superseded_tree(root: Path) -> None:
    (root / "trees/0000000000.safetensors").write_bytes(encode_tree(TreeDocument()))
    assert found(root) == {(FindingKind.TREE_SUPERSEDED, "trees/0000000000.safetensors")}


def test_a_damaged_snapshot(root: Path) -> None:
    flip(root / f"snapshots/{SNAPSHOT}.json")
    assert found(root) == {(FindingKind.SNAPSHOT_DAMAGED, f"snapshots/{SNAPSHOT}.json")}


def test_a_snapshot_under_another_name(root: Path) -> None:
    data = (root / f"snapshots/{SNAPSHOT}.json").read_bytes()
    (root / "snapshots/other.json").write_bytes(data)
    assert found(root) == {(FindingKind.SNAPSHOT_DAMAGED, "snapshots/other.json")}


def test_a_snapshot_that_was_given_up(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    shard = Shard.open(bank)
    take_snapshot(shard, bank, [], "old")
    take_snapshot(shard, bank, [], "kept")
    commit(shard, bank, [], operation=UNPIN_OPERATION, detail={"snapshot": "old"})
    # The service removes the name next; here it died before.
    assert found(tmp_path) == {(FindingKind.SNAPSHOT_GIVEN_UP, "snapshots/old.json")}
    bank.objects.delete("snapshots/old.json")
    assert found(tmp_path) == set()
    # The name may be given again.
    take_snapshot(shard, bank, [], "old")
    assert found(tmp_path) == set()
    shard.close()


@pytest.mark.parametrize("revision", [2, 4])
def test_a_name_that_was_never_committed(root: Path, revision: int) -> None:
    snapshot = Snapshot(name="late", revision=revision, create_time_s=0.0)
    (root / "snapshots/late.json").write_bytes(encode_snapshot(snapshot))
    assert found(root) == {(FindingKind.SNAPSHOT_UNCOMMITTED, "snapshots/late.json")}


# ---- storage that fails


class UnreadableObjects(LocalObjects):
    """A directory with one file on a bad sector."""

    def __init__(self, root: Path, key: str) -> None:
        super().__init__(root)
        self._bad = key

    def get(self, key: str) -> bytes:
        if key == self._bad:
            raise storage_error(OSError(errno.EIO, os.strerror(errno.EIO)), key)
        return super().get(key)


@pytest.mark.slow
def test_an_object_that_cannot_be_read(template: Path) -> None:
    for path in template.rglob("*"):
        key = path.relative_to(template).as_posix()
        if not path.is_file() or key.startswith(".tmp/") or path.name == "lock":
            continue
        report = check_bank(UnreadableObjects(template, key))
        assert [(f.kind, f.key) for f in report.findings] == [
            (FindingKind.OBJECT_UNREADABLE, key)
        ], key
        assert "Input/output error" in report.findings[0].problem


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_anything_in_any_place(root: Path) -> None:
    rng = np.random.default_rng(0)
    paths = [path for path in sorted(root.rglob("*")) if path.is_file() and path.name != "lock"]
    paths = [path for path in paths if ".tmp" not in path.parts]
    contents = [path.read_bytes() for path in paths]
    for path, whole in zip(paths, contents, strict=True):
        others = [contents[index] for index in rng.integers(0, len(contents), 2)]
        for content in (bytes(100), b"[]", rng.bytes(300), *others):
            path.write_bytes(content)
            report = check(root)
            if content != whole:
                key = path.relative_to(root).as_posix()
                # Another segment of the same journal may be what seems wrong.
                assert any(f.key == key or "/journal/" in key for f in report.findings), key
        path.write_bytes(whole)
    assert found(root) == set()


# ---- what belongs to nothing


def test_what_belongs_to_nothing(root: Path) -> None:
    expected = {
        f"{PROBES}/0123": FindingKind.LEFTOVER,
        "notes.txt": FindingKind.OBJECT_UNKNOWN,
        "partitions/0009/manifests/0000000001": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/notes.txt": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/level-1/weight/c.x.0.0.0.0": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/level-9/weight/c.1.0.0.0.0": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/level-1/momentum/c.1.0.0.0.0": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/manifests/newest": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/manifests/31": FindingKind.OBJECT_UNKNOWN,
        "revisions/copy of 1.json": FindingKind.OBJECT_UNKNOWN,
        "trees/old.safetensors": FindingKind.OBJECT_UNKNOWN,
        "snapshots/README": FindingKind.OBJECT_UNKNOWN,
    }
    for key in expected:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(b"")
    assert found(root) == {(kind, key) for key, kind in expected.items()}


def test_scratch_files_of_a_killed_writer(root: Path) -> None:
    folder = root / ".tmp/1234"
    folder.mkdir(parents=True)
    (folder / "lock").write_bytes(b"")
    assert found(root) == set()
    (folder / "abcd").write_bytes(b"half")
    assert found(root) == {(FindingKind.LEFTOVER, ".tmp")}


def test_every_kind_is_in_the_document_with_its_severity() -> None:
    text = (Path(__file__).resolve().parents[3] / "docs/fsck.md").read_text()
    told = {
        name: severity
        for names, severity in re.findall(r"^\| (`.*`) \| (\w+) \|", text, re.MULTILINE)
        for name in re.findall(r"`([a-z-]+)`", names)
    }
    assert told == {kind.value: kind.severity.value for kind in FindingKind}
