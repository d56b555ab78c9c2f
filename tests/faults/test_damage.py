"""Every file of a small bank deleted, cut, flipped: the right answer or a clear error, never less."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from command_line import membank
from membank.bank_service.fsck import Finding, FindingKind, Severity, check_bank
from membank.bank_service.shard import Shard
from membank.bank_service.shard.contract import RestoreEntry, SetContent
from membank.bank_service.store import Bank, FsspecObjects, open_objects
from membank.bank_service.store.journal import scan
from membank.wire.errors import CorruptionError, MembankError, NotFoundError, Reason
from membank.wire.format.layout import manifest_key
from s3_server import S3Place
from tiny_bank import (
    State,
    UnsyncedObjects,
    create_bank,
    file_bytes,
    full_state,
    make_update,
    transact,
)
from whole_bank import A, B, make_whole_bank, whole_config

Damage = Callable[[Path], None]


def _read(root: Path) -> State:
    """Return everything that can be asked of a bank."""
    bank = Bank.open(UnsyncedObjects(root))
    shard = Shard.open(bank, config=whole_config())
    try:
        state = full_state(shard)
        fetched = {block.ref: block for block in shard.fetch(list(bank.spec.blocks())).blocks}
        for ref, block in fetched.items():
            assert block.version == state[ref][0]
        bank.snapshots()
        tree = bank.read_tree(bank.latest_commit().tree_revision)
        assert tree is not None
        assert tree.labels == {A: "metals"}
        return state
    finally:
        shard.close(consolidate=False)


def _flip(path: Path) -> None:
    _flip_at(path, 2)


def _flip_at(path: Path, quarter: int) -> None:
    data = bytearray(path.read_bytes())
    data[(len(data) - 1) * quarter // 4] ^= 0x10
    path.write_bytes(data)


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _findings(root: Path) -> list[Finding]:
    return list(check_bank(UnsyncedObjects(root)).findings)


def _is_harmless(root: Path, name: str, damage: Damage) -> bool:
    """Say whether no finding is right, because nothing that a bank promises is lost.

    Everything that is not named here must be reported.
    """
    # Locks and scratch files are no part of a bank.
    if name.startswith(".tmp/") or name.endswith("/journal/lock"):
        return True
    # Without its name, a snapshot is one that was given up.
    if name.startswith("snapshots/") and damage is Path.unlink:
        return True
    # A manifest that is neither in force nor named by a record goes when the next one comes.
    if "/manifests/" in name and damage is Path.unlink:
        named = _named_manifests(Bank.open(UnsyncedObjects(root)))
        return name not in named | _newest_of("manifests/*", root)
    # What was cut off the end of a journal looks like a write that was never finished.
    return name in _newest_of("journal/*.log", root) and damage is _cut


def _named_manifests(bank: Bank) -> set[str]:
    records = [bank.record(number) for number in range(bank.latest_number() + 1)]
    return {
        manifest_key(partition, number)
        for record in records
        if record is not None
        for partition, number in record.manifests.items()
    }


def _newest_of(pattern: str, root: Path) -> set[str]:
    partitions = sorted(root.glob("partitions/*"))
    newest = (max(partition.glob(pattern)) for partition in partitions)
    return {path.relative_to(root).as_posix() for path in newest}


def _says_the_same(one: bytes, other: bytes) -> bool:
    """Say whether two JSON documents differ in white space alone."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def _names(finding: Finding, name: str) -> bool:
    # Of what is gone, its neighbours tell, where nothing names it.
    folder = name.rpartition("/")[0]
    is_numbered = folder.endswith(("/journal", "/log", "/manifests"))
    return finding.key == name or (is_numbered and finding.key.startswith(folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    """A bank with something of everything, and its states after each journalled update."""
    root = tmp_path_factory.mktemp("whole") / "bank"
    states = make_whole_bank(root).states
    # Opening it would publish manifests; the damage is done to what a killed process left.
    assert len(_files(root)) > 45
    assert _findings(root) == []
    return root, states


def _files(root: Path) -> list[str]:
    return sorted(name for name, data in file_bytes(root).items() if data)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("damage", [Path.unlink, _cut, _flip, _empty])
def test_each_file_in_turn(whole: tuple[Path, list[State]], tmp_path: Path, damage: Damage) -> None:
    template, states = whole
    silent = []
    for position, name in enumerate(_files(template)):
        root = tmp_path / str(position)
        shutil.copytree(template, root)
        is_harmless = _is_harmless(root, name, damage)
        damage(root / name)
        if damage is _flip:
            is_harmless |= _says_the_same(*((at / name).read_bytes() for at in (root, template)))
        findings = _findings(root)
        worse = [f for f in findings if f.severity is not Severity.NOTE]
        if is_harmless:
            assert worse == [], name
            silent.append(name)
        else:
            assert any(_names(finding, name) for finding in worse), (name, findings)
        _read_or_refuse(root, name, states, is_clean=not worse)
        shutil.rmtree(root)
    # Else the sweep would show nothing.
    assert len(silent) < 15, silent


def _read_or_refuse(root: Path, name: str, states: list[State], *, is_clean: bool) -> None:
    problem: MembankError | None = None
    found: State = {}
    try:
        found = _read(root)
    except MembankError as err:
        problem = err
    if problem is None:
        # The tail of a journal that was cut looks like a write that was never finished.
        is_tail = name.endswith(".log")
        assert found == states[-1] or (is_tail and _is_prefix(found, states)), name
        return
    assert not is_clean, (name, problem)
    if isinstance(problem, NotFoundError):
        assert (name, problem.reason) == ("bank.json", Reason.NOT_A_BANK)
    else:
        assert isinstance(problem, CorruptionError), name
        assert Path(name).name in problem.message or "journal" in problem.message


def _is_prefix(found: State, states: list[State]) -> bool:
    # Each partition has a journal of its own, so each may end at another update.
    return all(any(found[ref] == state[ref] for state in states) for ref in found)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_flipped_bit_anywhere_is_found(whole: tuple[Path, list[State]], tmp_path: Path) -> None:
    template, _ = whole
    root = tmp_path / "bank"
    shutil.copytree(template, root)
    for name in _files(root):
        before = (root / name).read_bytes()
        for quarter in range(5):
            _flip_at(root / name, quarter)
            worse = [f for f in _findings(root) if f.severity is not Severity.NOTE]
            if _is_harmless(root, name, _flip) or _says_the_same(
                before, (root / name).read_bytes()
            ):
                assert worse == [], name
            else:
                assert any(_names(finding, name) for finding in worse), (name, quarter)
            (root / name).write_bytes(before)
    assert _findings(root) == []


def _cut_bytes(data: bytes) -> bytes | None:
    return data[: len(data) // 2]


def _flip_bytes(data: bytes) -> bytes | None:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :]


def _no_bytes(data: bytes) -> bytes | None:
    return b""


def _gone(data: bytes) -> bytes | None:
    return None


def _is_harmless_loss(key: str, data: bytes, named: set[str], newest: set[str]) -> bool:
    """Say whether nothing that a bank promises is lost with an object."""
    if key.startswith("snapshots/"):
        return True
    if "/manifests/" in key:
        return key not in named | newest
    if "/log/" in key:
        # The last batch looks like one that was never written; a fence holds nothing, and is only
        # in the way of an owner that was replaced.
        head = scan(key, data).head
        return key in newest or (head is not None and head.is_fence)
    return False


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("damage", [_gone, _cut_bytes, _flip_bytes, _no_bytes])
def test_each_object_of_a_bank_behind_a_url(
    tmp_path: Path, damage: Callable[[bytes], bytes | None]
) -> None:
    objects = FsspecObjects(f"memory://{tmp_path.name}-{damage.__name__}")
    make_whole_bank(objects, config=whole_config(tmp_path, durability="store"))
    named = _named_manifests(Bank.open(objects))
    keys = objects.list("")
    newest = {max(k for k in keys if k.startswith(key.rpartition("/")[0])) for key in keys}
    assert check_bank(objects).findings == ()
    for key in keys:
        before = objects.get(key)
        after = damage(before)
        if after is None:
            objects.delete(key)
        else:
            objects.put(key, after)
        worse = [f for f in check_bank(objects).findings if f.severity is not Severity.NOTE]
        is_harmless = after is None and _is_harmless_loss(key, before, named, newest)
        if is_harmless or (after is not None and _says_the_same(before, after)):
            assert worse == [], key
        else:
            assert any(_names(finding, key) for finding in worse), (key, worse)
        objects.put(key, before)
    assert check_bank(objects).findings == ()


@pytest.mark.slow
@pytest.mark.s3
@pytest.mark.timeout(300)
@pytest.mark.parametrize("client", ["", "fsspec+"], ids=["obstore", "s3fs"])
def test_a_bank_in_s3(s3_place: S3Place, tmp_path: Path, client: str) -> None:
    url = f"{client}{s3_place.url}/bank"
    objects = open_objects(url)
    make_whole_bank(objects, config=whole_config(tmp_path, durability="store"))
    report = check_bank(objects)
    assert report.findings == ()
    assert report.checked.num_replayed == 6
    keys = [key for key in objects.list("") if "/weight/c." in key]
    flipped, gone, *_ = keys
    objects.put(flipped, _flip_bytes(objects.get(flipped)) or b"")
    objects.delete(gone)
    found = {(finding.kind, finding.key) for finding in check_bank(objects).findings}
    assert found == {(FindingKind.SLOT_DAMAGED, flipped), (FindingKind.SLOT_MISSING, gone)}
    ended = membank("fsck", url, "--json")
    assert ended.code == 1
    assert {finding["key"] for finding in json.loads(ended.out)["findings"]} == {flipped, gone}


def test_a_damaged_slot_is_named_and_others_are_served(tmp_path: Path) -> None:
    bank = make_whole_bank(tmp_path).bank
    Shard.open(bank).close()
    manifest = bank.read_manifest(0, bank.manifest_numbers(0)[-1])
    slot = manifest.entries[A].slot
    path = tmp_path / f"partitions/0000/level-1/weight/c.{slot}.0.0.0.0"
    _flip(path)
    shard = Shard.open(bank)
    with pytest.raises(CorruptionError) as caught:
        shard.fetch([A])
    assert caught.value.reason is Reason.SLOT_CORRUPT
    assert str(slot) in caught.value.metadata["key"]
    assert shard.fetch([B]).blocks[0].weight is not None
    with pytest.raises(CorruptionError):
        shard.push(make_update(shard, [A], "r"))
    # The way out: roll the block back, or write it anew.
    transact(shard, bank, [SetContent(ref=A, weight=np.zeros(bank.spec.block_shape(1), "f4"))])
    assert shard.fetch([A]).blocks[0].weight is not None
    shard.close()


def test_a_rollback_to_a_damaged_slot_is_refused(tmp_path: Path) -> None:
    bank = make_whole_bank(tmp_path).bank
    shard = Shard.open(bank)
    pinned = bank.named_manifest(1, 0)
    slot = bank.read_manifest(0, pinned).entries[A].slot
    (tmp_path / f"partitions/0000/level-1/weight/c.{slot}.0.0.0.0").unlink()
    before = full_state(shard)
    with pytest.raises(CorruptionError):
        shard.prepare(4, [RestoreEntry(ref=A, manifest=pinned)])
    assert full_state(shard) == before
    shard.push(make_update(shard, [A], "r"))
    shard.close()


def test_a_replay_that_differs_is_refused(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    shard = Shard.open(bank)
    shard.push(make_update(shard, [A], "r"))
    shard.close(consolidate=False)
    # As if other kernels replayed it: the same journal against a bank of another learning rate.
    first, *rest = bank.spec.levels
    levels = (replace(first, learning_rate=0.2), *rest)
    other = Bank(bank.objects, replace(bank.spec, levels=levels))
    with pytest.raises(CorruptionError) as caught:
        Shard.open(other)
    assert caught.value.reason is Reason.REPLAY_MISMATCH
    assert Shard.open(bank).describe([A])[0].version == 1


def test_a_journal_of_another_bank_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        bank = create_bank(tmp_path / name)
        shard = Shard.open(bank)
        shard.push(make_update(shard, [A], "r"))
        shard.close(consolidate=False)
    journal = tmp_path / "two" / "partitions" / "0000" / "journal"
    shutil.rmtree(journal)
    shutil.copytree(tmp_path / "one" / "partitions" / "0000" / "journal", journal)
    with pytest.raises(MembankError, match="is the journal of"):
        Shard.open(bank)
