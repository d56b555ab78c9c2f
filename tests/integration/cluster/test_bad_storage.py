"""Storage that a service cannot use, or not any more: one clear error, nothing left running."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from claim_reader import read_claim
from command_line import Ended, membank
from full_disk import SmallDisk, small_disk
from membank.bank_service.cluster import UpConfig, down, list_running, status, up
from membank.bank_service.store import Bank, open_objects
from membank.client import BankClient
from membank.wire.errors import Reason, ResourceExhaustedError
from membank.wire.format.layout import SPEC_KEY, manifest_key
from membank.wire.spec import BankSpec, BlockRef, LevelSpec
from s3_server import S3Place, make_client

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(180)]

SPEC = BankSpec(
    name="bad",
    num_layers=2,
    width=64,
    # Blocks of several pages: what is left of one page of a full disk must not be enough.
    levels=(LevelSpec(fan_out=4, block_width=32), LevelSpec(fan_out=4, block_width=4)),
)
REF = BlockRef(1, 1)


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where commands note what they start; whatever a test does, nothing of it is left."""
    folder = tmp_path / "run"
    monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(folder))
    # A search for credentials must not leave this machine.
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    yield folder
    left = list_running(folder)
    for endpoint in left:
        down(bank_url=endpoint.bank_url)
    assert left == ()
    assert processes_of(folder) == []


def processes_of(folder: Path) -> list[str]:
    """Return the processes that were started with `folder` in their environment."""
    wanted = f"MEMBANK_RUNTIME_DIR={folder}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found


def up_fails(bank: str, *options: str) -> Ended:
    """Run ``membank up``, which must fail with one line."""
    ended = membank("up", "--bank", bank, "--port", "0", *options)
    assert ended.code != 0
    assert "Traceback" not in ended.err
    assert ended.err.count("error") == 1, ended.err
    assert ended.out == ""
    return ended


def objects_of(url: str) -> dict[str, bytes]:
    objects = open_objects(url)
    return {key: objects.get(key) for key in objects.list("")}


def said(ended: Ended) -> str:
    """Return what a command said, without the breaks of its lines."""
    return re.sub(r"\s+", " ", ended.err)


@pytest.mark.s3
def test_a_bucket_that_is_not_there(s3_place: S3Place) -> None:
    ended = up_fails("s3://no-such-bucket-anywhere/bank")
    assert ended.code == 4
    assert "no such bucket" in said(ended)
    assert "NO_BUCKET" in ended.err


@pytest.mark.s3
@pytest.mark.parametrize(
    ("names", "value"),
    [
        (["AWS_SECRET_ACCESS_KEY"], "wrong"),
        (["AWS_ACCESS_KEY_ID"], "NOBODY"),
        (["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"], None),
    ],
)
@pytest.mark.parametrize("scheme", ["s3", "fsspec+s3"])
def test_credentials_that_nobody_accepts(
    s3_place: S3Place,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    names: list[str],
    value: str | None,
    scheme: str,
) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name in names:
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    ended = up_fails(f"{s3_place.url}/bank".replace("s3", scheme, 1))
    assert ended.code == 4
    assert "AWS_ACCESS_KEY_ID" in said(ended)
    assert "STORE_CREDENTIALS" in ended.err


@pytest.mark.s3
def test_a_user_who_may_only_read(s3_place: S3Place) -> None:
    user = s3_place.server.make_user()
    make_client(user).create_bucket(Bucket=user.name)
    s3_place.set_environment(user)
    url = f"s3://{user.name}/bank"
    Bank.create(url, SPEC)
    before = objects_of(url)
    s3_place.server.make_read_only(user)
    ended = up_fails(url)
    assert ended.code == 4
    assert "STORE_DENIED" in ended.err
    assert objects_of(url) == before


@pytest.mark.s3
def test_a_server_that_is_not_there(s3_place: S3Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    ended = up_fails(f"{s3_place.url}/bank")
    assert ended.code == 7
    assert "AWS_ENDPOINT_URL" in said(ended)


@pytest.mark.s3
def test_a_damaged_bank_in_s3_gives_the_claim_back(s3_place: S3Place) -> None:
    url = f"{s3_place.url}/bank"
    bank = Bank.create(url, SPEC)
    bank.objects.put(manifest_key(1, 1), b"not a manifest")
    before = objects_of(url)
    ended = up_fails(url)
    assert ended.code == 9
    assert manifest_key(1, 1) in said(ended)
    assert read_claim(bank.objects) is None
    # The shard of the other partitions may have taken those over before.
    after = objects_of(url)
    assert {key: after[key] for key in before} == before


def test_a_bank_of_a_newer_format(tmp_path: Path) -> None:
    bank = Bank.create(str(tmp_path / "bank"), SPEC)
    text = bank.objects.get(SPEC_KEY).decode()
    newer = text.replace('"format": 1,', '"format": 99,')
    assert newer != text
    bank.objects.put(SPEC_KEY, newer.encode())
    before = objects_of(bank.url)
    ended = up_fails(bank.url)
    assert ended.code == 4
    assert "FORMAT_TOO_NEW" in ended.err
    assert objects_of(bank.url) == before


def test_a_place_for_journals_that_cannot_be_used(tmp_path: Path) -> None:
    bank = Bank.create(str(tmp_path / "bank"), SPEC)
    (tmp_path / "file").write_text("in the way")
    before = objects_of(bank.url)
    ended = up_fails(bank.url, "--journal-dir", str(tmp_path / "file" / "journals"))
    assert ended.code == 4
    assert str(tmp_path / "file") in ended.err.replace("\n", "")
    assert objects_of(bank.url) == before


def test_a_place_for_notes_that_cannot_be_used(tmp_path: Path, runtime_dir: Path) -> None:
    bank = Bank.create(str(tmp_path / "bank"), SPEC)
    runtime_dir.write_text("in the way")
    ended = up_fails(bank.url)
    assert ended.code == 4
    assert "cannot note the service" in said(ended)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        yield disk


def test_a_bank_on_a_disk_that_may_only_be_read(disk: SmallDisk, tmp_path: Path) -> None:
    Bank.create(str(tmp_path / "bank"), SPEC)
    # Copied: this process still holds files of the one that it made open.
    url = str(shutil.copytree(tmp_path / "bank", disk.root / "bank"))
    before = objects_of(url)
    disk.set_read_only(True)
    try:
        ended = up_fails(url)
        assert ended.code == 4
        assert "Read-only file system" in said(ended)
        assert objects_of(url) == before
    finally:
        disk.set_read_only(False)


def test_a_disk_that_is_full_at_the_start(disk: SmallDisk) -> None:
    bank = Bank.create(str(disk.root / "bank"), SPEC)
    before = objects_of(bank.url)
    disk.fill()
    ended = up_fails(bank.url)
    assert ended.code == 8
    assert "NO_SPACE" in ended.err
    disk.free()
    after = objects_of(bank.url)
    assert {key: after[key] for key in before} == before
    config = UpConfig(bank_url=bank.url, port=0)
    with BankClient.connect(up(config).address) as client:
        assert client.info().spec.bank_id == bank.spec.bank_id
    down()


@pytest.mark.parametrize("place", ["bank", "journals"])
def test_a_disk_that_fills_while_serving(disk: SmallDisk, tmp_path: Path, place: str) -> None:
    on_disk = disk.root / place
    url = str(on_disk if place == "bank" else tmp_path / "bank")
    Bank.create(url, SPEC)
    config = UpConfig(
        bank_url=url, port=0, journal_dir=on_disk if place == "journals" else None, num_shards=1
    )
    gradient = {REF: np.ones(SPEC.block_shape(1), np.float32)}
    with BankClient.connect(up(config).address) as client:
        version = client.push(gradient, base={REF: 0}).versions[REF]
        disk.fill()
        for _ in range(2):
            with pytest.raises(ResourceExhaustedError) as caught:
                client.push(gradient, base={REF: version})
            assert caught.value.reason is Reason.NO_SPACE
            assert client.fetch_blocks([REF]).versions[REF] == version
        shard = status().shards[0]
        disk.free()
        version = client.push(gradient, base={REF: version}).versions[REF]
        assert version == 2
        client.withhold(REF)
        assert status().shards[0].pid == shard.pid, "nothing was restarted for it"
    assert down().unfolded == ()
