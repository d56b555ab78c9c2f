"""Two services that want one bank in S3: one gets it, and the other one says so and does not fight."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from claim_reader import read_claim
from command_line import membank
from membank.bank_service.cluster import ServiceStatus, UpConfig, down, list_running, status, up
from membank.bank_service.store import open_objects
from membank.client import BankClient, ClientConfig
from membank.wire.errors import FailedPreconditionError, MembankError, Reason
from membank.wire.spec import BankSpec, BlockRef, LevelSpec
from s3_server import S3Place

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(400)]

SPEC = BankSpec(
    name="shared",
    num_layers=2,
    width=16,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=4, block_width=4)),
)
REFS = [BlockRef(1, cluster) for cluster in range(4)]
IMPATIENT = ClientConfig(timeout_s=5.0)


def push(client: BankClient, version: int) -> None:
    """Push to every topic, all of which have `version`."""
    ones = {ref: np.ones(SPEC.block_shape(1), np.float32) for ref in REFS}
    answer = client.push(ones, base=dict.fromkeys(REFS, version))
    assert set(answer.versions.values()) == {version + 1}


def config_of(url: str, machine: Path) -> UpConfig:
    """Return settings of a service on a machine of its own, as far as disks tell."""
    return UpConfig(
        bank_url=url, port=0, runtime_dir=machine, journal_dir=machine / "journals", lease_s=3.0
    )


def pids(found: ServiceStatus) -> list[int]:
    return [found.controller_pid, *(shard.pid for shard in found.shards)]


@contextmanager
def running(config: UpConfig) -> Iterator[str]:
    address = up(config).address
    try:
        yield address
    finally:
        if list_running(config.runtime_dir):
            down(runtime_dir=config.runtime_dir)


def test_a_second_service_is_told_who_has_the_bank_and_harms_nobody(
    s3_place: S3Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3_place.url}/bank"
    config = config_of(url, tmp_path / "one")
    with running(config) as address, BankClient.connect(address) as client:
        client.create_bank(SPEC)
        push(client, 0)
        # On the same machine, by either client library's URL: found before anything is started.
        monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(config.runtime_dir))
        for same in (url, f"fsspec+{url}", f"{url}/"):
            ended = membank("up", "--bank", same, "--port", "0")
            assert ended.code == 4, ended.err
            assert "BANK_IN_USE" in ended.err
            assert "Traceback" not in ended.err
        # Elsewhere there is no note of the first one, but its claim.
        monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(tmp_path / "two"))
        for same in (url, f"fsspec+{url}"):
            ended = membank("up", "--bank", same, "--port", "0")
            assert ended.code == 4, ended.err
            assert "BANK_IN_USE" in ended.err
            assert address in ended.err.replace("\n", "")
            assert "Traceback" not in ended.err
        assert list_running() == ()
        push(client, 1)
        claim = read_claim(open_objects(url))
        assert claim is not None
        assert claim.endpoint == address
        assert status(runtime_dir=config.runtime_dir).problem == ""
    assert read_claim(open_objects(url)) is None


def test_a_service_that_was_replaced_says_so_and_does_not_fight(
    s3_place: S3Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{s3_place.url}/bank"
    one, two = config_of(url, tmp_path / "one"), config_of(url, tmp_path / "two")
    with running(one) as first, BankClient.connect(first, config=IMPATIENT) as old:
        old.create_bank(SPEC)
        push(old, 0)
        paused = status(runtime_dir=one.runtime_dir)
        # Its machine seems to be lost; then it is not.
        for pid in pids(paused):
            os.kill(pid, signal.SIGSTOP)
        with running(two) as second, BankClient.connect(second) as new:
            # Not consolidated, on another machine: gone with it, as `process` says.
            push(new, 0)
            for pid in pids(paused):
                os.kill(pid, signal.SIGCONT)
            wait_until_replaced(one)
            check_answers_of_replaced(old, second)
            push(new, 1)

            # Ray starts its processes again, which is no reason to open the bank.
            for pid in pids(status(runtime_dir=one.runtime_dir)):
                if pid:
                    os.kill(pid, signal.SIGKILL)
            wait_until_replaced(one)
            check_answers_of_replaced(old, second)
            push(new, 2)
            monkeypatch.setenv("MEMBANK_RUNTIME_DIR", str(one.runtime_dir))
            ended = membank("status")
            assert ended.code == 4, ended.err
            assert second in ended.err.replace("\n", "")

            stopped = down(runtime_dir=one.runtime_dir)
            assert second in stopped.problem
            claim = read_claim(open_objects(url))
            assert claim is not None, "the claim of the other one stays"
            assert claim.endpoint == second
            push(new, 3)
            assert status(runtime_dir=two.runtime_dir).problem == ""
    assert read_claim(open_objects(url)) is None


def wait_until_replaced(config: UpConfig) -> None:
    """Wait until all shards have closed; the test's timeout bounds it."""
    while True:
        try:
            found = status(runtime_dir=config.runtime_dir)
        except MembankError:
            continue  # the controller is being started again
        if found.problem and not any(shard.alive for shard in found.shards):
            return


def check_answers_of_replaced(client: BankClient, endpoint: str) -> None:
    calls = (
        lambda: client.fetch_blocks(REFS),
        lambda: push(client, 1),
        client.stats,
        lambda: client.withhold(REFS[0]),
        client.info,
    )
    for call in calls:
        with pytest.raises(FailedPreconditionError) as caught:
            call()
        assert caught.value.reason is Reason.BANK_IN_USE
        assert caught.value.metadata["endpoint"] == endpoint
