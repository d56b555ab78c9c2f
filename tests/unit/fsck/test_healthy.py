"""Banks that nothing is wrong with: of every kind, after every crash, and while a service is at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.fsck import FindingKind, Severity, check_bank
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import Erase, RestoreEntry, SetContent, SetState
from membank.bank_service.store import LocalObjects, ObjectStore
from membank.wire.spec import BlockState, OptimizerKind
from storage_faults import Crash, FaultPlan, FaultyLogFile, FaultyObjects, StorageFault
from tiny_bank import UnsyncedObjects, create_bank, make_update, tiny_spec
from whole_bank import GONE, HIDDEN, A, B, C, commit, make_whole_bank, take_snapshot, whole_config


def kinds(where: Path | ObjectStore) -> set[FindingKind]:
    objects = LocalObjects(where) if isinstance(where, Path) else where
    return {finding.kind for finding in check_bank(objects).findings}


def is_worse(kind: FindingKind) -> bool:
    return kind.severity is not Severity.NOTE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", list(OptimizerKind))
def test_every_dtype_and_optimizer(tmp_path: Path, dtype: str, kind: OptimizerKind) -> None:
    make_whole_bank(tmp_path, tiny_spec(dtype=dtype, optimizer=kind))
    report = check_bank(LocalObjects(tmp_path))
    assert report.findings == ()
    assert report.checked.num_replayed == 6


def test_a_bank_that_was_never_opened(tmp_path: Path) -> None:
    create_bank(tmp_path)
    report = check_bank(LocalObjects(tmp_path))
    assert report.findings == ()
    assert report.revision == 0


@pytest.mark.slow
def test_every_operation_leaves_a_clean_bank(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    shard = Shard.open(bank, config=whole_config())
    weight = np.ones(bank.spec.block_shape(1), np.float32)
    take_snapshot(shard, bank, [], "empty")
    steps: list[Callable[[], object]] = [
        lambda: shard.push(make_update(shard, [A, B, GONE], "u0")),
        lambda: take_snapshot(shard, bank, [], "one"),
        lambda: commit(shard, bank, [SetContent(ref=A, weight=weight)]),
        lambda: shard.push(make_update(shard, [A], "u1")),
        shard.consolidate,
        lambda: commit(shard, bank, [SetState(ref=HIDDEN, state=BlockState.WITHHELD)]),
        lambda: commit(shard, bank, [Erase(ref=GONE), Erase(ref=B)]),
        lambda: commit(shard, bank, [SetContent(ref=B, weight=weight)]),
        lambda: shard.push(make_update(shard, [B], "u2")),
        # Back to the second snapshot, and to before anything was written.
        lambda: commit(shard, bank, [RestoreEntry(ref=A, manifest=bank.named_manifest(2, 0))]),
        lambda: commit(shard, bank, [RestoreEntry(ref=C, manifest=0)]),
        lambda: bank.delete_snapshot("one"),
        shard.consolidate,
        lambda: shard.close(consolidate=False),
        lambda: Shard.open(bank, config=whole_config()).close(),
    ]
    for number, step in enumerate(steps):
        step()
        assert kinds(tmp_path) == set(), number


def test_a_transaction_that_nobody_decided(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    shard = Shard.open(bank, config=whole_config())
    shard.push(make_update(shard, [A, GONE], "u0"))
    shard.prepare(1, [Erase(ref=GONE), SetState(ref=HIDDEN, state=BlockState.WITHHELD)])
    assert kinds(tmp_path) == {FindingKind.MANIFEST_UNDECIDED}
    shard.close(consolidate=False)
    assert kinds(tmp_path) == {FindingKind.MANIFEST_UNDECIDED}
    shard = Shard.open(bank, config=whole_config())
    shard.settle(1e9)
    assert kinds(tmp_path) == set()
    shard.close()


def _make_until(root: Path, plan: FaultPlan) -> None:
    try:
        make_whole_bank(
            FaultyObjects(UnsyncedObjects(root), plan),
            config=whole_config(root.parent / "journals"),
            open_log_file=lambda path: FaultyLogFile(path, plan),
        )
    except Crash:
        plan.happened = True


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_crash_at_any_call_is_no_damage(tmp_path: Path) -> None:
    at, seen = 0, set()
    while True:
        at += 1
        folder = tmp_path / str(at)
        plan = FaultPlan(StorageFault.CRASH_BEFORE, at)
        _make_until(folder / "bank", plan)
        if not plan.happened:
            break
        if (folder / "bank" / "bank.json").exists():
            journals = folder / "journals"
            report = check_bank(LocalObjects(folder / "bank"), journal_dir=journals)
            seen |= {finding.kind for finding in report.findings}
            assert not report.has_damage, (at, report.findings)
    # What crashes do leave was met, so that the sweep shows something.
    assert {FindingKind.SLOT_UNNAMED, FindingKind.JOURNAL_TORN} <= seen
    assert {kind for kind in seen if is_worse(kind)} == {FindingKind.REMOVAL_UNFINISHED}
    assert at > 100


class BusyObjects(LocalObjects):
    """A directory in which a service does something just before some of the reads.

    Parameters
    ----------
    root
        The directory.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.num_reads = 0
        self.work: Callable[[int], None] = lambda number: None

    def get(self, key: str) -> bytes:
        self._work()
        return super().get(key)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        self._work()
        return super().get_range(key, start, end)

    def list(self, prefix: str) -> list[str]:
        self._work()
        return super().list(prefix)

    def _work(self) -> None:
        self.num_reads += 1
        self.work(self.num_reads)


class Service:
    """A shard that does a lot whenever it is told to."""

    def __init__(self, root: Path) -> None:
        self.bank = create_bank(root)
        # Keeps as little as it may, so that objects vanish as soon as they can.
        config = ShardConfig(segment_bytes=600, retained_revisions=1)
        self.shard = Shard.open(self.bank, config=config)
        self._rounds = 0

    def work(self, names: Sequence[str] = ("push", "swap", "push", "fold", "push")) -> None:
        """Do some steps."""
        for name in names:
            self._rounds += 1
            match name:
                case "push":
                    self.shard.push(make_update(self.shard, [A, B, C], f"r{self._rounds}"))
                case "swap":
                    shape = self.bank.spec.block_shape(1)
                    weight = np.full(shape, self._rounds, np.float32)
                    commit(self.shard, self.bank, [SetContent(ref=A, weight=weight)])
                case "fold":
                    self.shard.consolidate()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("deep", [True, False])
def test_a_service_that_works_between_any_two_reads(tmp_path: Path, deep: bool) -> None:
    service = Service(tmp_path)
    service.work()
    service.work()
    busy = BusyObjects(tmp_path)
    check_bank(busy, deep=deep)
    num_reads = busy.num_reads
    assert num_reads > 20
    for at in range(1, num_reads + 1):
        busy.num_reads = 0
        busy.work = lambda number, at=at: service.work() if number == at else None  # type: ignore[misc]  # mypy does not infer lambdas with defaults
        report = check_bank(busy, deep=deep)
        assert report.is_clean, (at, report.findings)
    service.shard.close()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_service_that_never_rests(tmp_path: Path) -> None:
    service = Service(tmp_path)
    service.work()
    busy = BusyObjects(tmp_path)
    for every in (5, 7, 11, 17):
        busy.work = lambda number, every=every: (  # type: ignore[misc]  # as above
            None if number % every else service.work(["push", "fold"])
        )
        report = check_bank(busy)
        assert report.is_clean, (every, report.findings)
    service.shard.close()
