"""A bank in a bucket that may not, or no longer, be used: each error says so, and the bank stays whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fault_proxy import Fault, FaultProxy, Rule, Script
from membank.bank_service.fsck import Severity, check_bank
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.store import Bank, FsspecObjects, ObjectStore, S3Config, S3Objects
from membank.wire.errors import FailedPreconditionError, MembankError, Reason
from membank.wire.records import Update
from membank.wire.spec import BlockRef
from s3_server import S3Place, S3User
from tiny_bank import full_state, make_update, tiny_spec

pytestmark = [pytest.mark.s3, pytest.mark.slow]

REFS = (BlockRef(1, 0), BlockRef(1, 1))
# What must be mended is told at once; what may pass, after a moment.
CONFIG = S3Config(retry_s=1)


@pytest.fixture(params=["obstore", "s3fs"])
def open_store(request: pytest.FixtureRequest) -> Callable[[str], ObjectStore]:
    if request.param == "obstore":
        return lambda url: S3Objects(url, CONFIG)
    return lambda url: FsspecObjects(f"fsspec+{url}", CONFIG)


OpenStore = Callable[[str], ObjectStore]


def _open_shard(store: ObjectStore, machine: Path) -> Shard:
    # Acknowledged by the bucket, so that every push speaks to it.
    config = ShardConfig(journal_dir=str(machine), durability=Durability.STORE, lease_s=0)
    return Shard.open(store, config=config)


def _refusal(action: Callable[[], object], reason: Reason, *secrets: str) -> MembankError:
    with pytest.raises(FailedPreconditionError) as caught:
        action()
    error = caught.value
    assert error.reason is reason, error.message
    assert not error.retryable
    for secret in (*secrets, os.environ["AWS_SECRET_ACCESS_KEY"]):
        assert secret not in error.message
    return error


def _push(shard: Shard, request_id: str) -> Update:
    update = make_update(shard, REFS, request_id)
    result = shard.push(update)
    assert all(found.accepted for found in result.results)
    return update


def _require_whole(store: ObjectStore) -> None:
    damage = [
        finding
        for finding in check_bank(store).findings
        if finding.kind.severity is Severity.DAMAGE
    ]
    assert damage == []


@dataclass
class Bucket:
    """A bank of its own user's, with a few updates in it."""

    place: S3Place
    user: S3User
    url: str


@pytest.fixture
def bucket(s3_place: S3Place, open_store: OpenStore, tmp_path: Path) -> Bucket:
    user = s3_place.server.make_user()
    s3_place.set_environment(user)
    name = s3_place.server.make_bucket(user)
    found = Bucket(s3_place, user, f"s3://{name}/bank")
    store = open_store(found.url)
    Bank.create(store, tiny_spec())
    shard = _open_shard(store, tmp_path / "before")
    for number in range(3):
        _push(shard, f"before-{number}")
    shard.consolidate()
    _push(shard, "journalled")
    shard.close(consolidate=False)
    return found


def _require_untouched(bucket: Bucket, open_store: OpenStore, machine: Path) -> None:
    """Check that the bank is whole and goes on from its four updates."""
    bucket.place.set_environment(bucket.user)
    store = open_store(bucket.url)
    _require_whole(store)
    shard = _open_shard(store, machine)
    assert {status.version for status in shard.describe(REFS)} == {4}
    _push(shard, "after")
    shard.close()
    _require_whole(store)


# ---- what is wrong before anything is opened


def test_a_missing_bucket(s3_place: S3Place, open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(f"s3://{s3_place.bucket}-none/bank")
    for action in (
        lambda: Bank.create(store, tiny_spec()),
        lambda: Bank.open(store),
        lambda: _open_shard(store, tmp_path),
        lambda: check_bank(store),
    ):
        error = _refusal(action, Reason.NO_BUCKET)
        assert store.url in error.message
        assert "create it" in error.message


@pytest.mark.parametrize(
    ("variable", "value"),
    [("AWS_SECRET_ACCESS_KEY", "not-the-secret"), ("AWS_ACCESS_KEY_ID", "NOBODYSKEY")],
)
def test_wrong_credentials(
    bucket: Bucket, open_store: OpenStore, tmp_path: Path, variable: str, value: str
) -> None:
    wrong = S3User("wrong", {**bucket.user.environment, variable: value})
    bucket.place.set_environment(wrong)
    store = open_store(bucket.url)
    for action in (
        lambda: Bank.create(open_store(f"{bucket.url}-2"), tiny_spec()),
        lambda: Bank.open(store),
        lambda: _open_shard(store, tmp_path / "wrong"),
    ):
        error = _refusal(action, Reason.STORE_CREDENTIALS, value)
        assert "AWS_SECRET_ACCESS_KEY" in error.message
    _require_untouched(bucket, open_store, tmp_path / "after")


def test_anothers_bucket(bucket: Bucket, open_store: OpenStore, tmp_path: Path) -> None:
    bucket.place.set_environment(bucket.place.server.make_user())
    store = open_store(bucket.url)
    for action in (
        lambda: Bank.create(open_store(f"{bucket.url}-2"), tiny_spec()),
        lambda: Bank.open(store),
        lambda: _open_shard(store, tmp_path / "other"),
    ):
        _refusal(action, Reason.STORE_DENIED)
    _require_untouched(bucket, open_store, tmp_path / "after")


def test_a_user_who_may_only_read(bucket: Bucket, open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(bucket.url)
    bank = Bank.open(store)
    shard = _open_shard(store, tmp_path / "reader")
    state = full_state(shard)
    bucket.place.server.make_read_only(bucket.user)
    assert Bank.open(store).spec == bank.spec
    assert full_state(shard) == state
    _require_whole(store)
    for action in (
        lambda: Bank.create(open_store(f"{bucket.url}-2"), tiny_spec()),
        lambda: _open_shard(open_store(bucket.url), tmp_path / "second"),
        lambda: shard.push(make_update(shard, REFS, "refused")),
    ):
        _refusal(action, Reason.STORE_DENIED)
    bucket.place.server.make_writer(bucket.user)
    shard.close(consolidate=False)
    _require_untouched(bucket, open_store, tmp_path / "after")


# ---- what goes wrong while a shard runs


def test_a_user_disabled_in_between(bucket: Bucket, open_store: OpenStore, tmp_path: Path) -> None:
    store = open_store(bucket.url)
    shard = _open_shard(store, tmp_path / "one")
    update = make_update(shard, REFS, "in-between")
    bucket.place.server.suspend(bucket.user)
    _refusal(lambda: shard.push(update), Reason.STORE_DENIED)
    _refusal(lambda: Bank.open(store), Reason.STORE_DENIED)
    assert {status.version for status in shard.describe(REFS)} == {4}
    bucket.place.server.enable(bucket.user)
    # The same request, as a client repeats it, in the same shard.
    assert all(found.accepted for found in shard.push(update).results)
    assert {status.version for status in shard.describe(REFS)} == {5}
    state = full_state(shard)
    shard.close()
    _require_whole(store)
    again = _open_shard(store, tmp_path / "one")
    assert full_state(again) == state
    again.close()


PLANNED = [
    (400, "ExpiredToken", Reason.STORE_CREDENTIALS, "expired"),
    (403, "RequestTimeTooSkewed", Reason.STORE_CLOCK_SKEW, "clock"),
    (404, "NoSuchBucket", Reason.NO_BUCKET, "bucket"),
    (403, "AccessDenied", Reason.STORE_DENIED, "allow"),
]


@pytest.fixture
def proxy(s3_place: S3Place) -> Iterator[FaultProxy]:
    with FaultProxy(s3_place.server.endpoint) as before:
        yield before


@pytest.mark.parametrize(("status", "code", "reason", "words"), PLANNED)
def test_an_answer_in_between(
    bucket: Bucket,
    proxy: FaultProxy,
    open_store: OpenStore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    status: int,
    code: str,
    reason: Reason,
    words: str,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    store = open_store(bucket.url)
    shard = _open_shard(store, tmp_path / "one")
    update = make_update(shard, REFS, "in-between")
    rule = Rule(fault=Fault.ANSWER, status=status, code=code, times=None)
    with proxy.following(Script(rule)):
        for action in (
            lambda: shard.push(update),
            lambda: Bank.create(open_store(f"{bucket.url}-2"), tiny_spec()),
            lambda: Bank.open(store),
            lambda: _open_shard(store, tmp_path / "two"),
        ):
            assert words in _refusal(action, reason).message
    assert all(found.accepted for found in shard.push(update).results)
    state = full_state(shard)
    shard.close()
    _require_whole(store)
    again = _open_shard(store, tmp_path / "one")
    assert full_state(again) == state
    again.close()


PROGRAM = """
import sys
from membank.bank_service.store import Bank
from membank.wire.errors import MembankError
try:
    Bank.open(sys.argv[1])
except MembankError as err:
    print(type(err).__name__, err.reason.value, err.message)
"""


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs Debian's faketime")
@pytest.mark.parametrize("prefix", ["", "fsspec+"])
def test_a_clock_that_is_wrong_by_an_hour(s3_place: S3Place, prefix: str) -> None:
    url = f"{s3_place.url}/bank"
    Bank.create(url, tiny_spec())
    command = ["faketime", "-f", "+1h", sys.executable, "-c", PROGRAM, prefix + url]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.startswith("FailedPreconditionError STORE_CLOCK_SKEW")
    assert "clock" in said.stdout
    Bank.open(url)
