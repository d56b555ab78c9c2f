"""What S3 answers becomes: leaf, reason, a message that says where and what to do, and no secret."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fault_proxy import Fault, FaultProxy, Rule, Script
from membank.bank_service.store import FsspecObjects, ObjectStore, S3Config, S3Objects, open_objects
from membank.bank_service.store.s3_account import S3Place
from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)

ACCESS, SECRET = "AKACCESSKEY", "a-very-secret-key"
ONCE = S3Config(retry_s=0)
IMPATIENT = S3Config(stall_timeout_s=0.2, transfer_timeout_s=0.5, retry_s=0)
URL = "s3://bucket/bank"


def _set_environment(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    patch.setenv("AWS_ENDPOINT_URL", endpoint)
    patch.setenv("AWS_ACCESS_KEY_ID", ACCESS)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.delenv("AWS_PROFILE", raising=False)


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultProxy]:
    with FaultProxy(None) as alone:
        yield alone


@pytest.fixture(scope="module")
def stores(proxy: FaultProxy) -> Iterator[dict[str, ObjectStore]]:
    # For the module: an s3fs makes its client at the first request, and that takes its time.
    with pytest.MonkeyPatch.context() as patch:
        _set_environment(patch, proxy.url)
        yield {
            "obstore": S3Objects(URL, ONCE),
            "s3fs": FsspecObjects(f"fsspec+{URL}", ONCE),
        }


@pytest.fixture(params=["obstore", "s3fs"])
def store(request: pytest.FixtureRequest, stores: dict[str, ObjectStore]) -> ObjectStore:
    return stores[request.param]


Verb = Callable[[ObjectStore], object]
READS: dict[str, Verb] = {
    "get": lambda store: store.get("k"),
    "get_range": lambda store: store.get_range("k", 0, 4),
    "list": lambda store: store.list("k"),
}
WRITES: dict[str, Verb] = {
    "put": lambda store: store.put("k", b"1"),
    "put_if_absent": lambda store: store.put_if_absent("k", b"1"),
    "delete": lambda store: store.delete("k"),
}
VERBS = READS | WRITES


def _error(
    proxy: FaultProxy, store: ObjectStore, verb: Verb, status: int, code: str
) -> MembankError:
    rule = Rule(fault=Fault.ANSWER, status=status, code=code, times=None)
    with proxy.following(Script(rule)), pytest.raises(MembankError) as caught:
        verb(store)
    error = caught.value
    assert f"{store.url}/k" in error.message
    for secret in (SECRET, ACCESS, "StringToSign"):
        assert secret not in error.message
        assert secret not in str(error.metadata)
    return error


CODES = [
    (404, "NoSuchBucket", FailedPreconditionError, Reason.NO_BUCKET, "create it"),
    (403, "AccessDenied", FailedPreconditionError, Reason.STORE_DENIED, "allow"),
    (403, "UserSuspended", FailedPreconditionError, Reason.STORE_DENIED, "allow"),
    (403, "InvalidAccessKeyId", FailedPreconditionError, Reason.STORE_CREDENTIALS, "correct"),
    (403, "SignatureDoesNotMatch", FailedPreconditionError, Reason.STORE_CREDENTIALS, "correct"),
    (400, "ExpiredToken", FailedPreconditionError, Reason.STORE_CREDENTIALS, "renew"),
    (403, "RequestTimeTooSkewed", FailedPreconditionError, Reason.STORE_CLOCK_SKEW, "clock"),
    (400, "AuthorizationHeaderMalformed", FailedPreconditionError, Reason.STORE_FAILED, "REGION"),
    (501, "NotImplemented", FailedPreconditionError, Reason.STORE_UNSUPPORTED, "implement"),
    (418, "SomethingNew", FailedPreconditionError, Reason.STORE_FAILED, "SomethingNew"),
    (403, "QuotaExceeded", ResourceExhaustedError, Reason.NO_SPACE, "free"),
    (400, "InvalidBucketName", InvalidArgumentError, Reason.BAD_ARGUMENT, "name"),
    (503, "SlowDown", UnavailableError, Reason.STORE_FAILED, "later"),
    (503, "ServiceUnavailable", UnavailableError, Reason.STORE_FAILED, "later"),
    (500, "InternalError", UnavailableError, Reason.STORE_FAILED, "later"),
    (502, "", UnavailableError, Reason.STORE_FAILED, "later"),
    (400, "RequestTimeout", UnavailableError, Reason.STORE_FAILED, "later"),
    (409, "ConditionalRequestConflict", UnavailableError, Reason.STORE_FAILED, "later"),
    (403, "", FailedPreconditionError, Reason.STORE_DENIED, "allow"),
    (401, "", FailedPreconditionError, Reason.STORE_CREDENTIALS, "correct"),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("status", "code", "leaf", "reason", "remedy"), CODES)
def test_an_answer_is_told_by_its_code(
    proxy: FaultProxy,
    store: ObjectStore,
    verb: str,
    status: int,
    code: str,
    leaf: type[MembankError],
    reason: Reason,
    remedy: str,
) -> None:
    error = _error(proxy, store, VERBS[verb], status, code)
    assert type(error) is leaf
    assert error.reason is reason
    assert remedy in error.message
    assert (code or str(status)) in error.message


@pytest.mark.parametrize("verb", VERBS)
def test_a_bucket_in_another_region(
    proxy: FaultProxy, stores: dict[str, ObjectStore], verb: str
) -> None:
    # For obstore alone: botocore asks where the bucket is, and goes there.
    error = _error(proxy, stores["obstore"], VERBS[verb], 301, "PermanentRedirect")
    assert type(error) is FailedPreconditionError
    assert "AWS_REGION" in error.message


@pytest.mark.parametrize("verb", ["get", "get_range"])
def test_a_missing_object(proxy: FaultProxy, store: ObjectStore, verb: str) -> None:
    error = _error(proxy, store, READS[verb], 404, "NoSuchKey")
    assert type(error) is NotFoundError
    assert error.reason is Reason.OBJECT_MISSING


def test_a_conflict(proxy: FaultProxy, store: ObjectStore) -> None:
    error = _error(proxy, store, WRITES["put_if_absent"], 412, "PreconditionFailed")
    assert type(error) is AlreadyExistsError
    assert error.reason is Reason.OBJECT_EXISTS


def test_an_answer_to_head_has_no_code(proxy: FaultProxy, store: ObjectStore) -> None:
    error = _error(proxy, store, lambda it: it.get_range("k", 0, 0), 403, "AccessDenied")
    assert error.reason is Reason.STORE_DENIED


def _open(prefix: str, config: S3Config) -> ObjectStore:
    return FsspecObjects(f"{prefix}{URL}", config) if prefix else S3Objects(URL, config)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "fsspec+"])
def test_a_silent_server_is_unavailable(
    proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    _set_environment(monkeypatch, proxy.url)
    store = _open(prefix, IMPATIENT)
    for verb in VERBS.values():
        rule = Rule(fault=Fault.STALL_BEFORE)
        with proxy.following(Script(rule)), pytest.raises(UnavailableError) as caught:
            verb(store)
        assert "no answer in time" in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "fsspec+"])
@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_a_server_that_cannot_be_reached(
    monkeypatch: pytest.MonkeyPatch, prefix: str, host: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    _set_environment(monkeypatch, f"http://{host}:{port}")
    store = _open(prefix, ONCE)
    for verb in VERBS.values():
        with pytest.raises(UnavailableError) as caught:
            verb(store)
        assert caught.value.reason is Reason.STORE_FAILED
        assert "cannot be reached" in caught.value.message
        assert "AWS_ENDPOINT_URL" in caught.value.message


@pytest.mark.parametrize("prefix", ["", pytest.param("fsspec+", marks=pytest.mark.slow)])
def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prefix: str) -> None:
    _set_environment(monkeypatch, "http://127.0.0.1:1")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(FailedPreconditionError) as caught:
        open_objects(f"{prefix}{URL}").get("k")
    assert caught.value.reason is Reason.STORE_CREDENTIALS
    assert "AWS_ACCESS_KEY_ID" in caught.value.message


def test_an_unknown_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(FailedPreconditionError) as caught:
        open_objects(URL)
    assert caught.value.reason is Reason.STORE_CREDENTIALS
    assert "nobody" in caught.value.message


@pytest.mark.parametrize(
    "url",
    [
        "s3://",
        "s3:///bank",
        "s3://ab/bank",
        "s3://key:secret@bucket/bank",
        "s3://bucket:9000/bank",
        "s3://bucket/a//b",
        "s3://bucket/../b",
        "s3://bucket/a\nb",
    ],
)
def test_malformed_urls_are_refused_and_not_repeated(url: str) -> None:
    for prefix in ("", "fsspec+"):
        with pytest.raises(InvalidArgumentError) as caught:
            open_objects(prefix + url)
        assert "secret" not in caught.value.message


def test_a_url_is_a_bucket_and_a_prefix() -> None:
    assert S3Place.parse("s3://my.bucket-1/a b/c%/") == S3Place("my.bucket-1", "a b/c%")
    assert S3Place.parse("s3://bucket/").path("k") == "k"
    assert S3Place.parse("s3://bucket/a").path("k") == "a/k"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connect_timeout_s", 0),
        ("stall_timeout_s", -1),
        ("transfer_timeout_s", 0),
        ("max_backoff_s", 0),
        ("retry_s", -1),
        ("max_idle_connections", 0),
    ],
)
def test_settings_are_checked(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        S3Config(**{name: value})  # type: ignore[arg-type]
