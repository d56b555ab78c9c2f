"""A shard that fails at any moment: no acknowledged change is lost, none is made twice.

A script of updates and transactions is run with one fault at the k-th mutating call, for every
k. Whatever was interrupted is then retried, as clients and the coordinator do, the rest follows, and
the end must be the same, to the byte, as without the fault.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import (
    BlockOperation,
    Erase,
    RestoreEntry,
    SetContent,
    SetState,
)
from membank.bank_service.store import Bank
from membank.wire.errors import ConflictError, MembankError
from membank.wire.records import Gradient, Update
from membank.wire.spec import BlockRef, BlockState, Role
from storage_faults import Crash, FaultPlan, FaultyLogFile, FaultyObjects, StorageFault
from tiny_bank import (
    State,
    UnsyncedObjects,
    commit_record,
    create_bank,
    file_bytes,
    full_state,
    gradient_for,
    tiny_spec,
)

A, B, C, LEAF = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2), BlockRef(2, 5)
MARKER = np.float32(1.2345678)
SECRET = np.full(tiny_spec().block_shape(1), MARKER, np.float32)
SECRET_CONTENT = SetContent(
    ref=A, weight=SECRET, optimizer_state={Role.EXP_AVG: SECRET, Role.EXP_AVG_SQ: SECRET}
)
PATTERN = MARKER.tobytes() * 4


@dataclass(frozen=True)
class Push:
    """Update blocks from the versions they have when the step begins."""

    name: str
    refs: tuple[BlockRef, ...]
    secret: bool = False


@dataclass(frozen=True)
class Transact:
    """Run a transaction; `pin` names every partition in its record."""

    name: str
    operations: Callable[[Bank], Sequence[BlockOperation]]
    pin: bool = False


@dataclass(frozen=True)
class Consolidate:
    """Fold the journals."""


def _restore(bank: Bank) -> list[BlockOperation]:
    # To the first revision that pinned everything.
    pinned = next(
        number
        for number in range(1, bank.latest_number() + 1)
        if (record := bank.record(number)) is not None and len(record.manifests) == 2
    )
    return [
        RestoreEntry(ref=ref, manifest=bank.named_manifest(pinned, bank.spec.partition_of(ref)))
        for ref in (A, B, C)
    ]


SCRIPT: tuple[Push | Transact | Consolidate, ...] = (
    Push("u0", (A, B, LEAF)),
    Transact("pin", lambda _: [], pin=True),
    Push("u1", (A, C), secret=True),
    Consolidate(),
    Push("u2", (A, B)),
    Transact("swap", lambda _: [SECRET_CONTENT, SetState(ref=B, state=BlockState.WITHHELD)]),
    Push("u3", (A, C, LEAF)),
    Transact("restore", _restore),
    Push("u4", (B, C)),
    Transact("erase", lambda _: [Erase(ref=A), Erase(ref=C)]),
    Push("u5", (B, LEAF)),
    Transact("import", lambda _: [SetContent(ref=C, weight=SECRET * 2, step=3)]),
    Push("u6", (B, C)),
)


class Runner:
    """Runs the script against a bank, over and over the step that was interrupted."""

    def __init__(self, root: Path, plan: FaultPlan) -> None:
        self._root = root
        self.plan = plan
        self._step = 0
        self._bases: dict[str, dict[BlockRef, int]] = {}

    def run(self) -> None:
        """Open the bank and run the steps that are left."""
        with self._opened() as (bank, shard):
            while self._step < len(SCRIPT):
                self._run_step(bank, shard, SCRIPT[self._step])
                self._step += 1

    def state(self) -> State:
        """Return everything in the bank, after a restart."""
        with self._opened() as (_, shard):
            return full_state(shard)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Bank, Shard]]:
        bank = Bank.open(FaultyObjects(UnsyncedObjects(self._root), self.plan))
        # Small segments and thresholds, so that every kind of call happens often.
        config = ShardConfig(
            journal_dir=str(self._root / "journals"),
            segment_bytes=1500,
            consolidate_bytes=4000,
            retained_revisions=3,
            hold_wait_s=0,
        )
        shard = Shard.open(
            bank, config=config, open_log_file=lambda path: FaultyLogFile(path, self.plan)
        )
        try:
            # A coordinator that starts again settles what its predecessor left.
            shard.settle(math.inf)
            yield bank, shard
        finally:
            shard.close(consolidate=False)

    def _run_step(self, bank: Bank, shard: Shard, step: Push | Transact | Consolidate) -> None:
        match step:
            case Push():
                shard.push(self._update(shard, step))
            case Consolidate():
                shard.consolidate()
            case Transact():
                self._transact(bank, shard, step)

    def _update(self, shard: Shard, step: Push) -> Update:
        if step.name not in self._bases:
            found = shard.describe(step.refs)
            self._bases[step.name] = {status.ref: status.version for status in found}
        seed = SCRIPT.index(step)
        return Update(
            request_id=step.name,
            step=seed,
            gradients=tuple(
                Gradient(
                    ref=ref,
                    base_version=base,
                    values=SECRET if step.secret else gradient_for(shard.spec, ref, seed),
                )
                for ref, base in self._bases[step.name].items()
            ),
        )

    def _transact(self, bank: Bank, shard: Shard, step: Transact) -> None:
        for number in range(1, bank.latest_number() + 1):
            record = bank.record(number)
            if record is not None and record.committed and record.operation == step.name:
                shard.commit(record)  # it was decided before the interruption
                return
        revision = bank.latest_number() + 1
        try:
            prepared = shard.prepare(revision, step.operations(bank), all_partitions=step.pin)
        except MembankError:
            shard.abort(revision)
            raise
        record = commit_record(bank, revision, prepared)
        try:
            shard.commit(bank.decide(replace(record, operation=step.name)))
        except ConflictError:
            shard.abort(revision)
            raise


@cache
def _expected() -> tuple[State, int]:
    """Return the end of the script without a fault, and how many mutating calls it takes."""
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Path(folder), FaultPlan())
        create_bank(Path(folder))
        runner.run()
        num_calls = runner.plan.num_calls
        return runner.state(), num_calls


def _run_with_fault(root: Path, fault: StorageFault, at: int) -> None:
    """Run the script with one fault, retry, and compare the end with the undisturbed one."""
    expected, _ = _expected()
    create_bank(root)
    plan = FaultPlan(fault, at)
    runner = Runner(root, plan)
    for _attempt in range(3):
        try:
            runner.run()
        except Crash:
            runner.plan = FaultPlan()  # the next process has no fault
        except MembankError:
            assert plan.happened
        else:
            break
    else:
        pytest.fail(f"three attempts after {fault.name} at call {at} were not enough")
    assert plan.happened, f"call {at} never came"
    found = runner.state()
    assert found == expected, f"{fault.name} at call {at}"
    # A was erased for good: no file may hold its content, whenever the process died.
    assert not [name for name, data in file_bytes(root).items() if PATTERN in data]


def test_the_script_without_a_fault(tmp_path: Path) -> None:
    expected, num_calls = _expected()
    assert num_calls > 100
    assert expected[A][1] == BlockState.DELETED
    assert expected[C][1] == BlockState.ACTIVE
    assert expected[B][0] > 3


@pytest.mark.parametrize("fault", StorageFault)
@pytest.mark.parametrize("part", [1, 2, 3])
def test_a_sample_of_the_moments(tmp_path: Path, fault: StorageFault, part: int) -> None:
    _, num_calls = _expected()
    _run_with_fault(tmp_path, fault, num_calls * part // 4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", StorageFault)
def test_every_moment(tmp_path: Path, fault: StorageFault) -> None:
    _, num_calls = _expected()
    for at in range(1, num_calls + 1):
        _run_with_fault(tmp_path / str(at), fault, at)
