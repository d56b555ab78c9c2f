"""A real S3 server for tests, as a pytest plugin: one per run, shared by its processes, ended with it.

Where `MEMBANK_TEST_S3_URL` (``s3://bucket/prefix``) is set, tests use that place instead, with the
credentials of the environment; what needs to make users is skipped there.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "s3"
_EXTERNAL = "MEMBANK_TEST_S3_URL"
_RUN = "MEMBANK_TEST_S3_RUN"
_AWS = (
    "AWS_ENDPOINT_URL",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)


def why_no_s3() -> str | None:
    """Return why tests that need an S3 server cannot run here, or None if they can."""
    if os.environ.get(_EXTERNAL) or shutil.which("radosgw"):
        return None
    return f"needs an S3 server: run scripts/s3/install.sh as root, or set {_EXTERNAL}"


@dataclass(frozen=True)
class S3User:
    """Somebody with keys."""

    name: str
    environment: Mapping[str, str] = field(repr=False)
    """The AWS_* variables by which clients become this user."""


@dataclass(frozen=True)
class S3Server:
    """A running server, as its own user `owner` and from the outside."""

    owner: S3User
    base_url: str | None = None
    """Where tests may write on a server that is not ours; None = make a bucket per test."""
    ceph_conf: str | None = None
    """What radosgw-admin needs; None on a server that is not ours."""

    @property
    def endpoint(self) -> str:
        """Its URL, for what stands between it and its clients."""
        found = self.owner.environment.get("AWS_ENDPOINT_URL", "https")
        if not found.startswith("http://"):
            pytest.skip("needs a server without TLS, to stand between it and its clients")
        return found

    @cached_property
    def client(self) -> Any:
        """A client that neither of the stores under test uses: botocore, as the owner."""
        return make_client(self.owner)

    def make_place(self) -> str:
        """Return the URL of an empty bucket (elsewhere: an unused prefix)."""
        if self.base_url is not None:
            return f"{self.base_url.rstrip('/')}/{uuid.uuid4().hex}"
        bucket = f"test-{uuid.uuid4().hex}"
        self.client.create_bucket(Bucket=bucket)
        return f"s3://{bucket}"

    def make_bucket(self, user: S3User) -> str:
        """Return the name of a new bucket of `user`'s."""
        bucket = f"test-{uuid.uuid4().hex}"
        make_client(user).create_bucket(Bucket=bucket)
        return bucket

    def clear(self, url: str) -> None:
        """Delete what is below `url`, so that a server in memory stays small."""
        bucket, prefix = split(url)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        for page in pages:
            names = [{"Key": found["Key"]} for found in page.get("Contents", ())]
            if names:
                self.client.delete_objects(Bucket=bucket, Delete={"Objects": names, "Quiet": True})

    def make_user(self) -> S3User:
        """Return a new user, who may use no bucket but its own."""
        name = f"user-{uuid.uuid4().hex[:12]}"
        said = self._admin("user", "create", f"--uid={name}", f"--display-name={name}")
        keys = said["keys"][0]
        environment = {
            **self.owner.environment,
            "AWS_ACCESS_KEY_ID": keys["access_key"],
            "AWS_SECRET_ACCESS_KEY": keys["secret_key"],
        }
        return S3User(name, environment)

    def suspend(self, user: S3User) -> None:
        """Refuse the user everything from now on."""
        self._admin("user", "suspend", f"--uid={user.name}")

    def enable(self, user: S3User) -> None:
        """Take a suspension back."""
        self._admin("user", "enable", f"--uid={user.name}")

    def make_read_only(self, user: S3User) -> None:
        """Refuse the user every write and delete from now on."""
        self._admin("user", "modify", f"--uid={user.name}", "--op-mask=read")

    def make_writer(self, user: S3User) -> None:
        """Allow the user everything again."""
        self._admin("user", "modify", f"--uid={user.name}", "--op-mask=read,write,delete")

    def _admin(self, *arguments: str) -> Any:
        if self.ceph_conf is None:
            pytest.skip("needs to make users, which only the server of the tests' own allows")
        said = subprocess.run(
            ["radosgw-admin", "-c", self.ceph_conf, "-n", "client.rgw", *arguments],
            check=True,
            capture_output=True,
            timeout=60,
        )
        return json.loads(said.stdout)


@dataclass(frozen=True)
class S3Place:
    """An empty place of one test; the environment names the server and its owner."""

    url: str
    server: S3Server
    set_environment: Callable[[S3User], None] = field(repr=False)
    """Become another user, until the test ends."""

    @property
    def bucket(self) -> str:
        """Name of the bucket."""
        return split(self.url)[0]

    @property
    def prefix(self) -> str:
        """Prefix in the bucket, "" or ending in a slash."""
        return split(self.url)[1]

    def read(self, key: str) -> bytes:
        """Return an object, past the store under test."""
        body = self.server.client.get_object(Bucket=self.bucket, Key=self.prefix + key)["Body"]
        with body:
            content: bytes = body.read()
        return content

    def write(self, key: str, data: bytes) -> None:
        """Put an object, past the store under test."""
        self.server.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=data)


def split(url: str) -> tuple[str, str]:
    """Return the bucket of an ``s3://`` URL, and the prefix of its objects."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    return bucket, f"{prefix}/" if prefix else ""


def make_client(user: S3User) -> Any:
    """Return a botocore client that acts as `user`, tries once and lives in no environment."""
    # A quarter of a second to import, which runs without S3 tests need not wait.
    import botocore.config
    import botocore.session

    environment = user.environment
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=environment.get("AWS_ENDPOINT_URL"),
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
        config=botocore.config.Config(
            s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}
        ),
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose where the run's server will be; the first test that needs it starts it."""
    if not hasattr(config, "workerinput"):
        folder = Path(tempfile.mkdtemp(prefix="membank-s3-"))
        (folder / "pid").write_text(str(os.getpid()))
        # Test processes are children, and inherit it.
        os.environ[_RUN] = str(folder)


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the run's server, if it was started; test processes have ended before."""
    if not hasattr(config, "workerinput") and _RUN in os.environ:
        folder = Path(os.environ.pop(_RUN))
        _stop(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def s3_server() -> S3Server:
    """Return the run's S3 server."""
    if (external := _external_server()) is not None:
        return external
    folder = Path(os.environ[_RUN])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        answer = folder / "environment"
        if not answer.exists():
            answer.write_text(_start(folder, int((folder / "pid").read_text())))
        return _server_of(answer.read_text())


@contextmanager
def open_server(folder: Path) -> Iterator[S3Server]:
    """Run a server under `folder`, for whoever is no test; it ends with this process at the latest."""
    if (external := _external_server()) is not None:
        yield external
        return
    try:
        yield _server_of(_start(folder, os.getpid()))
    finally:
        _stop(folder)


def _external_server() -> S3Server | None:
    if not (url := os.environ.get(_EXTERNAL)):
        return None
    inherited = {name: os.environ[name] for name in _AWS if name in os.environ}
    region = inherited.get("AWS_REGION", inherited.get("AWS_DEFAULT_REGION", "us-east-1"))
    environment = {"AWS_REGION": region, **inherited}
    return S3Server(S3User("owner", environment), base_url=url)


def _stop(folder: Path) -> None:
    for server in folder.glob("server-*"):
        subprocess.run([SCRIPTS / "stop.sh", server], check=False, timeout=60)


def _server_of(answer: str) -> S3Server:
    said = dict(line.split("=", 1) for line in answer.splitlines())
    return S3Server(
        S3User("tester", {name: said[name] for name in _AWS}), ceph_conf=said["CEPH_CONF"]
    )


def _start(folder: Path, watched: int) -> str:
    # A port that was free may be taken before its daemon has it: then once more with others.
    for attempt in range(3):
        said = subprocess.run(
            [SCRIPTS / "start.sh", folder / f"server-{attempt}", str(watched)],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        if said.returncode == 0:
            return said.stdout
    raise RuntimeError(f"the S3 server did not start: {said.stderr}")


@pytest.fixture
def s3_place(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Place]:
    """Give a test an empty place on the server, and the environment that leads there."""

    def set_environment(user: S3User) -> None:
        for name, value in user.environment.items():
            monkeypatch.setenv(name, value)

    # What a developer has set up for real buckets must not reach the tests, nor the other way.
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        if s3_server.base_url is None:
            monkeypatch.delenv(name, raising=False)
    set_environment(s3_server.owner)
    url = s3_server.make_place()
    yield S3Place(url, s3_server, set_environment)
    s3_server.clear(url)
