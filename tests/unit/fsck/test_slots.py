"""Slots, arrays and removals: each fault is found, and nothing is said of what may be gone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from damaging import check, flip, found, named, rewrite, slot_of
from membank.bank_service.fsck import FindingKind, Severity
from membank.bank_service.shard import Shard
from membank.bank_service.store import Bank, LocalObjects
from membank.wire.format import (
    encode_manifest,
)
from membank.wire.format.layout import manifest_key
from membank.wire.spec import BlockRef
from tiny_bank import create_bank, make_update
from whole_bank import GONE, HIDDEN, SNAPSHOT, A

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
