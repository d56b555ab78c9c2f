"""kill -9 at every step of a swap and of a delete: wholly done, or wholly undone.

The steps are recorded in a run that is not killed, and each of them is then the last one of a process:
coordinator and shards die together, where they stand. Whoever opens the bank next settles it. Where
the delete is done, no file holds a trace of the content, at whatever step that was.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from campaign_service import preloaded_context
from membank.bank_service.fsck import Severity, check_bank
from membank.bank_service.store import LocalObjects
from membank.wire.format import decode_tree
from membank.wire.spec import BlockRef, BlockState
from raw_scan import scan_files
from removal_failpoints import (
    DOOMED,
    OPERATIONS,
    TOPIC,
    TOPICS,
    Service,
    Step,
    make_bank,
    play,
    push_last,
    served,
    steps_told,
)
from shard_rig import RIG_SPEC

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMMIT = "create revisions/N.json"
NAMED = {
    "swap": {
        "tell shard-N to prepare",
        "create partitions/N/level-N/weight/c.N.N.N.N.N",
        "sync slots",
        "create partitions/N/manifests/N",
        "hear that shard-N has prepared",
        COMMIT,
        "tell shard-N to commit",
        "hear that shard-N has committed",
        "answer",
    },
}
NAMED["delete"] = NAMED["swap"] - {
    "create partitions/N/level-N/weight/c.N.N.N.N.N",
    "sync slots",
} | {
    "create partitions/N/level-N/exp_avg/c.N.N.N.N.N",
    "write trees/N.safetensors",
    "remove partitions/N/level-N/weight/c.N.N.N.N.N",
    "write partitions/N/manifests/N",
    "open a segment",
    "write the rest to a segment",
    "rename .log of a journal",
    "unlink .spare of a journal",
    "remove trees/N.safetensors",
}
"""Steps that there must be, by the names of their kind; that there are more is no fault."""


@dataclass(frozen=True)
class Before:
    """The bank that is killed, over and over."""

    root: Path
    wanted: dict[str, bytes]
    weights: dict[BlockRef, bytes]
    context: ForkServerContext

    @contextmanager
    def killed(
        self, folder: Path, operation: str, at: Step | None
    ) -> Iterator[tuple[Path, list[Step]]]:
        """Run an operation on a copy of the bank; yield the copy, and the steps that there were."""
        root, told = folder / "bank", folder / "told"
        shutil.copytree(self.root, root)
        process = self.context.Process(target=play, args=(root, operation, at, told), daemon=True)
        process.start()
        process.join(60)
        assert process.exitcode == (0 if at is None else -signal.SIGKILL)
        yield root, steps_told(told)
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Before:
    root = tmp_path_factory.mktemp("before") / "bank"
    wanted = make_bank(root)
    copy = Path(shutil.copytree(root, root.with_name("copy")))
    with served(copy) as service:
        push_last(service)
        weights = service.weights()
    return Before(root, wanted, weights, preloaded_context())


def is_done(before: Before, operation: str, service: Service) -> bool:
    """Say whether it is done, having made sure that it is wholly done or wholly undone."""
    found = service.weights()
    changed = DOOMED if operation == "delete" else TOPICS
    others = [ref for ref in RIG_SPEC.blocks() if ref not in changed]
    assert {r: found[r] for r in others} == {r: before.weights[r] for r in others}
    done = service.log.find("the request") is not None
    old = {ref: before.weights[ref] for ref in changed}
    now = {ref: found[ref] for ref in changed if ref in found}
    states = {s.state for r in changed for s in service.owner(r).describe([r])}
    if not done:
        assert now == old
        assert states == {BlockState.ACTIVE}
    elif operation == "delete":
        assert now == {}
        assert states == {BlockState.DELETED}
    else:
        assert now.keys() == old.keys()
        assert all(now[ref] != old[ref] for ref in changed)
    return done


def check_files(before: Before, operation: str, root: Path, *, done: bool) -> None:
    """Look through all files, and have the check of banks judge them."""
    if operation == "delete":
        found = scan_files(root, before.wanted)
        assert bool(found) is not done, found
        (tree,) = LocalObjects(root).list("trees")
        labels = decode_tree(LocalObjects(root).get(tree), key=tree).labels
        assert (TOPIC in labels) is not done
    faults = [
        finding
        for finding in check_bank(LocalObjects(root), deep=True).findings
        if finding.severity is not Severity.NOTE
    ]
    assert faults == []


def kill_at(before: Before, folder: Path, operation: str, at: Step) -> None:
    """Kill at one step, recover, and look; then finish it, and look again."""
    with before.killed(folder, operation, at) as (root, steps):
        assert steps[-1] == at
        with served(root) as service:
            done = is_done(before, operation, service)
            # The record decides: before it is created nothing has happened, after it all has.
            assert done is (COMMIT in {step.name for step in steps[:-1]}), at
            check_files(before, operation, root, done=done)
            service.run(operation)
            assert is_done(before, operation, service)
        check_files(before, operation, root, done=True)
        # And so it stays.
        with served(root) as service:
            assert is_done(before, operation, service)


def steps_of(before: Before, folder: Path, operation: str) -> list[Step]:
    """Return the steps of an operation that nobody kills."""
    with before.killed(folder, operation, None) as (root, steps):
        with served(root) as service:
            assert is_done(before, operation, service)
        check_files(before, operation, root, done=True)
        return steps


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_step(before: Before, tmp_path: Path, operation: str) -> None:
    steps = steps_of(before, tmp_path, operation)
    assert {step.name for step in steps} >= NAMED[operation]
    for at in steps:
        kill_at(before, tmp_path, operation, at)
