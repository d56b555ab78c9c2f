"""kill -9 of every process in turn, while a trainer pushes, an operator swaps and readers read."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.cluster import ServiceStatus, UpConfig, down, status, up
from membank.client import BankClient
from membank.wire.spec import BankSpec, BlockRef, LevelSpec

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

SPEC = BankSpec(
    name="load",
    num_layers=2,
    width=16,
    levels=(LevelSpec(fan_out=4, block_width=4), LevelSpec(fan_out=2, block_width=4)),
)
SWAPPED = [BlockRef(1, cluster) for cluster in range(4)]
PUSHED = [BlockRef(2, cluster) for cluster in range(8)]
NUM_SWAPS = 12
VICTIMS: dict[int, Callable[[ServiceStatus], int]] = {
    # While the swap of this number is under way, this process dies.
    2: lambda found: found.shards[0].pid,
    5: lambda found: found.controller_pid,
    8: lambda found: found.shards[1].pid,
    10: lambda found: found.controller_pid,
}


@pytest.fixture
def config(tmp_path: Path) -> Iterator[UpConfig]:
    config = UpConfig(bank_url=str(tmp_path / "bank"), port=0, runtime_dir=tmp_path / "run")
    yield config
    down(runtime_dir=config.runtime_dir)


def swap_all(client: BankClient, runtime_dir: Path) -> None:
    """Swap all level-1 blocks at once, again and again, each time to another constant."""
    for number in range(1, NUM_SWAPS + 1):
        weights = {ref: np.full(SPEC.block_shape(1), number, np.float32) for ref in SWAPPED}
        expected = dict.fromkeys(SWAPPED, number - 1)
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(client.swap, weights, expected=expected)
            if number in VICTIMS:
                os.kill(VICTIMS[number](status(runtime_dir=runtime_dir)), signal.SIGKILL)
            report = under_way.result()
        assert [change.version_after for change in report.changes] == [number] * len(SWAPPED)


def push_until(client: BankClient, done: threading.Event) -> int:
    """Push to every leaf until `done`; return how often."""
    gradients = {ref: np.ones(SPEC.block_shape(2), np.float32) for ref in PUSHED}
    versions = dict.fromkeys(PUSHED, 0)
    count = 0
    while not done.is_set():
        answer = client.push(gradients, base=versions)
        assert not answer.refused
        versions = dict(answer.versions)
        count += 1
        assert set(versions.values()) == {count}
    return count


def read_until(client: BankClient, done: threading.Event) -> int:
    """Fetch what is swapped until `done`; return the number of fetches, none of them a mixture."""
    count, newest = 0, 0
    while not done.is_set():
        blocks = client.fetch_blocks(SWAPPED)
        versions = {block.version for block in blocks.values()}
        assert len(versions) == 1, f"a fetch mixes versions {versions}"
        (version,) = versions
        assert version >= newest, "a later fetch shows an earlier state"
        newest = version
        if version:
            for block in blocks.values():
                assert block.weight is not None
                assert (block.weight == version).all()
        count += 1
    return count


def test_nothing_is_lost_torn_or_done_twice(config: UpConfig) -> None:
    address = up(config).address
    done = threading.Event()
    with (
        BankClient.connect(address) as operator,
        BankClient.connect(address) as trainer,
        BankClient.connect(address) as reader,
        ThreadPoolExecutor(2) as pool,
    ):
        operator.create_bank(SPEC)
        pushing = pool.submit(push_until, trainer, done)
        reading = pool.submit(read_until, reader, done)
        try:
            swap_all(operator, config.runtime_dir)
        finally:
            done.set()
        num_pushes, num_reads = pushing.result(), reading.result()
        assert num_pushes > NUM_SWAPS
        assert num_reads > NUM_SWAPS

        final = operator.fetch_blocks([*SWAPPED, *PUSHED])
        assert {final.versions[ref] for ref in SWAPPED} == {NUM_SWAPS}
        assert {final.versions[ref] for ref in PUSHED} == {num_pushes}
        swaps = [record for record in operator.audit() if record.operation == "swap"]
        assert len(swaps) == NUM_SWAPS
        assert operator.info().revision == swaps[0].revision
