"""A bank damaged in one way gives one finding, which names the object; a whole one gives none."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from membank.bank_service.fsck import FindingKind, FsckReport, Severity, check_bank
from membank.bank_service.shard import Shard
from membank.bank_service.store import Bank, LocalObjects
from membank.bank_service.store.objects import storage_error
from membank.wire.crc import crc32c
from membank.wire.errors import FailedPreconditionError, NotFoundError, Reason
from membank.wire.format import (
    Manifest,
    TreeDocument,
    decode_manifest,
    encode_manifest,
    encode_revision,
    encode_snapshot,
    encode_tree,
)
from membank.wire.format.layout import manifest_key, revision_key
from membank.wire.records import Snapshot
from membank.wire.spec import BlockRef, BlockState
from tiny_bank import create_bank, make_update
from whole_bank import GONE, HIDDEN, SNAPSHOT, A, B

Found = set[tuple[FindingKind, str]]


def check(root: Path, *, deep: bool = True) -> FsckReport:
    return check_bank(LocalObjects(root), deep=deep)


def found(root: Path, *, deep: bool = True) -> Found:
    return {(finding.kind, finding.key) for finding in check(root, deep=deep).findings}


def flip(path: Path, position: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 0x10
    path.write_bytes(data)


def newest(root: Path, partition: int) -> Manifest:
    bank = Bank.open(LocalObjects(root))
    return bank.read_manifest(partition, bank.manifest_numbers(partition)[-1])


def named(root: Path, partition: int, revision: int) -> int:
    return Bank.open(LocalObjects(root)).named_manifest(revision, partition)


def rewrite(root: Path, number: int, change: Callable[[Manifest], Manifest]) -> str:
    """Replace manifest `number` of partition 0 by another that is whole in itself."""
    key = manifest_key(0, number)
    manifest = decode_manifest((root / key).read_bytes(), num_roles=3, key=key)
    (root / key).write_bytes(encode_manifest(change(manifest)))
    return key


def slot_of(root: Path, ref: BlockRef, role: str = "weight", partition: int = 0) -> str:
    slot = newest(root, partition).entries[ref].slot
    return f"partitions/{partition:04d}/level-{ref.level}/{role}/c.{slot}.0.0.0.0"


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
    (root / "bank.json").write_text(json.dumps({**document, "format": 2}))
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


@pytest.mark.parametrize("revision", [2, 4])
def test_a_name_that_was_never_committed(root: Path, revision: int) -> None:
    snapshot = Snapshot(name="late", revision=revision, create_time_s=0.0)
    (root / "snapshots/late.json").write_bytes(encode_snapshot(snapshot))
    assert found(root) == {(FindingKind.SNAPSHOT_UNCOMMITTED, "snapshots/late.json")}


# ---- manifests


@pytest.mark.parametrize("revision", [1, 2, 3])
def test_a_missing_manifest_that_a_revision_begins_with(root: Path, revision: int) -> None:
    key = manifest_key(0, named(root, 0, revision))
    (root / key).unlink()
    assert (FindingKind.MANIFEST_MISSING, key) in found(root)
    (finding,) = check(root).of(FindingKind.MANIFEST_MISSING)
    assert f"revision {revision}" in finding.affects or "present" in finding.affects


@pytest.mark.slow
def test_every_manifest_damaged(another: Callable[[str], Path]) -> None:
    for position, path in enumerate(sorted(another("list").glob("partitions/*/manifests/*"))):
        root = another(str(position))
        key = path.relative_to(path.parents[3]).as_posix()
        flip(root / key)
        assert found(root) == {(FindingKind.MANIFEST_DAMAGED, key)}


def test_a_manifest_under_another_number(root: Path) -> None:
    one, other = manifest_key(0, named(root, 0, 1)), manifest_key(0, named(root, 0, 2))
    (root / other).write_bytes((root / one).read_bytes())
    assert found(root) == {(FindingKind.MANIFEST_MISPLACED, other)}


def test_an_epoch_that_goes_back(root: Path) -> None:
    number = named(root, 0, 2)
    rewrite(root, number, lambda manifest: dataclasses.replace(manifest, epoch=9))
    after = manifest_key(0, number + 1)
    assert found(root) == {(FindingKind.MANIFEST_DISORDER, after)}


@pytest.mark.parametrize(
    ("ref", "word"),
    [
        (BlockRef(1, 7), "does not have"),
        (BlockRef(3, 0), "does not have"),
        (B, "belongs to partition 1"),
    ],
)
def test_a_manifest_that_names_a_block_of_others(root: Path, ref: BlockRef, word: str) -> None:
    def change(manifest: Manifest) -> Manifest:
        entry = dataclasses.replace(manifest.entries[HIDDEN], slot=0xFFFFFFFF, crcs=())
        return dataclasses.replace(manifest, entries={**manifest.entries, ref: entry})

    key = rewrite(root, named(root, 0, 2), change)
    assert found(root) == {(FindingKind.MANIFEST_INCONSISTENT, key)}
    assert word in check(root).findings[0].problem


def test_a_deleted_block_that_has_a_slot(root: Path) -> None:
    number = newest(root, 0).number

    def change(manifest: Manifest) -> Manifest:
        entry = dataclasses.replace(manifest.entries[HIDDEN], state=BlockState.DELETED)
        return dataclasses.replace(manifest, entries={**manifest.entries, HIDDEN: entry})

    key = rewrite(root, number, change)
    assert (FindingKind.MANIFEST_INCONSISTENT, key) in found(root)


def test_two_blocks_in_one_slot(root: Path) -> None:
    number = newest(root, 0).number

    def change(manifest: Manifest) -> Manifest:
        entry = manifest.entries[HIDDEN]
        return dataclasses.replace(
            manifest, entries={**manifest.entries, HIDDEN: entry, BlockRef(2, 1): entry}
        )

    key = rewrite(root, number, change)
    assert found(root) == {(FindingKind.MANIFEST_INCONSISTENT, key)}


def test_two_manifests_that_disagree_on_a_slot(root: Path) -> None:
    number = named(root, 0, 1)

    def change(manifest: Manifest) -> Manifest:
        entry = manifest.entries[HIDDEN]
        entry = dataclasses.replace(entry, crcs=tuple(crc ^ 1 for crc in entry.crcs))
        return dataclasses.replace(manifest, entries={**manifest.entries, HIDDEN: entry})

    rewrite(root, number, change)
    kinds = {finding.kind for finding in check(root).findings}
    assert FindingKind.SLOT_CONFLICT in kinds


def test_a_prepared_manifest_that_nobody_decided(root: Path) -> None:
    manifest = newest(root, 0)
    waiting = dataclasses.replace(
        manifest, number=manifest.number + 1, revision=4, prepared=True, nonce="waiting"
    )
    key = manifest_key(0, waiting.number)
    (root / key).write_bytes(encode_manifest(waiting))
    assert found(root) == {(FindingKind.MANIFEST_UNDECIDED, key)}


def test_a_prepared_manifest_that_was_given_up(root: Path) -> None:
    manifest = newest(root, 0)
    given_up = dataclasses.replace(
        manifest, number=manifest.number + 1, revision=3, prepared=True, nonce="given up"
    )
    key = manifest_key(0, given_up.number)
    (root / key).write_bytes(encode_manifest(given_up))
    assert found(root) == {(FindingKind.MANIFEST_GIVEN_UP, key)}


# ---- slots


@pytest.mark.parametrize("role", ["weight", "exp_avg", "exp_avg_sq"])
def test_a_missing_slot(root: Path, role: str) -> None:
    key = slot_of(root, A, role)
    (root / key).unlink()
    assert found(root) == {(FindingKind.SLOT_MISSING, key)}
    (finding,) = check(root).findings
    assert "block 1/0: the present state" in finding.affects
    assert f"roll block 1/0 back to snapshot {SNAPSHOT}" in finding.remedy


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_start(path: Path) -> None:
    flip(path, 0)


def _flip_trailer(path: Path) -> None:
    flip(path, -1)


@pytest.mark.parametrize("damage", [_cut, _grow, _empty, _flip_start, _flip_trailer])
def test_a_damaged_slot(root: Path, damage: Callable[[Path], None]) -> None:
    key = slot_of(root, A)
    damage(root / key)
    assert found(root) == {(FindingKind.SLOT_DAMAGED, key)}


def test_a_slot_with_the_content_of_another(root: Path) -> None:
    one, other = slot_of(root, A), slot_of(root, BlockRef(1, 2))
    (root / one).write_bytes((root / other).read_bytes())
    assert found(root) == {(FindingKind.SLOT_DAMAGED, one)}


def test_a_slot_of_an_older_revision(root: Path) -> None:
    bank = Bank.open(LocalObjects(root))
    pinned = bank.read_manifest(0, named(root, 0, 1)).entries[A].slot
    key = f"partitions/0000/level-1/weight/c.{pinned}.0.0.0.0"
    flip(root / key)
    assert found(root) == {(FindingKind.SLOT_DAMAGED, key)}
    (finding,) = check(root).findings
    assert f"snapshot {SNAPSHOT}" in finding.affects
    assert "present" not in finding.affects


def test_slots_that_no_manifest_names(root: Path) -> None:
    folder = root / "partitions/0000/level-2/weight"
    (folder / "c.77.0.0.0.0").write_bytes(b"left by a writer")
    (folder / "c.78.0.0.0.0").write_bytes(b"")
    assert found(root) == {(FindingKind.SLOT_UNNAMED, "partitions/0000/level-2")}
    assert "slots 77, 78" in check(root).findings[0].problem


def test_slots_are_not_called_unnamed_while_a_manifest_is_missing(root: Path) -> None:
    key = manifest_key(0, named(root, 0, 3))
    (root / key).unlink()
    assert FindingKind.SLOT_UNNAMED not in {kind for kind, _ in found(root)}


# ---- arrays


def test_missing_metadata_of_an_array(root: Path) -> None:
    key = "partitions/0000/level-1/exp_avg/zarr.json"
    (root / key).unlink()
    assert found(root) == {(FindingKind.ARRAY_METADATA_MISSING, key)}
    assert check(root).findings[0].severity is Severity.REPAIRABLE


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"shape": [1e999]}', b"\xff", b"null"])
def test_damaged_metadata_of_an_array(root: Path, content: bytes) -> None:
    key = "partitions/0000/level-1/weight/zarr.json"
    (root / key).write_bytes(content)
    assert found(root) == {(FindingKind.ARRAY_METADATA_DAMAGED, key)}


def test_metadata_of_another_array(root: Path) -> None:
    key = "partitions/0000/level-1/weight/zarr.json"
    (root / key).write_bytes((root / "partitions/0000/level-2/weight/zarr.json").read_bytes())
    assert found(root) == {(FindingKind.ARRAY_METADATA_DAMAGED, key)}


def test_an_array_that_is_too_small(root: Path) -> None:
    key = "partitions/0000/level-1/weight/zarr.json"
    document = json.loads((root / key).read_bytes())
    document["shape"][0] = 1
    (root / key).write_text(json.dumps(document))
    assert found(root) == {(FindingKind.ARRAY_TOO_SMALL, key)}


# ---- what other writers may have written, whole in itself


def _with_head(data: bytes, change: Callable[[dict[str, object]], None]) -> bytes:
    length = int.from_bytes(data[8:12], "little")
    head = json.loads(data[12 : 12 + length])
    change(head)
    text = json.dumps(head).encode()
    body = data[:8] + len(text).to_bytes(4, "little") + text + data[12 + length : -4]
    return body + crc32c(body).to_bytes(4, "little")


@pytest.mark.parametrize("value", ["x", None, [], {}, 1.5])
@pytest.mark.parametrize("name", ["number", "revision", "epoch", "history_from", "requests"])
def test_nonsense_in_the_head_of_a_manifest(root: Path, name: str, value: object) -> None:
    key = manifest_key(0, newest(root, 0).number)

    def change(head: dict[str, object]) -> None:
        head[name] = value

    (root / key).write_bytes(_with_head((root / key).read_bytes(), change))
    if (name, value) != ("requests", []) and (name, value) != ("requests", {}):
        assert found(root) == {(FindingKind.MANIFEST_DAMAGED, key)}


@pytest.mark.parametrize("value", ["x", None, [], {"0": "y"}, 1.5])
@pytest.mark.parametrize("name", ["revision", "manifests", "tree_revision", "detail"])
def test_nonsense_in_a_record(root: Path, name: str, value: object) -> None:
    key = revision_key(3)
    record = json.loads((root / key).read_bytes())["record"]
    text = json.dumps({**record, name: value}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    (root / key).write_text(json.dumps({"record": {**record, name: value}, "sha256": digest}))
    if (name, value) != ("detail", {"0": "y"}):
        assert (FindingKind.RECORD_DAMAGED, key) in found(root)


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


# ---- retirement that was cut short


def test_slots_of_a_manifest_that_nothing_needs(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    shard = Shard.open(bank)
    shard.push(make_update(shard, [A], "u0"))
    shard.close()
    # The next owner goes on from the same state, so the manifest before is needed no more.
    older = bank.read_manifest(0, bank.manifest_numbers(0)[-1])
    stale = dataclasses.replace(
        older,
        number=older.number + 1,
        nonce="stale",
        entries={
            **older.entries,
            BlockRef(1, 2): dataclasses.replace(older.entries[A], slot=40, version=1),
        },
    )
    newest_one = dataclasses.replace(older, number=older.number + 2, nonce="newest")
    for manifest in (stale, newest_one):
        (tmp_path / manifest_key(0, manifest.number)).write_bytes(encode_manifest(manifest))
    assert found(tmp_path) == {(FindingKind.RETIREMENT_UNFINISHED, manifest_key(0, stale.number))}


# ---- removal


def test_a_removal_that_was_cut_short(root: Path) -> None:
    bank = Bank.open(LocalObjects(root))
    number = named(root, 0, 1)
    older = bank.read_manifest(0, number)
    kept = older.entries[HIDDEN]
    rewrite(
        root,
        number,
        lambda manifest: dataclasses.replace(
            manifest, entries={**manifest.entries, GONE: dataclasses.replace(kept, slot=99)}
        ),
    )
    # Whether its slots are still there does not matter any more.
    assert found(root) == {(FindingKind.REMOVAL_UNFINISHED, manifest_key(0, number))}
    assert str(GONE) in check(root).findings[0].problem


# ---- what belongs to nothing


def test_what_belongs_to_nothing(root: Path) -> None:
    expected = {
        ".probe-0123": FindingKind.LEFTOVER,
        "notes.txt": FindingKind.OBJECT_UNKNOWN,
        "partitions/0009/manifests/0000000001": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/notes.txt": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/level-1/weight/c.x.0.0.0.0": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/level-9/weight/c.1.0.0.0.0": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/level-1/momentum/c.1.0.0.0.0": FindingKind.OBJECT_UNKNOWN,
        "partitions/0000/manifests/newest": FindingKind.OBJECT_MISNAMED,
        "partitions/0000/manifests/31": FindingKind.OBJECT_MISNAMED,
        "revisions/copy of 1.json": FindingKind.OBJECT_MISNAMED,
        "trees/old.safetensors": FindingKind.OBJECT_MISNAMED,
        "snapshots/README": FindingKind.OBJECT_MISNAMED,
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
