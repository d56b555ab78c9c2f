"""A process that pushes updates to a shard until it is killed; the body of a test's child."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.store import Bank
from membank.wire.records import Gradient, Update
from membank.wire.spec import BankSpec, BlockRef
from storage_faults import FaultPlan, FaultyLogFile, FaultyObjects, KillPlan, StorageFault
from tiny_bank import UnsyncedObjects, gradient_for

REFS = (BlockRef(1, 0), BlockRef(1, 1), BlockRef(2, 5))
"""What every update touches; blocks of both partitions."""


def numbered_update(spec: BankSpec, number: int) -> Update:
    """Return the update of this number, from 0; it moves every block from version `number`."""
    return Update(
        request_id=f"u{number}",
        step=number,
        gradients=tuple(
            Gradient(ref=ref, base_version=number, values=gradient_for(spec, ref, number))
            for ref in REFS
        ),
    )


def open_shard(root: Path, plan: FaultPlan) -> Shard:
    """Open the bank in `root` with the faults of `plan`."""
    bank = Bank.open(FaultyObjects(UnsyncedObjects(root), plan))
    config = ShardConfig(
        journal_dir=str(root / "journals"), consolidate_bytes=6000, segment_bytes=3000
    )
    return Shard.open(bank, config=config, open_log_file=lambda path: FaultyLogFile(path, plan))


def push_until_killed(
    root: Path, first: int, count: int, fault: StorageFault, kill_at: int, acks: Connection
) -> None:
    """Push `count` updates from number `first`, telling of each acknowledgement through `acks`.

    Parameters
    ----------
    root
        Directory of the bank.
    first, count
        Which updates.
    fault
        Whether the kill comes in the middle of a mutating call or after it.
    kill_at
        Number of the mutating call at which the process kills itself.
    acks
        Gets the number of each acknowledged update.
    """
    shard = open_shard(root, KillPlan(fault, kill_at))
    for number in range(first, first + count):
        result = shard.push(numbered_update(shard.spec, number))
        if not all(found.accepted for found in result.results):
            raise AssertionError(f"update {number} was refused: {result}")
        acks.send(number)
    shard.close()
