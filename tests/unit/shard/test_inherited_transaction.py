"""A transaction that one owner prepared and the next one sees committed: whose journal goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import Prepared, SetContent
from membank.bank_service.store import Bank
from membank.wire.spec import BlockRef
from storage_faults import Crash, FaultPlan, FaultyLogFile, FaultyObjects, StorageFault
from tiny_bank import (
    State,
    UnsyncedObjects,
    commit_record,
    create_bank,
    full_state,
    make_update,
    tiny_spec,
)

A, B = BlockRef(1, 0), BlockRef(1, 1)
WEIGHT = np.ones(tiny_spec().block_shape(1), np.float32)


class Story:
    """A bank whose owners die; `journals` is where they keep their journals, None = with the bank."""

    def __init__(self, root: Path, *, apart: bool, retained_revisions: int = 8) -> None:
        self.root = root / "bank"
        create_bank(self.root)
        self.config = ShardConfig(
            hold_wait_s=0,
            journal_dir=str(root / "journals") if apart else None,
            lease_s=0,
            retained_revisions=retained_revisions,
        )

    @property
    def bank(self) -> Bank:
        return Bank.open(UnsyncedObjects(self.root))

    def open(self) -> Shard:
        return Shard.open(self.bank, config=self.config)

    def prepare(self) -> Prepared:
        """Let an owner prepare and die."""
        shard = self.open()
        shard.push(make_update(shard, [A, B], "u0"))
        prepared = shard.prepare(1, [SetContent(ref=A, weight=WEIGHT)], all_partitions=True)
        shard.close(consolidate=False)
        return prepared

    def decide(self, prepared: Prepared) -> None:
        self.bank.decide(commit_record(self.bank, 1, prepared))

    def check(self, shard: Shard) -> None:
        """Let the owner see the commit, go on, and be followed by others that miss nothing."""
        bank = self.bank
        record = bank.record(1)
        assert record is not None
        shard.commit(record)
        for number in range(3):
            shard.push(make_update(shard, [A, B], f"after-{number}"))
            state = full_state(shard)
            assert state[A][0] == 3 + number
            shard.close(consolidate=False)
            shard = self.open()
            assert full_state(shard) == state
            if number == 1:
                shard.consolidate()
        shard.close()


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("decided_first", [True, False])
@pytest.mark.parametrize("retained_revisions", [1, 8])
def test_what_is_acknowledged_after_the_commit_is_kept(
    tmp_path: Path, *, apart: bool, decided_first: bool, retained_revisions: int
) -> None:
    story = Story(tmp_path, apart=apart, retained_revisions=retained_revisions)
    prepared = story.prepare()
    if decided_first:
        story.decide(prepared)
    shard = story.open()
    if not decided_first:
        story.decide(prepared)
    story.check(shard)


@pytest.mark.parametrize("num_owners", [1, 3])
def test_however_many_owners_see_it_undecided(tmp_path: Path, num_owners: int) -> None:
    story = Story(tmp_path, apart=False)
    prepared = story.prepare()
    for _ in range(num_owners):
        story.open().close(consolidate=False)
    story.decide(prepared)
    story.check(story.open())


@pytest.mark.slow
@pytest.mark.parametrize("fault", [StorageFault.CRASH_BEFORE, StorageFault.CRASH_AFTER])
@pytest.mark.parametrize("committed", [True, False])
def test_wherever_the_next_owner_dies_while_it_opens(
    tmp_path: Path, fault: StorageFault, *, committed: bool
) -> None:
    at = 0
    while True:
        at += 1
        story = Story(tmp_path / str(at), apart=True)
        prepared = story.prepare()
        plan = FaultPlan(fault, at)
        bank = Bank.open(FaultyObjects(UnsyncedObjects(story.root), plan))
        try:
            shard = Shard.open(
                bank,
                config=story.config,
                open_log_file=lambda path, plan=plan: FaultyLogFile(path, plan),  # type: ignore[misc]
            )
            shard.close(consolidate=False)
        except Crash:
            pass
        if not plan.happened:
            break
        if committed:
            story.decide(prepared)
            story.check(story.open())
        else:
            shard = story.open()
            shard.abort(1)
            state = full_state(shard)
            assert state[A][0] == 1
            shard.push(make_update(shard, [A], "after"))
            state = full_state(shard)
            shard.close(consolidate=False)
            shard = story.open()
            assert full_state(shard) == state
            shard.close()
    assert at > 5


def test_the_owner_that_commits_it_does_not_take_itself_for_a_stranger(tmp_path: Path) -> None:
    story = Story(tmp_path, apart=True)
    story.config = ShardConfig(hold_wait_s=0, journal_dir=str(tmp_path / "journals"), lease_s=5.0)
    prepared = story.prepare()
    now = [0.0]
    shard = Shard.open(
        story.bank, config=story.config, clock=lambda: now[0], sleep=lambda seconds: None
    )
    story.decide(prepared)
    record = story.bank.record(1)
    assert record is not None
    shard.commit(record)
    # The lease has run out, so the storage is asked who owns the partition.
    now[0] = 100.0
    assert shard.push(make_update(shard, [A], "after")).results[0].accepted
    shard.consolidate()
    newest: State = full_state(shard)
    shard.close()
    shard = Shard.open(story.bank, config=story.config, sleep=lambda seconds: None)
    assert full_state(shard) == newest
    shard.close()
