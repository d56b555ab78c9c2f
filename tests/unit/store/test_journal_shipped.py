"""Of a local journal and its shipped copy the right one rules, whoever died when and where."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from journal_rigs import (
    LocalRig,
    MachineRig,
    append,
    frame_starts,
    payloads_of,
)
from membank.bank_service.store.journal import (
    FrameKind,
    Ownership,
)
from membank.bank_service.store.journal.backlog import Backlog
from membank.wire.errors import (
    CorruptionError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from storage_faults import StorageFault


@pytest.fixture
def rig(tmp_path: Path) -> MachineRig:
    return MachineRig(tmp_path / "here", {})


def _other_machine(rig: MachineRig) -> MachineRig:
    other = MachineRig(rig.local.folder.with_name("there"), {})
    other.outage, other.remote = rig.outage, rig.remote
    other.manifest, other.nonce = rig.manifest, rig.nonce
    return other


def test_frames_are_shipped_in_batches(rig: MachineRig) -> None:
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


def test_the_kind_is_shipped_too(rig: MachineRig) -> None:
    journal = rig.start()
    kinds = [FrameKind.UPDATE, FrameKind.IMAGE, FrameKind.UPDATE]
    for kind in kinds:
        journal.append(kind, [[b"x"]])
    journal.ship()
    assert [frame.kind for frame in rig.remote.open().replay(0)] == kinds
    assert len(rig.remote.keys()) == 2


def test_the_age_is_that_of_the_oldest_unshipped_frame(rig: MachineRig) -> None:
    journal = rig.start()
    rig.now = 5.0
    assert journal.lag().seconds == 0.0
    append(journal, b"12345", b"678")
    rig.now = 7.0
    append(journal, b"9")
    rig.now = 8.0
    assert journal.lag().seconds == 3.0
    rig.outage.is_down = True
    with pytest.raises(UnavailableError):
        journal.ship()
    assert journal.lag().seconds == 3.0
    rig.outage.is_down = False
    journal.ship()
    assert journal.lag().seconds == 0.0


def test_what_a_manifest_contains_has_no_age(rig: MachineRig) -> None:
    journal = rig.start()
    append(journal, b"one")
    rig.now = 1.0
    append(journal, b"two")
    rig.now = 3.0
    rig.outage.is_down = True
    assert journal.lag().seconds == 3.0
    journal.trim(1)
    assert journal.lag().seconds == 2.0


def test_an_opening_knows_what_the_one_before_did_not_ship(rig: MachineRig) -> None:
    append(rig.start(), b"one", b"two")
    rig.now = 3.0
    journal = rig.start()
    rig.now = 5.0
    assert journal.lag().seconds == 2.0
    journal.ship()
    assert rig.shipped() == [b"one", b"two"]
    assert journal.lag().seconds == 0.0


def test_a_backlog_is_bounded_and_never_too_late() -> None:
    backlog = Backlog()
    for lsn in range(1, 10_001):
        backlog.add(lsn, float(lsn))
    assert backlog.since == 1.0
    backlog.forget(5_000)
    assert backlog.since is not None
    assert 5_001.0 - 64 <= backlog.since <= 5_001.0
    backlog.forget(10_000)
    assert backlog.since is None


@pytest.mark.parametrize("delivers", [False, True])
def test_an_outage_costs_nothing_but_time(rig: MachineRig, delivers: bool) -> None:
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


def test_a_trim_in_an_outage_is_made_up_for(
    rig: MachineRig, caplog: pytest.LogCaptureFixture
) -> None:
    journal = rig.start()
    append(journal, b"marker")
    journal.ship()
    rig.outage.is_down = True
    with caplog.at_level(logging.WARNING):
        journal.trim(1)
    assert "was not trimmed" in caplog.text
    journal.erase()
    assert b"marker" not in rig.local.stored()
    assert journal.base == 0  # some of it is still stored somewhere
    append(journal, b"two")
    rig.outage.is_down = False
    journal.ship()
    assert b"marker" not in rig.stored()
    assert journal.base == 1
    assert rig.shipped() == [b"two"]


def test_what_was_trimmed_before_it_was_shipped_is_skipped(rig: MachineRig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    append(journal, b"two", b"three")
    journal.trim(3)
    append(journal, b"four")
    journal.ship()
    remote = rig.remote.open()
    assert (payloads_of(remote), remote.base, remote.last_lsn) == ([b"four"], 3, 4)


def test_what_was_trimmed_in_an_outage_before_it_was_shipped(rig: MachineRig) -> None:
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


def test_a_local_trim_that_failed_half_way(rig: MachineRig) -> None:
    rig.local.spare_bytes = 0  # so that segments are removed, which the plan lets fail
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


def test_a_fence_seals_both(rig: MachineRig) -> None:
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


def test_a_fence_met_while_trimming_seals_too(rig: MachineRig) -> None:
    journal = rig.start()
    append(journal, b"one")
    journal.ship()
    _other_machine(rig).start()
    journal.trim(1)
    with pytest.raises(UnavailableError) as caught:
        append(journal, b"x")
    assert caught.value.reason is Reason.FENCED


def test_it_accepts_nothing_until_both_have_begun(rig: MachineRig) -> None:
    journal = rig.open()
    rig.outage.is_down = True
    with pytest.raises(UnavailableError):
        journal.begin(rig.next_owner(), 0)
    with pytest.raises(UnavailableError, match="not begun"):
        append(journal, b"x")
    rig.outage.is_down = False
    journal.begin(rig.next_owner(), 0)
    assert append(journal, b"x") == 1


def test_frames_from_a_lost_machine_are_read_from_both(rig: MachineRig) -> None:
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


def test_frames_that_are_in_neither_are_missed(rig: MachineRig) -> None:
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


def test_updates_made_while_shipping_was_off_count(rig: MachineRig) -> None:
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


def test_a_remote_log_of_another_history_is_replaced(rig: MachineRig) -> None:
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
    rig: MachineRig, caplog: pytest.LogCaptureFixture
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


def test_an_owner_elsewhere_that_never_published_costs_nothing(rig: MachineRig) -> None:
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


def test_an_owner_elsewhere_that_published_rules(rig: MachineRig) -> None:
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


def test_what_the_owner_before_ships_at_the_last_moment_counts(rig: MachineRig) -> None:
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


def test_a_neighbour_that_ships_to_the_same_place_is_found_out(rig: MachineRig) -> None:
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


def test_journals_that_are_not_current_are_left_to_the_caller(rig: MachineRig) -> None:
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


def test_shipping_beside_trimming_and_appending(rig: MachineRig) -> None:
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
    os.truncate(path, frame_starts(path)[1 + keep])
