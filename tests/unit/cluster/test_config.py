"""Settings of a service, and the notes of those that run."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from membank.bank_service.cluster import (
    Endpoint,
    UpConfig,
    default_runtime_dir,
    down,
    list_running,
    status,
    up,
)
from membank.bank_service.cluster import state as notes
from membank.bank_service.cluster.config import bank_key, canonical_url, default_journal_root
from membank.bank_service.shard.config import Durability
from membank.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    Reason,
    UnavailableError,
)
from membank.wire.signing import Signer


def endpoint(bank_url: str, address: str = "127.0.0.1:7600") -> Endpoint:
    return Endpoint(address=address, bank_url=bank_url, ray_address="127.0.0.2:6379")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"num_shards": 0}, Reason.BAD_CONFIG),
        ({"num_shards": 257}, Reason.BAD_CONFIG),
        ({"min_nodes": 0}, Reason.BAD_CONFIG),
        ({"object_store_bytes": 1}, Reason.BAD_CONFIG),
        ({"max_in_flight_bytes": 1}, Reason.BAD_CONFIG),
        ({"start_timeout_s": 0.0}, Reason.BAD_CONFIG),
        ({"port": 70_000}, Reason.BAD_CONFIG),
        ({"tls_cert": Path("c")}, Reason.BAD_CONFIG),
        ({"host": "0.0.0.0"}, Reason.INSECURE_ENDPOINT),
        ({"host": "0.0.0.0", "token_file": Path("t")}, Reason.INSECURE_ENDPOINT),
        ({"durability": "eternal"}, Reason.BAD_CONFIG),
        ({"lease_s": -1.0}, Reason.BAD_CONFIG),
        ({"ship_every_s": -1.0}, Reason.BAD_CONFIG),
        ({"retained_revisions": 0}, Reason.BAD_CONFIG),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(
    fields: dict[str, object], reason: Reason
) -> None:
    with pytest.raises(MembankError) as caught:
        UpConfig(bank_url="bank", **fields)  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.reason is reason


def test_paths_are_absolute_for_actors_have_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = UpConfig(bank_url="bank", runtime_dir=Path("run"))
    assert config.bank_url == str(tmp_path / "bank")
    assert config.runtime_dir == tmp_path / "run"
    assert config.key == bank_key(f"file://{tmp_path}/bank") == bank_key("./x/../bank")


def test_trusted_keys_are_read_before_anything_starts(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    signer = Signer.generate()
    keys.write_text(f"{signer.public_key.text} Jo\n")
    config = UpConfig(bank_url=str(tmp_path / "bank"), trusted_keys=keys)
    trusted = config.load_trusted_keys()
    assert trusted is not None
    assert trusted[signer.public_key] == "Jo"
    assert UpConfig(bank_url=str(tmp_path / "bank")).load_trusted_keys() is None
    for text in ("no key\n", None):
        keys.write_text(text) if text else keys.unlink()
        with pytest.raises(InvalidArgumentError) as caught:
            up(config)
        assert caught.value.reason is Reason.BAD_KEY


def test_urls_keep_their_scheme_and_journals_lie_where_settings_say(tmp_path: Path) -> None:
    config = UpConfig(bank_url="s3://bucket/bank/", runtime_dir=tmp_path)
    assert config.bank_url == canonical_url("s3://bucket/bank") == "s3://bucket/bank"
    chosen = UpConfig(bank_url="s3://bucket/bank", journal_dir=Path("journals"))
    assert chosen.shard_config().journal_dir == str(Path("journals").absolute())
    assert UpConfig(bank_url="bank").shard_config().journal_dir is None


def test_a_journal_that_is_to_survive_a_restart_lies_where_restarts_remove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMBANK_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "emptied"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert default_journal_root() == tmp_path / "state" / "membank"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_journal_root() == tmp_path / "home" / ".local" / "state" / "membank"
    monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(tmp_path / "own"))
    assert default_journal_root() == tmp_path / "own"
    # Each node looks that up for itself: it has a disk of its own.
    assert UpConfig(bank_url="s3://bucket/bank").shard_config().journal_dir is None


def test_both_clients_of_a_bucket_name_one_bank() -> None:
    key = bank_key("s3://bucket/bank")
    assert bank_key("fsspec+s3://bucket/bank/") == key
    assert bank_key("s3://bucket/other") != key
    assert bank_key("/bucket/bank") != key


def test_settings_of_durability_reach_the_shards(tmp_path: Path) -> None:
    config = UpConfig(
        bank_url="s3://bucket/bank",
        durability="store",
        journal_dir=tmp_path / "journals",
        ship_every_s=2.5,
        lease_s=4.0,
        resident_bytes=1 << 20,
        retained_revisions=3,
    )
    shard = config.shard_config()
    assert shard.durability is Durability.STORE
    assert shard.journal_dir == str(tmp_path / "journals")
    assert (shard.ship_every_s, shard.lease_s) == (2.5, 4.0)
    assert (shard.resident_bytes, shard.retained_revisions) == (1 << 20, 3)


def test_runtime_dir_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("MEMBANK_RUNTIME_DIR", raising=False)
    assert default_runtime_dir() == tmp_path / "membank"
    monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(tmp_path / "own"))
    assert default_runtime_dir() == tmp_path / "own"


def test_services_are_found_by_bank_or_alone(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError) as caught:
        notes.find(None, tmp_path)
    assert caught.value.reason is Reason.NOT_RUNNING
    first, second = endpoint("/banks/a"), endpoint("/banks/b", "127.0.0.1:7601")
    notes.save(first, tmp_path)
    assert notes.find(None, tmp_path) == first
    notes.save(second, tmp_path)
    assert set(list_running(tmp_path)) == {first, second}
    assert notes.find("/banks/b", tmp_path) == second
    with pytest.raises(InvalidArgumentError, match="several"):
        notes.find(None, tmp_path)
    notes.forget(second, tmp_path)
    assert list_running(tmp_path) == (first,)
    assert str(first) == "127.0.0.1:7600"


def test_a_note_that_is_no_note_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "x.service.json").write_text("{")
    (tmp_path / "y.service.json").write_text('{"address": 1, "of": "another version"}')
    assert list_running(tmp_path) == ()


def test_down_without_a_service_says_so(tmp_path: Path) -> None:
    for call in (down, status):
        with pytest.raises(UnavailableError) as caught:
            call(runtime_dir=tmp_path)
        assert caught.value.reason is Reason.NOT_RUNNING


def test_a_service_whose_processes_are_gone_is_not_running(tmp_path: Path) -> None:
    gone = Endpoint(
        address="127.0.0.1:1",
        bank_url="/banks/a",
        ray_address="127.0.0.2:1",
        ray_dir=str(tmp_path / "ray"),
        ray_mark="no process has this mark",
    )
    notes.save(gone, tmp_path)
    with pytest.raises(UnavailableError) as caught:
        status(runtime_dir=tmp_path)
    assert caught.value.reason is Reason.NOT_RUNNING
    assert list_running(tmp_path) == ()


@pytest.mark.parametrize("scheme", ["s3", "fsspec+s3", "ftp"])
def test_credentials_in_a_url_are_refused_and_not_repeated(scheme: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        UpConfig(bank_url=f"{scheme}://KEY:SECRET@bucket/bank")
    assert "SECRET" not in str(caught.value)
    # A directory, or a prefix, may be called so.
    UpConfig(bank_url="./me@home/bank")
    UpConfig(bank_url="s3://bucket/me@home")


def test_a_signing_key_is_made_once_or_is_the_one_that_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEMBANK_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    config = UpConfig(bank_url=str(tmp_path / "bank"))
    made = config.load_signer().public_key
    assert config.load_signer().public_key == made
    (file,) = (tmp_path / "membank").iterdir()
    assert file.stat().st_mode & 0o077 == 0
    named = UpConfig(bank_url=str(tmp_path / "bank"), signing_key=tmp_path / "other.pem")
    with pytest.raises(FailedPreconditionError) as caught:
        named.load_signer()
    # A slip in a name must not make a key that nobody knows.
    assert caught.value.reason is Reason.BAD_KEY
    assert not (tmp_path / "other.pem").exists()
    assert b"PRIVATE" not in pickle.dumps(config)


def test_a_sealed_bank_takes_one_durability_and_a_keyring_without_credentials(
    tmp_path: Path,
) -> None:
    place = {"bank_url": str(tmp_path / "bank"), "keyring_url": str(tmp_path / "keys/../keyring")}
    config = UpConfig(**place)  # type: ignore[arg-type]  # names are those of fields
    assert config.keyring_url == str(tmp_path / "keyring")
    assert config.shard_config().durability is Durability.STORE
    assert UpConfig(bank_url="bank").shard_config().durability is Durability.PROCESS
    with pytest.raises(InvalidArgumentError, match="store") as caught:
        UpConfig(**place, durability="host")  # type: ignore[arg-type]  # names are those of fields
    assert caught.value.reason is Reason.BAD_CONFIG
    with pytest.raises(InvalidArgumentError, match="credentials"):
        UpConfig(bank_url="bank", keyring_url="s3://key:secret@bucket/ring")
