"""Journals that are damaged, cut, mixed up, kept elsewhere or computed with other kernels."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from membank.bank_service.fsck import FindingKind, check_bank
from membank.bank_service.shard import Shard, optimizer
from membank.bank_service.store import Bank, FsspecObjects, LocalObjects
from membank.wire.errors import CorruptionError
from membank.wire.format import decode_spec, encode_manifest, encode_spec
from membank.wire.format.layout import manifest_key
from membank.wire.spec import BlockState
from tiny_bank import State, UnsyncedObjects, create_bank, full_state, make_update
from whole_bank import A, B, make_whole_bank, whole_config

FOLDER = "partitions/0000/journal"
HEADER_BYTES = 28

Found = set[tuple[FindingKind, str]]


def found(root: Path, journal_dir: Path | None = None, *, deep: bool = True) -> Found:
    report = check_bank(LocalObjects(root), journal_dir=journal_dir, deep=deep)
    return {(finding.kind, finding.key) for finding in report.findings}


def segments(root: Path) -> list[str]:
    paths = sorted((root / FOLDER).glob("*.log"))
    return [path.relative_to(root).as_posix() for path in paths]


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


def test_every_update_is_checked_and_computed_again(template: Path) -> None:
    assert len(segments(template)) == 3
    report = check_bank(LocalObjects(template))
    # Three updates of two blocks, one in each partition.
    assert (report.checked.num_frames, report.checked.num_replayed) == (6, 6)
    quick = check_bank(LocalObjects(template), deep=False)
    assert (quick.checked.num_frames, quick.checked.num_replayed) == (6, 0)


def test_a_journal_without_its_first_segment(root: Path) -> None:
    first, second, _ = segments(root)
    (root / first).unlink()
    assert found(root) == {(FindingKind.JOURNAL_GAP, second)}


def test_a_journal_without_a_segment_in_between(root: Path) -> None:
    first, second, _ = segments(root)
    (root / second).unlink()
    assert found(root) == {(FindingKind.JOURNAL_GAP, first)}


def test_a_journal_without_its_last_segment(root: Path) -> None:
    _, second, third = segments(root)
    (root / third).unlink()
    assert found(root) == {(FindingKind.JOURNAL_GAP, second)}


def test_no_journal_at_all(root: Path) -> None:
    shutil.rmtree(root / FOLDER)
    assert found(root) == {(FindingKind.JOURNAL_MISSING, FOLDER)}


def test_an_earlier_segment_that_was_emptied(root: Path) -> None:
    _, second, _ = segments(root)
    (root / second).write_bytes(b"")
    assert found(root) == {(FindingKind.JOURNAL_GAP, second)}


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_flipped_byte_in_any_frame(root: Path, index: int) -> None:
    key = segments(root)[index]
    size = (root / key).stat().st_size
    head = HEADER_BYTES + int.from_bytes((root / key).read_bytes()[8:12], "little")
    for position in (0, 5, 9, HEADER_BYTES, head, head + 20, head + HEADER_BYTES, size - 1):
        flip(root / key, position)
        report = check_bank(LocalObjects(root))
        assert [(f.kind, f.key) for f in report.findings] == [(FindingKind.JOURNAL_DAMAGED, key)]
        (finding,) = report.findings
        assert finding.offset is not None
        # The offset is that of the frame, at or before the byte.
        assert finding.offset <= position
        assert finding.offset in (0, head) or finding.offset > head
        flip(root / key, position)
    assert found(root) == set()


def test_a_write_that_was_never_finished(root: Path) -> None:
    key = segments(root)[-1]
    whole = (root / key).read_bytes()
    for left in (whole[:-1], whole + whole[:40], whole + bytes(64)):
        (root / key).write_bytes(left)
        report = check_bank(LocalObjects(root))
        assert [(f.kind, f.key) for f in report.findings] == [(FindingKind.JOURNAL_TORN, key)]
        assert report.is_clean


def test_a_journal_of_another_bank(root: Path, tmp_path: Path) -> None:
    make_whole_bank(tmp_path / "other")
    shutil.rmtree(root / FOLDER)
    shutil.copytree(tmp_path / "other" / FOLDER, root / FOLDER)
    kinds = {kind for kind, _ in found(root)}
    assert kinds == {FindingKind.JOURNAL_FOREIGN}


def test_a_segment_under_another_name(root: Path) -> None:
    *_, third = segments(root)
    other = f"{FOLDER}/00000000000000000009-0000000002.log"
    (root / third).rename(root / other)
    assert found(root) == {(FindingKind.JOURNAL_GAP, other)}


def test_files_with_names_of_their_own(root: Path) -> None:
    (root / FOLDER / "old.log").write_bytes(b"")
    (root / FOLDER / "notes.txt").write_bytes(b"")
    assert found(root) == {
        (FindingKind.OBJECT_MISNAMED, f"{FOLDER}/old.log"),
        (FindingKind.OBJECT_UNKNOWN, f"{FOLDER}/notes.txt"),
    }


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    """A bank whose journal begins with the fourth update of a block."""
    bank = create_bank(tmp_path)
    shard = Shard.open(bank, config=whole_config())
    for number in range(3):
        shard.push(make_update(shard, [A], f"r{number}"))
    shard.consolidate()
    shard.push(make_update(shard, [A], "last"))
    shard.close(consolidate=False)
    assert found(tmp_path) == set()
    return tmp_path


def test_the_manifest_that_trimmed_the_journal_is_missing(folded: Path) -> None:
    newest = Bank.open(LocalObjects(folded)).manifest_numbers(0)[-1]
    (folded / manifest_key(0, newest)).unlink()
    assert (FindingKind.JOURNAL_GAP, segments(folded)[0]) in found(folded)


def test_every_manifest_is_missing(root: Path) -> None:
    shutil.rmtree(root / "partitions/0000/manifests")
    named = {key for kind, key in found(root) if kind is FindingKind.MANIFEST_MISSING}
    assert "partitions/0000/manifests" in named
    with pytest.raises(CorruptionError):
        Shard.open(Bank.open(LocalObjects(root)))


# ---- the ways out that docs/fsck.md tells


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Path, list[State]]:
    """A bank, and its states after each journalled update."""
    return tmp_path / "bank", make_whole_bank(tmp_path / "bank").states


def _state(root: Path, journal_dir: Path | None = None) -> State:
    bank = Bank.open(UnsyncedObjects(root))
    shard = Shard.open(bank, config=whole_config(journal_dir))
    try:
        return full_state(shard)
    finally:
        shard.close()


@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.parametrize("is_head", [True, False])
def test_updates_after_a_damaged_frame_are_given_up(
    whole: tuple[Path, list[State]], index: int, is_head: bool
) -> None:
    root, states = whole
    keys = segments(root)
    damaged = root / keys[index]
    size = damaged.stat().st_size
    flip(damaged, 0 if is_head else size - HEADER_BYTES - 1)
    (finding,) = check_bank(LocalObjects(root)).findings
    assert (finding.kind, finding.key) == (FindingKind.JOURNAL_DAMAGED, keys[index])
    for later in keys[index + 1 :]:
        (root / later).unlink()
    if finding.offset == 0:
        damaged.unlink()
        before = root / keys[index - 1]
        os.truncate(before, before.stat().st_size - HEADER_BYTES)
    else:
        assert finding.offset is not None
        os.truncate(damaged, finding.offset)
    assert found(root) == set()
    # Segments hold one update each; the other partition has all of its own.
    assert _state(root)[A] == states[index][A]
    assert _state(root)[B] == states[-1][B]


def test_a_partition_goes_on_from_its_newest_manifest(
    whole: tuple[Path, list[State]], tmp_path: Path
) -> None:
    root, states = whole
    flip(root / segments(root)[0], 0)
    bank_id = Bank.open(LocalObjects(root)).spec.bank_id
    good = root / "partitions/0001/journal"
    shutil.copytree(good, tmp_path / "journals" / bank_id / "0001")
    state = _state(root, tmp_path / "journals")
    assert state[A] == states[0][A]
    assert state[B] == states[-1][B]
    shutil.rmtree(root / "partitions/0000/journal")
    assert found(root, tmp_path / "journals") == set()


# ---- journals outside of the bank


@pytest.fixture
def apart(tmp_path: Path) -> tuple[Path, Path]:
    """A bank, and the directory of its journals."""
    make_whole_bank(tmp_path / "bank", config=whole_config(tmp_path / "journals"))
    return tmp_path / "bank", tmp_path / "journals"


def test_journals_elsewhere(apart: tuple[Path, Path]) -> None:
    root, journals = apart
    assert found(root, journals) == set()
    assert found(root) == {
        (FindingKind.JOURNAL_MISSING, f"partitions/{number:04d}/journal") for number in (0, 1)
    }


def test_a_wrong_directory_of_journals_is_noted(apart: tuple[Path, Path], tmp_path: Path) -> None:
    root, _ = apart
    report = check_bank(LocalObjects(root), journal_dir=tmp_path / "wrong")
    assert {f.kind for f in report.findings} == {FindingKind.JOURNAL_NOT_CHECKED}
    assert str(tmp_path / "wrong") in report.findings[0].key
    assert report.is_clean


def test_damage_elsewhere_is_named_by_its_path(apart: tuple[Path, Path]) -> None:
    root, journals = apart
    path = next(iter(sorted(journals.rglob("*.log"))))
    flip(path, 0)
    assert found(root, journals) == {(FindingKind.JOURNAL_DAMAGED, str(path))}


def test_a_journal_that_another_owner_went_on_without(
    apart: tuple[Path, Path], tmp_path: Path
) -> None:
    root, journals = apart
    other = tmp_path / "other journals"
    Shard.open(Bank.open(LocalObjects(root)), config=whole_config(other)).close()
    assert found(root, other) == set()
    kinds = {kind for kind, _ in found(root, journals)}
    assert kinds == {FindingKind.JOURNAL_OUTDATED}


def test_a_bank_behind_a_url_says_nothing_of_its_journals(tmp_path: Path) -> None:
    objects = FsspecObjects(f"memory://{tmp_path.name}")
    make_whole_bank(objects, config=whole_config(tmp_path))
    report = check_bank(objects)
    (finding,) = report.findings
    assert finding.kind is FindingKind.JOURNAL_NOT_CHECKED
    assert report.is_clean
    assert check_bank(objects, journal_dir=tmp_path).findings == ()


# ---- journals in the bank's own storage


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A bank whose journals are objects of it."""
    make_whole_bank(tmp_path / "bank", config=whole_config(durability="store"))
    return tmp_path / "bank"


def log_objects(root: Path) -> list[str]:
    paths = sorted(root.glob("partitions/0000/log/*"))
    return [path.relative_to(root).as_posix() for path in paths]


def test_a_journal_in_the_store(stored: Path) -> None:
    report = check_bank(LocalObjects(stored))
    assert report.findings == ()
    # What was computed is in it, so it is compared wherever the check runs.
    assert (report.checked.num_frames, report.checked.num_replayed) == (6, 6)


@pytest.mark.slow
def test_every_byte_of_a_journal_in_the_store(stored: Path) -> None:
    for key in log_objects(stored):
        size = (stored / key).stat().st_size
        for position in (0, HEADER_BYTES, size // 2, size - 1):
            flip(stored / key, position)
            assert found(stored) == {(FindingKind.JOURNAL_DAMAGED, key)}
            flip(stored / key, position)
        whole = (stored / key).read_bytes()
        for left in (b"", whole[:-1], whole[: HEADER_BYTES - 1]):
            (stored / key).write_bytes(left)
            # An object is there whole or not at all: it cannot be torn.
            assert found(stored) == {(FindingKind.JOURNAL_DAMAGED, key)}
        (stored / key).write_bytes(whole)


def test_a_batch_that_is_missing_in_the_store(stored: Path) -> None:
    *_, before, gone, _ = log_objects(stored)
    (stored / gone).unlink()
    ((kind, key),) = found(stored)
    assert kind is FindingKind.JOURNAL_GAP
    assert key in (before, gone)


def test_no_journal_in_the_store(stored: Path) -> None:
    shutil.rmtree(stored / "partitions/0000/log")
    assert found(stored) == {(FindingKind.JOURNAL_MISSING, "partitions/0000/log")}


def test_an_object_of_the_log_under_another_name(stored: Path) -> None:
    newest = log_objects(stored)[-1]
    (stored / newest).rename(stored / "partitions/0000/log/0000000099")
    (stored / "partitions/0000/log/old").write_bytes(b"")
    kinds = {kind for kind, _ in found(stored)}
    assert kinds >= {FindingKind.OBJECT_MISNAMED}
    assert kinds & {FindingKind.JOURNAL_GAP, FindingKind.JOURNAL_DAMAGED}


# ---- computing updates again


def _with_other_rate(root: Path) -> None:
    spec = decode_spec((root / "bank.json").read_bytes(), where="")
    first, *rest = spec.levels
    levels = (dataclasses.replace(first, learning_rate=0.3), *rest)
    (root / "bank.json").write_bytes(encode_spec(dataclasses.replace(spec, levels=levels)))


def test_an_update_that_gives_something_else(root: Path) -> None:
    _with_other_rate(root)
    one, other = (f"partitions/{number:04d}/journal/" for number in (0, 1))
    report = check_bank(LocalObjects(root))
    assert {f.kind for f in report.findings} == {FindingKind.REPLAY_MISMATCH}
    assert sorted(f.key[: len(one)] for f in report.findings) == [one, other]
    assert str(A) in report.findings[0].affects
    assert found(root, deep=False) == set()


def test_other_kernels_are_no_damage(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_other_rate(root)
    monkeypatch.setattr(optimizer, "kernel_fingerprint", lambda: "torch 0.1")
    report = check_bank(LocalObjects(root))
    assert {f.kind for f in report.findings} == {FindingKind.REPLAY_NOT_CHECKED}
    assert report.is_clean


def test_a_damaged_slot_is_not_reported_as_a_wrong_update(root: Path) -> None:
    bank = Bank.open(LocalObjects(root))
    slot = bank.read_manifest(0, bank.manifest_numbers(0)[-1]).entries[A].slot
    key = f"partitions/0000/level-1/exp_avg/c.{slot}.0.0.0.0"
    flip(root / key, 0)
    assert found(root) == {(FindingKind.SLOT_DAMAGED, key)}


def test_frames_that_hold_updates_of_deleted_blocks(root: Path) -> None:
    bank = Bank.open(LocalObjects(root))
    manifest = bank.read_manifest(0, bank.manifest_numbers(0)[-1])
    gone = dataclasses.replace(
        manifest.entries[A], state=BlockState.DELETED, slot=0xFFFFFFFF, crcs=()
    )
    after = dataclasses.replace(manifest, entries={**manifest.entries, A: gone})
    (root / manifest_key(0, manifest.number)).write_bytes(encode_manifest(after))
    named = {key for kind, key in found(root) if kind is FindingKind.REMOVAL_UNFINISHED}
    assert {key for key in named if key.startswith(FOLDER)} == set(segments(root))
