"""Of a local journal and its shipped copy the right one rules, whoever died when and where."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from journal_rigs import (
    IDENTITY,
    LocalRig,
    MemoryObjects,
    ShippedRig,
    append,
    payloads_of,
)
from membank.bank_service.store.journal import (
    FrameKind,
    Ownership,
    ShippedJournal,
)
from membank.bank_service.store.journal.backlog import Backlog
from membank.wire.errors import (
    CorruptionError,
    MembankError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from storage_faults import Crash, FaultPlan, Outage, StorageFault


class _Rig(ShippedRig):
    """A machine with a disk, and the bank's storage, which can be cut off; time stands still."""

    def __init__(self, folder: Path, content: dict[str, bytes], *, batch_bytes: int = 100) -> None:
        self.outage = Outage(MemoryObjects(content))
        super().__init__(folder, lambda: self.outage)
        self.batch_bytes = batch_bytes
        self.now = 0.0

    def open(self, plan: FaultPlan | None = None, *, identity: str = IDENTITY) -> ShippedJournal:
        return ShippedJournal(
            self.local.open(plan, identity=identity),
            self.remote.open(plan, identity=identity),
            self.is_current,
            batch_bytes=self.batch_bytes,
            clock=lambda: self.now,
        )

    def start(self, after_lsn: int = 0, plan: FaultPlan | None = None) -> ShippedJournal:
        journal = super().start(after_lsn, plan)
        assert isinstance(journal, ShippedJournal)
        return journal

    def shipped(self) -> list[bytes]:
        """Return what is in the remote journal."""
        return payloads_of(self.remote.open())


@pytest.fixture
def rig(tmp_path: Path) -> _Rig:
    return _Rig(tmp_path / "here", {})


def _other_machine(rig: _Rig) -> _Rig:
    other = _Rig(rig.local.folder.with_name("there"), {})
    other.outage, other.remote = rig.outage, rig.remote
    other.manifest, other.nonce = rig.manifest, rig.nonce
    return other


def test_frames_are_shipped_in_batches(rig: _Rig) -> None:
    journal = rig.start()
    payloads = [bytes([number]) * 30 for number in range(10)] + [b"long" * 100, b"short"]
    for payload in payloads:
        append(journal, payload)
    assert rig.shipped() == []
    journal.ship()
    assert rig.shipped() == payloads
    sizes = [len(data) for data in rig.remote.store.get(rig.remote.keys()[1]).split(b"MBJF")[2:]]
    assert len(sizes) == 3
    num_objects = len(rig.remote.keys())
    journal.ship()
    assert len(rig.remote.keys()) == num_objects


def test_the_kind_is_shipped_too(rig: _Rig) -> None:
    journal = rig.start()
    kinds = [FrameKind.UPDATE, FrameKind.IMAGE, FrameKind.UPDATE]
    for kind in kinds:
        journal.append(kind, [[b"x"]])
    journal.ship()
    assert [frame.kind for frame in rig.remote.open().replay(0)] == kinds
    assert len(rig.remote.keys()) == 2


def test_the_lag_is_that_of_the_oldest_unshipped_frame(rig: _Rig) -> None:
    journal = rig.start()
    assert journal.unshipped_since() is None
    rig.now = 5.0
    append(journal, b"12345", b"678")
    rig.now = 7.0
    append(journal, b"9")
    rig.now = 8.0
    lag = journal.lag()
    assert (lag.seconds, lag.num_frames, lag.num_bytes) == (3.0, 3, 9)
    assert journal.unshipped_since() == 5.0
    rig.outage.is_down = True
    with pytest.raises(UnavailableError):
        journal.ship()
    assert journal.lag() == lag
    rig.outage.is_down = False
    journal.ship()
    lag = journal.lag()
    assert (lag.seconds, lag.num_frames, lag.num_bytes) == (0.0, 0, 0)


def test_what_a_manifest_contains_does_not_lag(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    rig.now = 1.0
    append(journal, b"two")
    rig.outage.is_down = True
    journal.trim(1)
    lag = journal.lag()
    assert (lag.seconds, lag.num_frames, lag.num_bytes) == (0.0, 1, 3)


def test_an_opening_knows_what_the_one_before_did_not_ship(rig: _Rig) -> None:
    append(rig.start(), b"one", b"two")
    rig.now = 3.0
    journal = rig.start()
    assert journal.lag().num_frames == 2
    assert journal.lag().num_bytes >= 6
    assert journal.unshipped_since() == 3.0
    journal.ship()
    assert rig.shipped() == [b"one", b"two"]
    assert journal.unshipped_since() is None


def test_a_backlog_is_bounded_and_never_too_small() -> None:
    backlog = Backlog()
    for lsn in range(1, 10_001):
        backlog.add(lsn, 10, float(lsn))
    assert _told(backlog) == (1.0, 100_000)
    backlog.forget(5_000)
    since, num_bytes = _told(backlog)
    assert 50_000 <= num_bytes <= 50_000 + 10 * 64
    assert since is not None
    assert 5_001.0 - 64 <= since <= 5_001.0
    backlog.forget(10_000)
    assert _told(backlog) == (None, 0)


def _told(backlog: Backlog) -> tuple[float | None, int]:
    return backlog.since, backlog.num_bytes


@pytest.mark.parametrize("delivers", [False, True])
def test_an_outage_costs_nothing_but_time(rig: _Rig, delivers: bool) -> None:
    journal = rig.start()
    append(journal, b"one")
    rig.outage.is_down, rig.outage.delivers = True, delivers
    for payload in (b"two", b"three"):
        with pytest.raises(UnavailableError):
            journal.ship()
        append(journal, payload)
    rig.outage.is_down = False
    journal.ship()
    assert rig.shipped() == payloads_of(journal) == [b"one", b"two", b"three"]


def test_a_trim_in_an_outage_is_made_up_for(rig: _Rig, caplog: pytest.LogCaptureFixture) -> None:
    journal = rig.start()
    append(journal, b"marker")
    journal.ship()
    rig.outage.is_down = True
    with caplog.at_level(logging.WARNING):
        journal.trim(1)
    assert "was not trimmed" in caplog.text
    assert b"marker" not in rig.local.stored()
    assert journal.base == 0  # some of it is still stored somewhere
    append(journal, b"two")
    rig.outage.is_down = False
    journal.ship()
    assert b"marker" not in rig.stored()
    assert journal.base == 1
    assert rig.shipped() == [b"two"]


def test_what_was_trimmed_before_it_was_shipped_is_skipped(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    append(journal, b"two", b"three")
    journal.trim(3)
    append(journal, b"four")
    journal.ship()
    remote = rig.remote.open()
    assert (payloads_of(remote), remote.base, remote.last_lsn) == ([b"four"], 3, 4)


def test_what_was_trimmed_in_an_outage_before_it_was_shipped(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    append(journal, b"two")
    rig.outage.is_down = True
    journal.trim(2)
    append(journal, b"three")
    # The process ends before it can make up for it; the remote log is behind the manifest.
    rig.outage.is_down = False
    again = rig.start(after_lsn=2)
    assert payloads_of(again, 2) == [b"three"]
    again.ship()
    assert rig.shipped() == [b"three"]


def test_a_local_trim_that_failed_half_way(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    for number in range(2, 8):
        append(journal, str(number).encode() * 400)  # each in a segment of its own
    rig.local.faults.fault = StorageFault.NO_SPACE
    rig.local.faults.at = rig.local.faults.num_calls + 4
    with pytest.raises(ResourceExhaustedError):
        journal.trim(6)
    assert b"2" * 400 not in rig.local.stored()
    assert b"6" * 400 in rig.local.stored()
    journal.ship()
    assert rig.shipped()[-1] == b"7" * 400


def test_a_fence_seals_both(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    new = _other_machine(rig).start()
    append(journal, b"unshipped")
    with pytest.raises(UnavailableError) as caught:
        journal.ship()
    assert caught.value.reason is Reason.FENCED
    for refused in (journal.require_usable, lambda: append(journal, b"x")):
        with pytest.raises(UnavailableError) as caught:
            refused()
        assert caught.value.reason is Reason.FENCED
    assert append(new, b"two") == 2


def test_a_fence_met_while_trimming_seals_too(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    _other_machine(rig).start()
    journal.trim(1)
    with pytest.raises(UnavailableError) as caught:
        append(journal, b"x")
    assert caught.value.reason is Reason.FENCED


def test_it_accepts_nothing_until_both_have_begun(rig: _Rig) -> None:
    journal = rig.open()
    rig.outage.is_down = True
    with pytest.raises(UnavailableError):
        journal.begin(rig.next_owner(), 0)
    with pytest.raises(UnavailableError, match="not begun"):
        append(journal, b"x")
    rig.outage.is_down = False
    journal.begin(rig.next_owner(), 0)
    assert append(journal, b"x") == 1


def test_frames_from_a_lost_machine_are_read_from_both(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one", b"two")
    journal.ship()
    there = _other_machine(rig)
    new = there.start()
    append(new, b"three")
    assert payloads_of(new) == [b"one", b"two", b"three"]
    assert payloads_of(new, 1) == [b"two", b"three"]
    assert (new.base, new.last_lsn) == (0, 3)
    new.close()
    again = there.start()
    assert payloads_of(again) == [b"one", b"two", b"three"]


def test_frames_that_are_in_neither_are_missed(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    append(journal, b"two")
    rig.outage.is_down = True
    journal.trim(2)
    append(journal, b"three")
    rig.outage.is_down = False
    # As if the manifest that contains the first two had been lost.
    with pytest.raises(CorruptionError, match="frames are missing"):
        payloads_of(rig.open())


def test_updates_made_while_shipping_was_off_count(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    journal.close()
    plain = rig.local.open()
    owner = rig.next_owner()
    plain.begin(owner, 0)
    rig.publish(owner)
    append(plain, b"two")
    plain.close()
    again = rig.start()
    assert payloads_of(again) == [b"one", b"two"]
    again.ship()
    assert rig.shipped() == [b"one", b"two"]


def test_a_remote_log_of_another_history_is_replaced(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one", b"two", b"three")
    journal.ship()
    journal.close()
    _cut_last_frames(rig.local, keep=1)
    plain = rig.local.open()
    owner = rig.next_owner()
    plain.begin(owner, 0)
    rig.publish(owner)
    append(plain, b"other")
    plain.close()
    again = rig.start()
    assert payloads_of(again) == [b"one", b"other"]
    again.ship()
    assert rig.shipped() == [b"one", b"other"]
    assert b"three" not in rig.stored()


def test_a_local_log_that_lost_its_end_gives_way(
    rig: _Rig, caplog: pytest.LogCaptureFixture
) -> None:
    journal = rig.start()
    append(journal, b"one", b"two")
    journal.ship()
    journal.close()
    _cut_last_frames(rig.local, keep=1)
    with caplog.at_level(logging.WARNING):
        again = rig.start()
    assert "giving up frames 1 to 1 of the local journal" in caplog.text
    assert payloads_of(again) == [b"one", b"two"]
    assert append(again, b"three") == 3


def test_an_owner_elsewhere_that_never_published_costs_nothing(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    append(journal, b"unshipped")
    there = _other_machine(rig)
    there.open().begin(there.next_owner(), 0)  # and dies
    again = rig.start()
    assert payloads_of(again) == [b"one", b"unshipped"]
    again.ship()
    assert rig.shipped() == [b"one", b"unshipped"]


def test_an_owner_elsewhere_that_published_rules(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    append(journal, b"unshipped")
    there = _other_machine(rig)
    append(there.start(), b"two")
    rig.manifest, rig.nonce = there.manifest, there.nonce
    again = rig.start()
    assert payloads_of(again) == [b"one"]
    assert append(again, b"next") == 2


def test_what_the_owner_before_ships_at_the_last_moment_counts(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    there = _other_machine(rig)
    new = there.open()
    append(journal, b"two")
    journal.ship()
    new.begin(there.next_owner(), 0)
    assert payloads_of(new) == [b"one", b"two"]
    assert append(new, b"three") == 3
    new.ship()
    assert rig.shipped() == [b"one", b"two", b"three"]


def test_a_neighbour_that_ships_to_the_same_place_is_found_out(rig: _Rig) -> None:
    # Two owners on one machine: the lock was circumvented.
    journal = rig.start()
    append(journal, b"one")
    here = rig.open()
    remote = rig.remote.open()
    remote.begin(rig.next_owner(), 0)
    append(remote, b"1", b"2", b"3")
    with pytest.raises(UnavailableError) as caught:
        here.begin(rig.next_owner(), 0)
    assert caught.value.reason is Reason.FENCED


def test_journals_that_are_not_current_are_left_to_the_caller(rig: _Rig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    journal.close()
    rig.publish(Ownership(9, "somebody", "else"))
    stale = rig.open()
    assert stale.ownership is not None
    assert not rig.is_current(stale.ownership)
    stale.discard()
    stale.begin(rig.next_owner(), 7)
    assert append(stale, b"eight") == 8
    stale.ship()
    assert rig.shipped() == [b"eight"]


def test_shipping_beside_trimming_and_appending(rig: _Rig) -> None:
    journal = rig.start()
    for number in range(1, 50):
        append(journal, f"update {number}".encode() * 5)
        if number % 7 == 0:
            frames = rig.local.open().replay(0)
            next(frames)
            journal.trim(number - 3)
            journal.ship()
    expected = payloads_of(journal, 46)
    journal.ship()
    assert payloads_of(rig.remote.open(), 46) == expected


def _cut_last_frames(rig: LocalRig, *, keep: int) -> None:
    """Leave the first `keep` frames, as a loss of power may where nothing is synced."""
    (path,) = rig.folder.glob("*.log")
    os.truncate(path, _frame_starts(path)[1 + keep])


def _frame_starts(path: Path) -> list[int]:
    return [found.start() for found in re.finditer(b"MBJF", path.read_bytes())]


def _epoch_first(path: Path) -> list[str]:
    return path.stem.split("-")[::-1]


# ---- every story of two machines


class _World:
    """Two machines, one bank; what must be in the log, and what may be lost with a machine."""

    def __init__(self, folder: Path) -> None:
        content: dict[str, bytes] = {}
        self.machines = [_Rig(folder / name, content) for name in ("a", "b")]
        self.home = 0
        self.history: list[bytes] = []
        self.num_shipped = 0
        self.trimmed = 0
        self.count = 0
        self.journal: ShippedJournal | None = None
        self.owners: dict[int, ShippedJournal] = {}
        """Owners that were overtaken, by machine."""
        self.start(0)

    def start(self, machine: int, *, plan: FaultPlan | None = None, intact: bool = True) -> None:
        """Let the next owner start on `machine`, and check what it finds."""
        rig = self.machines[machine]
        rig.manifest, rig.nonce = self.machines[self.home].manifest, self.machines[self.home].nonce
        if self.journal is not None:
            self.owners[self.home] = self.journal
        self.journal = None
        self.owners.pop(machine, None)  # on one machine, the owner before must have died
        journal = rig.start(self.trimmed, plan)
        found = payloads_of(journal, self.trimmed)
        sure = len(self.history) if intact and machine == self.home else self.num_shipped
        assert found == self.history[self.trimmed :][: len(found)]
        assert self.trimmed + len(found) >= sure
        self.history = self.history[: self.trimmed + len(found)]
        assert journal.last_lsn == len(self.history)
        self.home, self.journal = machine, journal

    def append(self) -> None:
        if self.journal is not None:
            self.count += 1
            payloads = [f"update {self.count}.{part}".encode() for part in range(self.count % 3)]
            try:
                append(self.journal, *payloads)
            except UnavailableError:
                self.start(self.home)
            else:
                self.history += payloads

    def ship(self) -> None:
        if self.journal is not None:
            try:
                self.journal.ship()
            except UnavailableError:
                self.start(self.home)  # after another, which died before it published
            else:
                self.num_shipped = len(self.history)

    def fail_to_ship(self, delivers: bool) -> None:
        """Ship while the storage does not answer."""
        outage = self.machines[self.home].outage
        outage.is_down, outage.delivers = True, delivers
        if self.journal is not None:
            with suppress(UnavailableError):  # where there is something to ship
                self.journal.ship()
        outage.is_down = False

    def lose_power(self, part: float) -> None:
        """Cut the newest segment at the owner's machine, as nothing is synced there."""
        *_, path = sorted(self.machines[self.home].local.folder.glob("*.log"), key=_epoch_first)
        ends = [frame for frame in _frame_starts(path) if frame] or [path.stat().st_size]
        first = ends[0]
        os.truncate(path, first + int((path.stat().st_size - first) * part))
        self.start(self.home, intact=False)

    def trim(self, keep: int) -> None:
        if self.journal is not None:
            self.trimmed = max(self.trimmed, len(self.history) - keep)
            self.journal.trim(self.trimmed)

    def wake(self) -> None:
        """Let older owners try to go on."""
        for sleeper in self.owners.values():
            with suppress(UnavailableError):  # the second time it knows
                append(sleeper, b"never acknowledged, as its lease has run out")
            with pytest.raises(UnavailableError) as caught:
                sleeper.ship()
            assert caught.value.reason is Reason.FENCED

    def lose(self, machine: int) -> None:
        """Take the disk of `machine` away; if it is that of the owner, another starts there."""
        shutil.rmtree(self.machines[machine].local.folder, ignore_errors=True)
        self.owners.pop(machine, None)
        if machine == self.home:
            self.start(machine, intact=False)

    def die_in_begin(self, machine: int, fault: StorageFault, at: int) -> None:
        """Let an owner start on `machine` and die at one of its calls, or succeed."""
        self.owners.pop(machine, None)
        home, rig = self.home, self.machines[machine]
        rig.manifest, rig.nonce = self.machines[home].manifest, self.machines[home].nonce
        with suppress(Crash, MembankError):
            journal = rig.open(FaultPlan(fault, at))
            journal.begin(rig.next_owner(), self.trimmed)
        if machine == home:
            self.start(home)


_EVENTS = st.one_of(
    st.just(("wake",)),
    st.tuples(st.just("trim"), st.integers(0, 4)),
    st.tuples(st.just("fail_to_ship"), st.booleans()),
    st.tuples(st.just("lose_power"), st.floats(0, 1)),
    st.tuples(st.just("start"), st.integers(0, 1)),
    st.tuples(st.just("lose"), st.integers(0, 1)),
    st.tuples(
        st.just("die_in_begin"),
        st.integers(0, 1),
        st.sampled_from(StorageFault),
        st.integers(1, 10),
    ),
)


# Something to lose before each of them: frames that were shipped, and frames that were not.
_STEPS = st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 2), _EVENTS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@given(steps=st.lists(_STEPS, max_size=12))
def test_every_story_of_two_machines(
    steps: list[tuple[int, bool, int, tuple[str, ...]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = _World(Path(folder))
        for num_before, ships, num_after, (event, *arguments) in steps:
            for _ in range(num_before):
                world.append()
            if ships:
                world.ship()
            for _ in range(num_after):
                world.append()
            getattr(world, event)(*arguments)
        world.start(world.home)
