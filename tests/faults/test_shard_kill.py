"""kill -9 of a process that pushes: nothing acknowledged is lost, nothing is applied twice."""

from __future__ import annotations

import multiprocessing
import random
import signal
from pathlib import Path

import pytest

from killed_pusher import REFS, numbered_update, open_shard, push_until_killed
from storage_faults import FaultPlan, StorageFault
from tiny_bank import create_bank, full_state

NUM_KILLS = 20


def _run_child(root: Path, first: int, fault: StorageFault, kill_at: int) -> tuple[list[int], int]:
    """Return the numbers that a child acknowledged before it was killed, and how it ended."""
    # A server that has imported torch once and forks; the children are processes like any other.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["membank.bank_service.shard"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(
        target=push_until_killed, args=(root, first, 1000, fault, kill_at, theirs)
    )
    child.start()
    theirs.close()
    acknowledged = []
    try:
        while True:
            acknowledged.append(ours.recv())
    except EOFError:
        child.join()
    ours.close()
    assert child.exitcode is not None
    return acknowledged, child.exitcode


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_twenty_kills(tmp_path: Path) -> None:
    rng = random.Random(20)
    bank = create_bank(tmp_path / "bank")
    next_number = 0
    for _ in range(NUM_KILLS):
        fault = rng.choice([StorageFault.CRASH_BEFORE, StorageFault.CRASH_AFTER])
        acknowledged, exit_code = _run_child(
            tmp_path / "bank", next_number, fault, rng.randint(1, 60)
        )
        assert exit_code == -signal.SIGKILL
        # A client repeats what was not acknowledged, with the same request id.
        next_number += len(acknowledged)

    shard = open_shard(tmp_path / "bank", FaultPlan())
    versions = {status.version for status in shard.describe(REFS)}
    assert all(next_number <= version <= next_number + 1 for version in versions)
    shard.push(numbered_update(bank.spec, next_number))
    found = full_state(shard)
    shard.close()

    undisturbed = create_bank(tmp_path / "undisturbed")
    twin = open_shard(tmp_path / "undisturbed", FaultPlan())
    for number in range(next_number + 1):
        twin.push(numbered_update(undisturbed.spec, number))
    assert found == full_state(twin)
    assert next_number > NUM_KILLS
    twin.close()
