"""What is needed of a partition's history: by the rules, and on a shard that keeps changing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import RestoreEntry, SetContent
from membank.bank_service.shard.retention import Chain, Retention, StoredManifest
from membank.bank_service.shard.slot_sets import members, names_of, slot_set, tops, union, without
from membank.bank_service.store import Bank
from membank.wire.errors import NotFoundError
from membank.wire.format import NO_SLOT, RevisionRecord
from membank.wire.records import Snapshot
from membank.wire.spec import BlockRef
from tiny_bank import State, commit_record, create_bank, full_state, make_update, transact

A, B = BlockRef(1, 0), BlockRef(1, 1)


def stored(number: int, revision: int, *, prepared: bool = False) -> StoredManifest:
    return StoredManifest(
        number=number,
        revision=revision,
        prepared=prepared,
        history_from=0,
        slots=slot_set([]),
    )


@st.composite
def chains(draw: st.DrawFn) -> list[StoredManifest]:
    """A partition's counting manifests: now a fold, now a commit, now others' commits alone."""
    revision, found = 0, []
    steps = draw(st.lists(st.sampled_from(["fold", "commit", "elsewhere"]), max_size=20))
    for number, step in enumerate(steps, start=1):
        revision += step != "fold"
        if step != "elsewhere":
            found.append(stored(number, revision, prepared=step == "commit"))
    return found


def number_of(manifest: StoredManifest | None) -> int:
    return 0 if manifest is None else manifest.number


@given(chains(), st.integers(0, 20))
def test_end_and_beginning_are_the_newest_up_to_a_revision(
    manifests: list[StoredManifest], revision: int
) -> None:
    chain = Chain(manifests)
    until = [m for m in manifests if m.revision <= revision]
    ends = [m.number for m in until]
    beginnings = [m.number for m in until if m.prepared]
    assert number_of(chain.end_of(revision)) == max(ends, default=0)
    assert number_of(chain.beginning_of(revision)) == max(beginnings, default=0)


@given(chains(), st.integers(0, 20), st.lists(st.integers(0, 20), max_size=3))
def test_what_is_not_needed_changes_no_retained_revision(
    manifests: list[StoredManifest], history_from: int, pinned: list[int]
) -> None:
    whole = Chain(manifests)
    needed = whole.needed(history_from, pinned)
    left = Chain(m for m in manifests if m.number in needed)
    for revision in {*range(history_from, 22), *pinned}:
        assert number_of(left.end_of(revision)) == number_of(whole.end_of(revision))
        assert number_of(left.beginning_of(revision)) == number_of(whole.beginning_of(revision))
    assert number_of(left.newest) == number_of(whole.newest)


@given(chains(), st.integers(0, 20))
def test_nothing_is_needed_without_a_cause(
    manifests: list[StoredManifest], history_from: int
) -> None:
    chain = Chain(manifests)
    retained = range(history_from, 22)
    causes = {number_of(chain.end_of(r)) for r in retained}
    causes |= {number_of(chain.beginning_of(r)) for r in retained}
    assert chain.needed(history_from, ()) == causes - {0}


slots = st.sets(st.tuples(st.integers(1, 3), st.sampled_from([0, 1, 2, NO_SLOT - 1])))


@given(slots, st.lists(slots, max_size=3))
def test_slot_sets_are_sets(one: set[tuple[int, int]], others: list[set[tuple[int, int]]]) -> None:
    packed = [slot_set(other) for other in others]
    assert list(names_of(slot_set(one))) == sorted(one)
    assert list(names_of(union(packed))) == sorted(set().union(*others))
    assert list(names_of(without(slot_set(one), packed))) == sorted(one.difference(*others))
    assert members(slot_set(one), set().union(*others)) == one & set().union(*others)
    assert tops(slot_set(one)) == {
        level: max(slot for other, slot in one if other == level) for level, _ in one
    }


# ---- how far the settings let history go


def decide(bank: Bank, *, time_s: float, committed: bool = True) -> None:
    number = bank.latest_number() + 1
    bank.decide(
        RevisionRecord(
            revision=number,
            committed=committed,
            nonce="",
            previous_sha256="",
            operation="test",
            principal="tester",
            request_id=f"r{number}",
            time_s=time_s,
        )
    )


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path / "bank")


def test_the_newest_revisions_are_kept_and_aborted_ones_do_not_count(bank: Bank) -> None:
    for number in range(1, 7):
        decide(bank, time_s=0.0, committed=number not in (3, 5))
    floors = [Retention(num_revisions=n).floor(bank, 6) for n in range(1, 6)]
    assert floors == [6, 4, 2, 1, 0]
    # One that is about to be committed is the newest already.
    assert Retention(num_revisions=2).floor(bank, 7) == 6


def test_a_revision_is_as_old_as_its_end(bank: Bank) -> None:
    # Revision 1 was in force from 100 to 200, 2 until 300, 3 since.
    for number in (1, 2, 3):
        decide(bank, time_s=100.0 * number)

    def floor(now: float, within_s: float) -> int:
        kept = Retention(num_revisions=1, ended_within_s=within_s, clock=lambda: now)
        return kept.floor(bank, 3)

    assert floor(310.0, 0.0) == 3
    assert floor(310.0, 10.0) == 3
    assert floor(310.0, 10.5) == 2
    assert floor(310.0, 111.0) == 1
    assert floor(310.0, 211.0) == 0
    assert floor(9999.0, 211.0) == 3


# ---- on a shard


def run(shard: Shard, bank: Bank, num_revisions: int) -> Mapping[int, State]:
    """Change a bank, revision after revision, folding now and then; return the end of each."""
    ends: dict[int, State] = {}
    for number in range(num_revisions):
        for push in range(3):
            shard.push(make_update(shard, [A], f"u{number}-{push}"))
            shard.consolidate()
        # A later push that is folded by the next transaction only.
        shard.push(make_update(shard, [A], f"u{number}-last"))
        ends[bank.latest_commit().revision] = full_state(shard)
        weight = np.full(bank.spec.block_shape(1), float(number), np.float32)
        transact(shard, bank, [SetContent(ref=A, weight=weight)])
    shard.consolidate()
    return ends


@pytest.mark.parametrize("revision", [3, 4, 5])
def test_the_end_of_every_retained_revision_is_there_and_no_other(
    bank: Bank, revision: int
) -> None:
    shard = Shard.open(bank, config=ShardConfig(retained_revisions=4, hold_wait_s=0))
    ends = run(shard, bank, 6)
    history = shard.history()[0]
    assert history.history_from == 3
    # Of each revision its beginning and its end, and what follows the newest commit.
    assert len(bank.manifest_numbers(0)) <= 2 * 4 + 2
    number = history.end_of(revision)
    entry = bank.read_manifest(0, number).entries[A]
    version, _, step, content = ends[revision][A]
    assert (entry.version, entry.step) == (version, step)
    transact(shard, bank, [RestoreEntry(ref=A, manifest=number)])
    assert full_state(shard)[A][2:] == (step, content)
    shard.close()


def test_a_setting_that_is_raised_later_brings_nothing_back(bank: Bank) -> None:
    shard = Shard.open(bank, config=ShardConfig(retained_revisions=1, hold_wait_s=0))
    run(shard, bank, 4)
    shard.close()
    shard = Shard.open(bank, config=ShardConfig(retained_revisions=100, hold_wait_s=0))
    history = shard.history()[0]
    assert history.history_from == 4
    shard.push(make_update(shard, [A], "more"))
    shard.consolidate()
    history = shard.history()[0]
    assert history.history_from == 4
    shard.close()


def test_a_snapshot_keeps_beginning_and_end_of_its_revision(bank: Bank) -> None:
    config = ShardConfig(retained_revisions=1, hold_wait_s=0)
    shard = Shard.open(bank, config=config)
    shard.push(make_update(shard, [A], "before"))
    transact(shard, bank, [], all_partitions=True)
    bank.create_snapshot(Snapshot(name="kept", revision=1, create_time_s=0.0))
    beginning = full_state(shard)
    end = run(shard, bank, 4)[1]
    shard.close()
    shard = Shard.open(bank, config=config)
    history = shard.history()[0]
    assert history.history_from > 1
    for number, state in ((bank.named_manifest(1, 0), beginning), (history.ends[1], end)):
        transact(shard, bank, [RestoreEntry(ref=A, manifest=number)])
        assert full_state(shard)[A][2:] == state[A][2:]
    bank.delete_snapshot("kept")
    shard.push(make_update(shard, [A], "after"))
    shard.consolidate()
    with pytest.raises(NotFoundError, match="not retained"):
        shard.prepare(
            bank.latest_number() + 1,
            [RestoreEntry(ref=A, manifest=bank.named_manifest(1, 0))],
            dry_run=True,
        )
    shard.close()


def test_what_is_prepared_keeps_its_promise_through_a_restart(bank: Bank) -> None:
    # Time passes between the promise and the commit: the restarted owner would promise less.
    now = [0.0]
    config = ShardConfig(retained_revisions=1, retained_s=50.0, hold_wait_s=0)
    shard = Shard.open(bank, config=config, wall_clock=lambda: now[0])
    weight = np.zeros(bank.spec.block_shape(1), np.float32)
    for number in range(1, 4):
        transact(shard, bank, [SetContent(ref=A, weight=weight + number)])
        shard.push(make_update(shard, [A], f"u{number}"))
        shard.consolidate()
    promised = shard.history()[0].history_from
    prepared = shard.prepare(4, [SetContent(ref=A, weight=weight)])
    shard.close(consolidate=False)
    now[0] = 10_000.0
    shard = Shard.open(bank, config=config, wall_clock=lambda: now[0])
    assert shard.history()[0].history_from <= promised
    end = shard.history()[0].end_of(promised)
    shard.commit(bank.decide(commit_record(bank, 4, prepared)))
    assert shard.history()[0].history_from <= promised
    transact(shard, bank, [RestoreEntry(ref=A, manifest=end)])
    shard.close()
