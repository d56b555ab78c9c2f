"""`membank fsck`: exit codes, the document for programs, the words for people."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import membank
from membank.bank_service.shard.config import Durability
from membank.bank_service.store import SealedObjects
from membank.cli.output import console
from tiny_bank import UnsyncedObjects
from whole_bank import make_whole_bank, whole_config

SLOT = "partitions/0000/level-1/weight/c.2.0.0.0.0"


def test_a_clean_bank(template: Path) -> None:
    ended = membank("fsck", str(template))
    assert ended.code == 0
    assert "clean" in ended.out
    assert "4 records" in ended.out
    document = json.loads(membank("fsck", str(template), "--json").out)
    assert document["clean"] is True
    assert document["findings"] == []


def test_a_sealed_bank_needs_its_keyring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, keyring = str(tmp_path / "bank"), str(tmp_path / "keyring")
    place = SealedObjects(UnsyncedObjects(bank), UnsyncedObjects(keyring))
    make_whole_bank(place, config=replace(whole_config(), durability=Durability.STORE))
    for command in (("fsck",), ("audit", "verify"), ("audit", "head")):
        ended = membank(*command, bank)
        assert ended.code != 0
        assert "--keyring" in ended.err
        assert membank(*command, bank, "--keyring", keyring).code == 0
    monkeypatch.setenv("MEMBANK_KEYRING", keyring)
    document = json.loads(membank("fsck", bank, "--json").out)
    assert (document["clean"], document["findings"]) == (True, [])
    assert document["checked"]["num_frames"] == 6


def test_a_damaged_bank(root: Path) -> None:
    (root / SLOT).write_bytes(b"")
    (root / "notes.txt").write_bytes(b"")
    ended = membank("fsck", str(root))
    assert ended.code == 1
    assert SLOT in ended.out
    assert "not clean (1 damage, 1 note)" in ended.out
    ended = membank("fsck", str(root), "--json")
    assert ended.code == 1
    damage, note = json.loads(ended.out)["findings"]
    assert (damage["severity"], damage["kind"], damage["key"]) == ("damage", "slot-damaged", SLOT)
    assert (note["severity"], note["key"]) == ("note", "notes.txt")
    assert membank("fsck", str(root), "--quick").code == 0


def test_keys_are_shown_whole_however_narrow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", 48)
    (root / SLOT).unlink()
    out = membank("fsck", str(root)).out
    assert "…" not in out
    assert "c.2.0.0.0.0" in out.replace("\n", "").replace(" ", "")


def test_square_brackets_in_a_key_are_text(root: Path) -> None:
    (root / "[red]").write_bytes(b"")
    assert "[red]" in membank("fsck", str(root)).out


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("fsck", "/nowhere/at/all"), "NOT_A_BANK"),
        (("fsck", "foo://bar"), "BAD_ARGUMENT"),
        (("fsck",), "Missing argument"),
        (("fsck", ".", "--deep"), "No such option"),
    ],
)
def test_what_cannot_be_checked(args: tuple[str, ...], word: str) -> None:
    ended = membank(*args)
    assert ended.code == 2
    assert word in ended.err
