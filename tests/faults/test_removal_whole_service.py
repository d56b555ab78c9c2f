"""A whole service on Ray: after the acknowledgement of a delete, no process that served it has a trace.

What Ray itself keeps, outside of those processes, is out of reach, and docs/deletion.md says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from membank.bank_service.cluster import Endpoint, UpConfig, down, status, up
from membank.client import BankClient
from membank.wire.spec import BlockRef
from raw_scan import Finding, marked, needles, scan_files, scan_process
from removal_service import SPEC

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

TOPIC = BlockRef(1, 0)
DOOMED = list(SPEC.subtree(TOPIC))

# Not the process of the tests: what it maps of a shard's memory, and what a shard maps of its own, would
# be found there as well.
_TRAINER = """
import sys
from membank.client import BankClient
from membank.wire.spec import BlockRef
from raw_scan import marked
from removal_service import SPEC

refs = list(SPEC.subtree(BlockRef(1, 0)))
with BankClient.connect(sys.argv[1]) as bank:
    with bank.transaction() as tx:
        for number, ref in enumerate(refs):
            tx.swap(ref, marked(SPEC.block_shape(ref.level), 100 + number))
    base = bank.fetch_blocks(refs).versions
    for step in range(2):
        gradients = {
            ref: marked(SPEC.block_shape(ref.level), 200 + number, scale=0.01)
            for number, ref in enumerate(refs)
        }
        base = bank.push(gradients, base=base).versions
        if step == 0:
            bank.snapshot("before")
    # What it made of them, for whoever looks for that.
    for ref, weight in bank.fetch_blocks(refs).weights.items():
        print(*ref, weight.reshape(-1)[:16].tobytes().hex(), flush=True)
"""


@pytest.fixture
def service(tmp_path: Path) -> Iterator[tuple[UpConfig, Endpoint]]:
    config = UpConfig(bank_url=str(tmp_path / "bank"), port=0, runtime_dir=tmp_path / "run")
    endpoint = up(config)
    try:
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(SPEC)
        yield config, endpoint
    finally:
        down(runtime_dir=config.runtime_dir)


def train(address: str) -> dict[str, bytes]:
    """Have a client swap and train the topic; return what to look for."""
    said = subprocess.run(
        [sys.executable, "-c", _TRAINER, address],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    wanted: dict[str, bytes] = {}
    for number, ref in enumerate(DOOMED):
        shape = SPEC.block_shape(ref.level)
        wanted |= needles(f"swapped weight of {ref}", marked(shape, 100 + number))
        wanted |= needles(f"gradient of {ref}", marked(shape, 200 + number, scale=0.01))
    for line in said.splitlines():
        level, cluster, period = line.split()
        wanted |= needles(f"trained weight of {level}/{cluster}", bytes.fromhex(period))
    return wanted


def scan_service(config: UpConfig, wanted: dict[str, bytes]) -> list[Finding]:
    """Look through the memory of shards and controller."""
    found = status(runtime_dir=config.runtime_dir)
    pids = [shard.pid for shard in found.shards] + [found.controller_pid]
    # Not stopped: Ray would take one that is for dead. Nobody calls them, so nothing moves.
    return [finding for pid in pids for finding in scan_process(pid, wanted)]


def test_no_process_of_the_service_has_a_trace(
    service: tuple[UpConfig, Endpoint], tmp_path: Path
) -> None:
    config, endpoint = service
    wanted = train(endpoint.address)
    before = scan_service(config, wanted)
    assert {finding.name for finding in before} == set(wanted)
    stored = {finding.name for finding in scan_files(tmp_path, wanted)}
    assert {name for name in wanted if "gradient" in name} <= stored
    with BankClient.connect(endpoint.address) as client:
        others = [ref for ref in SPEC.blocks() if ref not in DOOMED]
        kept = {r: w.tobytes() for r, w in client.fetch_blocks(others).weights.items()}
        client.delete(TOPIC)
        assert scan_files(tmp_path, wanted) == []
        assert scan_service(config, wanted) == []
        blocks = client.fetch_blocks(list(SPEC.blocks()))
        assert {r: w.tobytes() for r, w in blocks.weights.items()} == kept
