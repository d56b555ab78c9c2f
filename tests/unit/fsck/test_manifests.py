"""Manifests and records that are missing, damaged, or whole and yet wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from damaging import check, flip, found, named, newest, rewrite
from membank.bank_service.fsck import FindingKind
from membank.wire.crc import crc32c
from membank.wire.format import (
    Manifest,
    encode_manifest,
)
from membank.wire.format.layout import manifest_key, revision_key
from membank.wire.spec import BlockRef, BlockState
from whole_bank import HIDDEN, B

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
