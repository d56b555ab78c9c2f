"""Processes that are killed while they share memory: the other one goes on, and nothing is left."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.cluster.shard_server import ShardServer
from membank.client import BankClient, ClientConfig, RetryConfig
from membank.wire.errors import DeadlineError, UnavailableError
from membank.wire.spec import BankSpec, BlockRef, LevelSpec
from served_bank import ServedBank

SPEC = BankSpec(
    name="kills",
    num_layers=4,
    width=64,
    levels=(LevelSpec(fan_out=2, block_width=256),),
    num_partitions=2,
)
REF = BlockRef(1, 0)
# Processes are started, which takes a while on a busy machine.
pytestmark = pytest.mark.timeout(240)
TIMEOUT_S = 20.0
SUPPORT = Path(__file__).parents[1] / "support"

_HOLDER = """
import sys
from membank.client import BankClient
from membank.client.transport import same_host_connection as connection
from membank.wire.spec import BlockRef

def stop_in_the_middle(target, source):
    print("holding", flush=True)
    sys.stdin.read()

connection.copy_checked = stop_in_the_middle
BankClient.connect(sys.argv[1]).fetch_blocks([BlockRef(1, 0)])
"""

_SHARDS = """
import sys
from pathlib import Path
from served_bank import ServedBank
from test_same_host_kills import SPEC

with ServedBank(Path(sys.argv[1]), SPEC) as served:
    print(served.endpoint, flush=True)
    sys.stdin.read()
"""


@contextmanager
def child(script: str, argument: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run a script in a process of its own; yield it and its first line."""
    folders = os.pathsep.join((str(SUPPORT), str(Path(__file__).parent)))
    process = subprocess.Popen(
        [sys.executable, "-c", script, argument],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": folders},
    )
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        if process.stdin is not None:
            process.stdin.close()


def memory_files() -> set[str]:
    """Return the anonymous memory that this process has open or mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = {line.split(" ", 1)[0] for line in maps if "memfd:membank" in line}
    folder = Path("/proc/self/fd")
    opened = {name for name in os.listdir(folder) if "memfd:membank" in _target(folder / name)}
    return mapped | opened


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # closed meanwhile
        return ""


def wait_for_end(shard: ShardServer) -> None:
    """Wait until no caller is connected."""
    door = shard._door
    assert door is not None
    for connection in list(door._connections):
        connection.join(TIMEOUT_S)
    assert door.num_connections == 0


def test_a_client_that_is_killed_while_it_reads_leaves_nothing(tmp_path: Path) -> None:
    with ServedBank(tmp_path / "bank", SPEC) as served:
        owner = served.shards[SPEC.partition_of(REF) % 2]
        assert owner._door is not None
        budget = owner._door._calls._budget
        with child(_HOLDER, served.endpoint) as (process, said):
            assert said == "holding"
            assert budget.used_bytes == SPEC.weight_bytes(1)
            process.kill()
            process.wait()
            wait_for_end(owner)
        assert budget.used_bytes == 0
        with BankClient.connect(served.endpoint) as client:
            assert client.fetch_blocks([REF])[REF].weight is not None
            assert client.same_host_stats.fallbacks == {}


def test_a_shard_that_is_killed_takes_its_memory_along(tmp_path: Path) -> None:
    before = memory_files()
    config = ClientConfig(timeout_s=TIMEOUT_S, retry=RetryConfig(max_attempts=2))
    with child(_SHARDS, str(tmp_path / "bank")) as (process, endpoint):
        client = BankClient.connect(endpoint, config=config)
        first = client.fetch_blocks([REF])[REF]
        assert client.same_host_stats.num_fetches == 1
        assert memory_files() != before
        process.kill()
        process.wait()
        with pytest.raises((UnavailableError, DeadlineError)):
            client.fetch_blocks([REF])
        gradient = np.zeros(SPEC.block_shape(1), np.float32)
        with pytest.raises((UnavailableError, DeadlineError)):
            client.push({REF: gradient}, base={REF: 0})
        client.close()
    # What was fetched is the client's own, and nothing of the shard's is mapped any more.
    assert first.weight is not None
    assert np.isfinite(first.weight).all()
    del client
    gc.collect()
    assert memory_files() == before
