"""A service whose bank is in S3, through both clients: real processes, a real server, real kill -9."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from claim_reader import read_claim
from membank.bank_service.cluster import Endpoint, UpConfig, down, status, up
from membank.bank_service.cluster.local_ray import marked_processes
from membank.bank_service.store import open_objects
from membank.client import BankClient, ClientConfig
from membank.wire.errors import DeadlineError, UnavailableError
from membank.wire.spec import Array, BankSpec, BlockRef, LevelSpec
from s3_server import S3Place, make_client

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(300)]

SPEC = BankSpec(
    name="s3",
    num_layers=2,
    width=16,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=4, block_width=4)),
)
TOPIC = BlockRef(1, 1)


def gradients(refs: list[BlockRef]) -> dict[BlockRef, Array]:
    return {ref: np.ones(SPEC.block_shape(ref.level), np.float32) for ref in refs}


def push(client: BankClient, versions: dict[BlockRef, int]) -> dict[BlockRef, int]:
    """Push once to every block; return the versions then."""
    answer = client.push(gradients(list(versions)), base=versions)
    assert not answer.refused
    assert dict(answer.versions) == {ref: version + 1 for ref, version in versions.items()}
    return dict(answer.versions)


def content(client: BankClient) -> dict[BlockRef, tuple[int, int]]:
    blocks = client.fetch_blocks(list(SPEC.blocks()))
    return {ref: (block.version, block.header.crc32c) for ref, block in blocks.items()}


def kill_shard(runtime_dir: Path) -> None:
    os.kill(status(runtime_dir=runtime_dir).shards[0].pid, signal.SIGKILL)


def kill_controller(runtime_dir: Path) -> None:
    os.kill(status(runtime_dir=runtime_dir).controller_pid, signal.SIGKILL)


def files_with(secret: str, folder: Path) -> Iterator[Path]:
    """Yield the files below `folder` that hold a secret."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and secret.encode() in path.read_bytes():
            yield path


def check_no_secret(endpoint: Endpoint, runtime_dir: Path, secret: str) -> None:
    """Assert that logs, notes and command lines do not hold the secret key."""
    assert endpoint.ray_dir is not None
    assert endpoint.ray_mark is not None
    assert list(files_with(secret, Path(endpoint.ray_dir))) == []
    assert list(files_with(secret, runtime_dir)) == []
    pids = marked_processes(endpoint.ray_mark)
    assert len(pids) >= 5
    for pid in pids:
        assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.mark.parametrize("client_library", ["s3", "fsspec+s3"])
def test_a_bank_in_s3_survives_kills_and_restarts(
    s3_place: S3Place, tmp_path: Path, client_library: str
) -> None:
    url = f"{s3_place.url}/bank".replace("s3", client_library, 1)
    runtime_dir = tmp_path / "run"
    config = UpConfig(
        bank_url=url, port=0, runtime_dir=runtime_dir, journal_dir=tmp_path / "journals"
    )
    objects = open_objects(url)
    endpoint = up(config)
    try:
        claim = read_claim(objects)
        assert claim is not None
        assert claim.endpoint == endpoint.address
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
            versions = push(client, dict.fromkeys(SPEC.blocks(), 0))
            weights = {TOPIC: np.full(SPEC.block_shape(1), 0.5, np.float32)}
            client.swap(weights, expected=versions)
            versions[TOPIC] += 1

            kill_shard(runtime_dir)
            versions = push(client, versions)
            kill_controller(runtime_dir)
            # Shards answer without it; operations wait for it.
            versions = push(client, versions)
            client.withhold(TOPIC)
            client.restore(TOPIC)
            again = read_claim(objects)
            assert again is not None
            assert again.service == claim.service, "the controller that came back kept the claim"
            assert again.beat > claim.beat

            versions = client.fetch_blocks(list(SPEC.blocks())).versions
            kill_shard(runtime_dir)
            kill_controller(runtime_dir)
            before = content(client)
            assert {ref: version for ref, (version, _) in before.items()} == versions
        check_no_secret(endpoint, runtime_dir, os.environ["AWS_SECRET_ACCESS_KEY"])
    finally:
        stopped = down(runtime_dir=runtime_dir)
    assert stopped.unfolded == ()
    assert read_claim(objects) is None

    # Nothing but the bucket is needed: another machine has neither journals nor notes.
    elsewhere = UpConfig(
        bank_url=url,
        port=0,
        num_shards=3,
        runtime_dir=tmp_path / "elsewhere",
        journal_dir=tmp_path / "elsewhere" / "journals",
    )
    endpoint = up(elsewhere)
    try:
        with BankClient.connect(endpoint.address) as client:
            assert content(client) == before
            push(client, versions)
    finally:
        down(runtime_dir=elsewhere.runtime_dir)


def test_storage_that_refuses_everything_stops_nothing_for_good(
    s3_place: S3Place, tmp_path: Path
) -> None:
    server = s3_place.server
    user = server.make_user()
    s3_place.set_environment(user)
    make_client(user).create_bucket(Bucket=user.name)
    config = UpConfig(
        bank_url=f"s3://{user.name}/bank",
        port=0,
        runtime_dir=tmp_path / "run",
        journal_dir=tmp_path / "journals",
    )
    endpoint = up(config)
    try:
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
            versions = push(client, dict.fromkeys(SPEC.blocks(), 0))
            server.suspend(user)
            kill_shard(config.runtime_dir)
            # The test's timeout bounds both waits.
            while "UserSuspended" not in status(runtime_dir=config.runtime_dir).shards[0].problem:
                pass
            kill_controller(config.runtime_dir)
            while not answers_that_it_starts(endpoint.address):
                pass
            server.enable(user)
            versions = push(client, versions)
            client.withhold(TOPIC)
    finally:
        down(runtime_dir=config.runtime_dir)


def answers_that_it_starts(address: str) -> bool:
    try:
        BankClient.connect(address, config=ClientConfig(connect_timeout_s=1.0)).close()
    except UnavailableError as err:
        return "starting" in str(err)
    except DeadlineError:
        pass
    return False
