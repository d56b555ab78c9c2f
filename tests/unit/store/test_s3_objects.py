"""What a bucket adds to the conformance suite: credentials, versioning, what others left there."""

from __future__ import annotations

import logging
import pickle
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from membank.bank_service.store import (
    FsspecObjects,
    ObjectStore,
    S3Objects,
    open_objects,
    probe_create_only,
    s3_account,
)
from membank.bank_service.store.s3_account import CredentialProvider
from membank.wire.errors import AlreadyExistsError, FailedPreconditionError, Reason
from s3_server import S3Place, split

PREFIXES = ["", pytest.param("fsspec+", marks=pytest.mark.slow)]


def test_urls_choose_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    assert isinstance(open_objects("s3://bucket/bank"), S3Objects)
    assert isinstance(open_objects("fsspec+s3://bucket/bank"), FsspecObjects)
    assert isinstance(open_objects("fsspec+memory://bank"), FsspecObjects)
    for url in ("s3://bucket/bank", "fsspec+s3://bucket/bank", "fsspec+memory://bank"):
        assert open_objects(url).url == open_objects(f"{url}/").url == url


def test_secrets_are_neither_shown_nor_pickled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "the-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
    with caplog.at_level(logging.DEBUG):
        stores: list[ObjectStore] = [S3Objects("s3://bucket/b"), FsspecObjects("s3://bucket/b")]
    for store in stores:
        assert "the-" not in repr(store)
        assert b"the-" not in pickle.dumps(store)
    assert "the-secret" not in caplog.text
    with pytest.raises(TypeError, match="secrets"):
        pickle.dumps(FsspecObjects("s3://bucket/b", key="the-access-key", secret="the-secret"))
    with pytest.raises(TypeError, match="credentials"):
        pickle.dumps(s3_account.S3Account().credentials())


def test_credentials_that_expire_are_asked_for_again() -> None:
    botocore = pytest.importorskip("botocore.credentials")
    renewals: list[datetime] = []

    def fetch() -> dict[str, str]:
        renewals.append(datetime.now(UTC))
        number = len(renewals)
        # Over in a moment, by botocore's own reckoning: every question renews them.
        expiry = (datetime.now(UTC) + timedelta(seconds=1)).isoformat()
        return {
            "access_key": f"key-{number}",
            "secret_key": "secret",
            "token": "token",
            "expiry_time": expiry,
        }

    credentials = botocore.RefreshableCredentials.create_from_metadata(fetch(), fetch, "test")
    provider = CredentialProvider(credentials)
    first, second = provider(), provider()
    assert [first["access_key_id"], second["access_key_id"]] == ["key-2", "key-3"]
    assert first["expires_at"] is not None
    assert first["expires_at"] - datetime.now(UTC) <= timedelta(minutes=1)


def test_credentials_that_do_not_expire_are_asked_for_once() -> None:
    botocore = pytest.importorskip("botocore.credentials")
    found = CredentialProvider(botocore.Credentials("key", "secret"))()
    assert found == {
        "access_key_id": "key",
        "secret_access_key": "secret",
        "token": None,
        "expires_at": None,
    }


def _write_profile(
    place: S3Place, folder: Path, monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    """Leave nothing in the environment but the name of a profile that says everything."""
    for name in place.server.owner.environment:
        monkeypatch.delenv(name)
    (folder / "config").write_text(
        "[profile banks]\nregion = us-east-1\nservices = ours\n"
        f"{keys}\n[services ours]\ns3 =\n  endpoint_url = {place.server.endpoint}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "banks")


@pytest.mark.s3
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_profile_says_everything(
    s3_place: S3Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: str
) -> None:
    owner = s3_place.server.owner.environment
    (tmp_path / "credentials").write_text(
        f"[banks]\naws_access_key_id = {owner['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {owner['AWS_SECRET_ACCESS_KEY']}\n"
    )
    _write_profile(s3_place, tmp_path, monkeypatch, keys="")
    open_objects(f"{prefix}{s3_place.url}/bank").put("k", b"1")
    assert s3_place.read("bank/k") == b"1"


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "fsspec+"])
def test_renewed_credentials_are_used_by_an_open_store(
    s3_place: S3Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: str
) -> None:
    # A program gives keys that expire at once, so that each request asks for new ones.
    monkeypatch.setattr(s3_account, "_CREDENTIAL_TTL", timedelta(0))
    owner = s3_place.server.owner.environment
    answer = tmp_path / "answer"

    def give(secret: str) -> None:
        expiry = (datetime.now(UTC) + timedelta(minutes=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
        answer.write_text(
            f'{{"Version": 1, "AccessKeyId": "{owner["AWS_ACCESS_KEY_ID"]}", '
            f'"SecretAccessKey": "{secret}", "Expiration": "{expiry}"}}'
        )

    give("wrong")
    _write_profile(s3_place, tmp_path, monkeypatch, keys=f"credential_process = cat {answer}")
    store = open_objects(f"{prefix}{s3_place.url}/bank")
    with pytest.raises(FailedPreconditionError) as caught:
        store.put("k", b"1")
    assert caught.value.reason is Reason.STORE_CREDENTIALS
    give(owner["AWS_SECRET_ACCESS_KEY"])
    store.put("k", b"2")
    assert s3_place.read("bank/k") == b"2"


@pytest.mark.s3
@pytest.mark.parametrize("status", ["Enabled", "Suspended"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_bucket_with_versioning_is_refused(s3_place: S3Place, prefix: str, status: str) -> None:
    client: Any = s3_place.server.client
    if s3_place.prefix:
        pytest.skip("needs a bucket of its own, to change its settings")
    settings = {"Bucket": s3_place.bucket}
    client.put_bucket_versioning(**settings, VersioningConfiguration={"Status": "Enabled"})
    client.put_bucket_versioning(**settings, VersioningConfiguration={"Status": status})
    with pytest.raises(FailedPreconditionError) as caught:
        probe_create_only(open_objects(f"{prefix}{s3_place.url}/bank"))
    assert caught.value.reason is Reason.STORE_UNSUPPORTED
    assert "versioning" in caught.value.message


@pytest.mark.s3
@pytest.mark.parametrize("prefix", PREFIXES)
def test_folders_that_a_console_made_are_no_objects(s3_place: S3Place, prefix: str) -> None:
    s3_place.write("bank/", b"")
    s3_place.write("bank/m/", b"")
    s3_place.write("bank/m/1", b"")
    store = open_objects(f"{prefix}{s3_place.url}/bank")
    assert store.list("m") == ["m/1"]
    assert "" not in store.list("")


@pytest.mark.s3
def test_a_name_that_no_key_can_have_is_reported(s3_place: S3Place) -> None:
    s3_place.write("bank/m/1", b"")
    s3_place.write("bank/m//2", b"")
    with pytest.raises(FailedPreconditionError, match="m//2"):
        open_objects(f"{s3_place.url}/bank").list("m")


@pytest.mark.s3
def test_a_bank_may_be_a_whole_bucket(s3_place: S3Place) -> None:
    if s3_place.prefix:
        pytest.skip("needs a bucket of its own")
    bucket, _ = split(s3_place.url)
    store = open_objects(f"s3://{bucket}/")
    store.put("a/1", b"1")
    assert store.list("") == store.list("a") == ["a/1"]
    assert s3_place.read("a/1") == b"1"


@pytest.mark.s3
def test_both_clients_see_the_same_bank(s3_place: S3Place) -> None:
    url = f"{s3_place.url}/a%b/c d"
    stores: list[ObjectStore] = [S3Objects(url), FsspecObjects(url)]
    for one, other in (stores, stores[::-1]):
        one.put_if_absent("k/1", b"one")
        with pytest.raises(AlreadyExistsError):
            other.put_if_absent("k/1", b"other")
        other.put("k/2", b"two")
        assert (other.get("k/1"), one.get("k/2")) == (b"one", b"two")
        assert one.list("") == other.list("") == ["k/1", "k/2"]
        other.delete("k/1")
        one.delete("k/2")
        assert one.list("") == other.list("") == []
