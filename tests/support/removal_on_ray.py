"""A client that plants and trains a topic of a service on Ray, and a look into the service's processes."""

from __future__ import annotations

import os
import subprocess
import sys

from membank.bank_service.cluster import UpConfig, status
from membank.wire.spec import BlockRef
from raw_scan import Finding, marked, needles, scan_process
from removal_service import SPEC

TOPIC = BlockRef(1, 0)
"""What it plants, and trains twice; a snapshot called ``before`` lies between."""

DOOMED = list(SPEC.subtree(TOPIC))
"""The blocks of it."""

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
