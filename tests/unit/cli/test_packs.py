"""Commands that take topics out of a bank and bring them in, against a real server on loopback."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from command_line import membank
from membank.wire.format.pack import check_signatures, decode_pack
from membank.wire.signing import Signer
from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete
from rpc_rig import RpcRig
from shard_rig import asked

TOPIC, LEAF = BlockRef(1, 1), BlockRef(2, 2)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[RpcRig]:
    with RpcRig(tmp_path / "bank") as rig:
        rig.bank.push(TOPIC, "a")
        yield rig


@pytest.fixture
def at(rig: RpcRig) -> tuple[str, str]:
    return ("--bank", rig.address)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A file that trusts the key ``me.pem`` beside it."""
    ended = membank("pack", "keygen", str(tmp_path / "me.pem"), "--name", "Jo, chemistry")
    assert ended.code == 0
    (tmp_path / "keys").write_text(ended.out)
    return tmp_path / "keys"


def test_a_topic_goes_out_and_comes_in(rig: RpcRig, at: tuple[str, str], tmp_path: Path) -> None:
    pack = tmp_path / "topic.pack"
    assert membank("export", "1/1", str(pack), *at).code == 0
    assert pack.read_bytes() == rig.bank.export(TOPIC)
    assert [path.name for path in tmp_path.glob("topic*")] == ["topic.pack"]
    before = rig.bank.state()
    dry = json.loads(membank("import", str(pack), "--as", "1/3", "--dry-run", *at, "--json").out)
    assert dry["topic"] == "1/3"
    assert [change["block"] for change in dry["changes"]] == ["1/3", "2/6", "2/7"]
    assert rig.bank.state() == before
    ended = membank("import", str(pack), "--as", "1/3", *at)
    assert (ended.code, "topic 1/3" in ended.out) == (0, True)
    assert rig.bank.export(BlockRef(1, 3)) != rig.bank.export(TOPIC)
    assert rig.bank.status(BlockRef(1, 3)).version == 1


@pytest.mark.parametrize(
    "url", ["memory://packs/topic.pack", "file://{tmp}/topic.pack", "local://{tmp}/topic.pack"]
)
def test_urls_are_written_whole_and_read(
    rig: RpcRig, at: tuple[str, str], tmp_path: Path, url: str
) -> None:
    where = url.format(tmp=tmp_path)
    assert membank("export", "1/1", where, *at).code == 0
    with fsspec.open(where, "rb") as file:
        assert file.read() == rig.bank.export(TOPIC)
    rig.bank.operations.apply(asked("d"), [Delete(topic=TOPIC)])
    assert membank("import", where, *at).code == 0
    assert rig.bank.status(TOPIC).state is BlockState.ACTIVE
    assert membank("pack", "verify", where).code == 0


def test_an_export_that_fails_leaves_what_was_there(
    rig: RpcRig, at: tuple[str, str], tmp_path: Path
) -> None:
    rig.bank.operations.apply(asked("d"), [Delete(topic=TOPIC)])
    pack = tmp_path / "topic.pack"
    pack.write_bytes(b"an older one")
    remote = fsspec.filesystem("memory")
    remote.pipe_file("/packs/old.pack", b"an older one")
    for where in (str(pack), "memory://packs/old.pack"):
        ended = membank("export", "1/1", where, *at)
        assert (ended.code != 0, "BLOCK_DELETED" in ended.err) == (True, True)
    assert pack.read_bytes() == remote.cat_file("/packs/old.pack") == b"an older one"
    assert [path.name for path in tmp_path.glob("topic*")] == ["topic.pack"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("export", "1/1"), "a path or URL, or --store NAME"),
        (("export", "1/1", "x.pack", "--store", "x"), "a path or URL, or --store NAME"),
        (("export", "1/1", "--store", "x", "--sign", "x.pem"), "service's key"),
        (("export", "1/1", "x.pack", "--sign", "missing.pem"), "BAD_KEY"),
        (("export", "1/1", "missing/x.pack"), "no folder for it"),
        (("export", "1/1", "nosuch://x.pack"), "nosuch://x.pack"),
        (("export", "1/1", "x.pack", "--since", "never"), "UNKNOWN_SNAPSHOT"),
        (("import",), "a path or URL, or --stored NAME"),
        (("import", "missing.pack"), "there is no missing.pack"),
        (("import", "memory://missing.pack"), "there is no memory://missing.pack"),
        (("import", "--stored", "never"), "UNKNOWN_PACK"),
        (("import", "--stored", "x", "--trusted", "keys"), "--trusted-keys"),
        (("pack", "delete", "never"), "UNKNOWN_PACK"),
    ],
)
def test_what_cannot_be_is_said(
    rig: RpcRig,
    at: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[str, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = membank(*args, *at)
    assert ended.code != 0
    assert said in " ".join(ended.err.split())
    assert "Traceback" not in ended.err
    assert not list(tmp_path.glob("*.pack"))


def test_a_url_without_fsspec_names_the_extra(
    at: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for args in (("export", "1/1", "s3://bucket/x.pack"), ("import", "s3://bucket/x.pack")):
        ended = membank(*args, *at)
        assert "MISSING_EXTRA" in ended.err
        assert "membank[service]" in ended.err
    # Paths need none.
    assert membank("export", "1/1", str(tmp_path / "topic.pack"), *at).code == 0


def test_a_signed_pack_is_trusted_and_others_are_not(
    rig: RpcRig, at: tuple[str, str], tmp_path: Path, keys: Path
) -> None:
    signed, plain = tmp_path / "signed.pack", tmp_path / "plain.pack"
    key, trusted = ("--sign", str(tmp_path / "me.pem")), ("--trusted", str(keys))
    assert membank("export", "1/1", str(signed), *key, *at).code == 0
    assert membank("export", "1/1", str(plain), *at).code == 0
    assert decode_pack(signed.read_bytes()).sha256 == decode_pack(plain.read_bytes()).sha256
    verified = membank("pack", "verify", str(signed), *trusted)
    assert (verified.code, "signed by Jo, chemistry" in verified.out) == (0, True)
    for args in (("pack", "verify", str(plain)), ("import", str(plain), *at)):
        ended = membank(*args, *trusted)
        assert ended.code != 0
        assert "UNSIGNED" in ended.err
    assert membank("import", str(signed), *trusted, *at).code == 0
    stranger = Signer.load_or_create(tmp_path / "other.pem")
    keys.write_text(f"{stranger.public_key.text} somebody else\n")
    ended = membank("import", str(signed), *trusted, *at)
    assert "UNTRUSTED_KEY" in ended.err


def test_a_finished_pack_is_signed_in_place_or_beside(
    rig: RpcRig, at: tuple[str, str], tmp_path: Path, keys: Path
) -> None:
    pack, copy = tmp_path / "topic.pack", tmp_path / "copy.pack"
    assert membank("export", "1/1", str(pack), *at).code == 0
    before = pack.read_bytes()
    key = ("--key", str(tmp_path / "me.pem"))
    assert membank("pack", "sign", str(pack), "--out", str(copy), *key).code == 0
    assert pack.read_bytes() == before
    assert membank("pack", "sign", str(pack), *key).code == 0
    assert pack.read_bytes() == copy.read_bytes()
    (key_id,) = check_signatures(decode_pack(pack.read_bytes()))
    assert key_id == Signer.load(tmp_path / "me.pem").public_key.key_id


def test_a_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "me.pem"
    first = membank("pack", "keygen", str(file), "--name", "Jo")
    again = membank("pack", "keygen", str(file), "--name", "Jo")
    assert first.out == again.out == f"{Signer.load(file).public_key.text} Jo\n"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_damaged_pack_is_refused_by_everything(
    rig: RpcRig, at: tuple[str, str], tmp_path: Path, keys: Path
) -> None:
    pack = tmp_path / "topic.pack"
    assert membank("export", "1/1", str(pack), *at).code == 0
    damaged = bytearray(pack.read_bytes())
    damaged[-1] ^= 1
    pack.write_bytes(damaged)
    key = ("--key", str(tmp_path / "me.pem"))
    for args in (
        ("pack", "verify", str(pack)),
        ("pack", "inspect", str(pack)),
        ("pack", "sign", str(pack), *key),
        ("import", str(pack), *at),
    ):
        ended = membank(*args)
        assert ended.code != 0
        assert "CHECKSUM_MISMATCH" in ended.err
    assert pack.read_bytes() == bytes(damaged)


def test_a_pack_is_looked_into_without_a_service(
    rig: RpcRig, at: tuple[str, str], tmp_path: Path, keys: Path
) -> None:
    rig.bank.operations.create_snapshot(asked("s"), "then")
    rig.bank.push(LEAF, "b")
    pack = tmp_path / "changes.pack"
    sign = ("--sign", str(tmp_path / "me.pem"))
    assert membank("export", "1/1", str(pack), "--since", "then", *sign, *at).code == 0
    shown = membank("pack", "inspect", str(pack), "--trusted", str(keys))
    assert shown.code == 0
    for part in ("label of 1-1", "snapshot then", "1 blocks changed, 2 did not", "Jo, chemistry"):
        assert part in shown.out
    told = json.loads(membank("pack", "inspect", str(pack), *at, "--json").out)
    assert (told["topic"], told["revision"], told["fits_bank"]) == ("1/1", 1, True)
    assert told["base"] == {"revision": 1, "snapshot": "then", "unchanged_blocks": 2}
    assert [block["block"] for block in told["blocks"]] == ["2/2"]
    assert [signature["valid"] for signature in told["signatures"]] == [True]
    assert told["signatures"][0]["trusted_as"] is None


def test_an_empty_file_is_no_pack(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    ended = membank("pack", "inspect", str(tmp_path / "empty"))
    assert "BAD_PACK" in ended.err


def test_packs_stay_with_the_bank_until_their_topic_is_deleted(
    rig: RpcRig, at: tuple[str, str]
) -> None:
    assert "no packs" in membank("packs", *at).out
    for name, topic in (("one", "1/1"), ("leaf", "2/5")):
        assert membank("export", topic, "--store", name, *at).code == 0
    listed = json.loads(membank("packs", *at, "--json").out)
    assert [(pack["name"], pack["topic"]) for pack in listed] == [("leaf", "2/5"), ("one", "1/1")]
    ended = membank("import", "--stored", "one", "--as", "1/3", *at)
    assert (ended.code, "topic 1/3" in ended.out) == (0, True)
    assert membank("delete", "1/1", "--yes", *at).code == 0
    assert [pack["name"] for pack in json.loads(membank("packs", *at, "--json").out)] == ["leaf"]
    assert membank("pack", "delete", "leaf", *at).code == 0
    assert json.loads(membank("packs", *at, "--json").out) == []
