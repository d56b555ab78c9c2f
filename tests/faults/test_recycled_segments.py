"""Segments that are written over earlier ones: what was left of those is never taken for a frame.

A process that is killed leaves such a segment half written over. Whatever it was doing, all that it
was told to be written is there, nothing else is, and damage is still told from what was unfinished.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import suppress
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from child_targets import append_until_killed, numbered_payload
from full_disk import files_up_to
from journal_rigs import IDENTITY, LocalRig, append, payloads_of
from membank.bank_service.fsck import FindingKind, check_bank
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import Erase
from membank.bank_service.store import LocalObjects
from membank.bank_service.store.journal import LocalJournal, scan
from membank.bank_service.store.journal.frames import HEADER_BYTES, read_frames
from membank.wire.errors import CorruptionError, Reason, ResourceExhaustedError
from membank.wire.spec import BlockRef
from storage_faults import Crash, FaultPlan, StorageFault
from tiny_bank import create_bank, file_bytes, full_state, make_update, tiny_spec, transact

A, B = BlockRef(1, 0), BlockRef(1, 2)
KEPT = [b"kept %d" % number * (number + 1) for number in range(4)]


def _recycled(folder: Path, payloads: list[bytes]) -> tuple[LocalJournal, Path]:
    """Return a journal whose only segment is written over one of 1 KB, and that segment."""
    rig = LocalRig(folder, segment_bytes=4000)
    journal = rig.open()
    journal.begin(rig.next_owner(), 0)
    # Whole frames of the segment's earlier life, with LSNs that come again and such that do not.
    append(journal, *[b"stale %d" % number * 20 for number in range(8)])
    journal.trim(8)  # the first segment becomes a spare, and the second one is empty
    append(journal, b"bridge")
    journal.trim(9)
    for payload in payloads:
        append(journal, payload)
    (path,) = folder.glob("*.log")
    return journal, path


@pytest.fixture
def crashed(tmp_path: Path) -> Path:
    """A segment with the frames of `KEPT`, as a process that is killed leaves it."""
    _, path = _recycled(tmp_path / "journal", KEPT)
    found = scan(str(path), path.read_bytes())
    assert found.num_stale > 500
    assert found.torn is None
    return path


def _reopened(path: Path) -> LocalJournal:
    return LocalJournal.open(path.parent, IDENTITY)


def _frame_starts(path: Path) -> list[int]:
    frames = read_frames(str(path), path.read_bytes())
    return [0, *accumulate(HEADER_BYTES + len(frame.payload) for frame in frames)]


def test_what_is_left_of_an_earlier_life_is_cut_off(crashed: Path) -> None:
    end = _frame_starts(crashed)[-1]
    journal = _reopened(crashed)
    assert payloads_of(journal) == KEPT
    assert journal.torn_tail is None
    assert crashed.stat().st_size == end


def test_an_orderly_close_leaves_exact_files(tmp_path: Path) -> None:
    journal, path = _recycled(tmp_path / "journal", KEPT)
    journal.close()
    assert path.stat().st_size == _frame_starts(path)[-1]
    assert [left.name for left in path.parent.iterdir()] == [path.name]
    assert payloads_of(_reopened(path)) == KEPT


def test_a_change_of_any_byte_is_found_unless_it_is_in_the_last_frame(crashed: Path) -> None:
    whole = crashed.read_bytes()
    *_, last, end = _frame_starts(crashed)
    for position in range(len(whole)):
        crashed.write_bytes(
            whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :]
        )
        if position < last:
            with pytest.raises(CorruptionError) as caught:
                _reopened(crashed)
            assert caught.value.reason is Reason.JOURNAL_CORRUPT
            assert int(caught.value.metadata["offset"]) <= position
        else:
            # It may as well be a write that was not finished.
            assert payloads_of(_reopened(crashed)) == (KEPT if position >= end else KEPT[:-1])


def test_after_an_orderly_close_the_last_frame_is_safe_too(tmp_path: Path) -> None:
    journal, path = _recycled(tmp_path / "journal", KEPT)
    journal.close()
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        with pytest.raises(CorruptionError):
            _reopened(path)


def test_every_write_that_stops_somewhere(tmp_path: Path) -> None:
    journal, path = _recycled(tmp_path / "journal", KEPT)
    before = path.read_bytes()
    append(journal, b"one" * 40, b"two" * 30, b"three" * 10)
    after = path.read_bytes()
    start = scan(str(path), before).num_bytes
    for length in range(start, scan(str(path), after).num_bytes):
        path.write_bytes(after[:length] + before[length:])
        found = payloads_of(_reopened(path))
        # The first few frames of a batch may count, as in any segment.
        batch = [b"one" * 40, b"two" * 30, b"three" * 10]
        assert found[:4] == KEPT
        assert found[4:] == batch[: len(found) - 4]


def test_pages_of_a_batch_that_reach_the_disk_in_another_order(tmp_path: Path) -> None:
    # As when the power is lost before a batch is synced: none of it was acknowledged.
    journal, path = _recycled(tmp_path / "journal", KEPT)
    before = path.read_bytes()
    append(journal, b"one" * 40, b"two" * 30)
    after = path.read_bytes()
    start, end = scan(str(path), before).num_bytes, scan(str(path), after).num_bytes
    for hole in range(start, start + 40):
        path.write_bytes(after[:start] + before[start:hole] + after[hole:end] + before[end:])
        assert payloads_of(_reopened(path))[:4] == KEPT


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("fault", [StorageFault.CRASH_BEFORE, StorageFault.CRASH_AFTER])
def test_a_crash_at_every_call_of_a_journal_that_recycles(
    tmp_path: Path, fault: StorageFault, sync: bool
) -> None:
    for at in range(1, 200):
        rig = LocalRig(tmp_path / str(at), sync=sync)
        plan = FaultPlan(fault, at)
        acknowledged, trimmed = 0, 0
        with suppress(Crash):
            journal = rig.start(plan=plan)
            for number in range(1, 40):
                append(journal, numbered_payload(number, 150))
                acknowledged = number
                if number % 7 == 0:
                    trimmed = number - 2
                    journal.trim(trimmed)
        found = payloads_of(rig.open(), trimmed)
        expected = [numbered_payload(number, 150) for number in range(trimmed + 1, 41)]
        assert found == expected[: len(found)]
        assert len(found) >= acknowledged - trimmed
        if not plan.happened:
            return
    raise AssertionError("the plan never ran out")


@pytest.mark.parametrize("num_acknowledged", [40, 41, 43, 50])
def test_kill_9_while_a_segment_is_half_written_over(tmp_path: Path, num_acknowledged: int) -> None:
    folder = tmp_path / "journal"
    theirs, ours = _pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=append_until_killed, args=(str(folder), theirs)
    )
    process.start()
    theirs.close()
    acknowledged = 0
    while acknowledged < num_acknowledged:
        acknowledged = ours.recv()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with suppress(EOFError):
        while True:
            acknowledged = ours.recv()

    newest = max(folder.glob("*.log"))
    assert b'"life":' in newest.read_bytes()[:400]
    journal = LocalJournal.open(folder, IDENTITY)
    assert list(folder.glob("*.spare")) == []
    # One that was written, and of which the news came too late, may be there.
    assert acknowledged <= journal.last_lsn <= acknowledged + 1
    for frame in journal.replay(journal.base):
        assert bytes(frame.payload) == numbered_payload(frame.lsn, len(frame.payload))


def _pipe() -> tuple[Connection, Connection]:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    return sending, receiving


CONFIG = ShardConfig(segment_bytes=4000, consolidate_bytes=1 << 30)


def test_a_deletion_leaves_no_byte_in_spares_nor_behind_frames(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    shard = Shard.open(bank, config=CONFIG)
    updates = [make_update(shard, [A], f"a{number}", bases={A: number}) for number in range(6)]
    marks = [update.gradients[0].values.tobytes()[:64] for update in updates]
    for update in updates:
        shard.push(update)
    shard.consolidate()  # their segment becomes a spare
    for number in range(2):
        shard.push(make_update(shard, [B], f"b{number}"))
    shard.consolidate()  # which the present segment is written over
    shard.push(make_update(shard, [B], "b2"))
    if not _holding(tmp_path, marks):
        pytest.fail("the test should find what it looks for")
    transact(shard, bank, [Erase(ref=A)])
    assert _holding(tmp_path, marks) == []
    state = full_state(shard)
    shard.push(make_update(shard, [B], "b3"))
    shard.close()
    assert state
    assert _holding(tmp_path, marks) == []


def _holding(root: Path, marks: list[bytes]) -> list[str]:
    return [name for name, data in file_bytes(root).items() if any(mark in data for mark in marks)]


def test_a_full_disk_takes_the_spares_back(tmp_path: Path) -> None:
    bank = create_bank(tmp_path, tiny_spec(num_partitions=1))
    shard = Shard.open(bank, config=CONFIG)
    folder = tmp_path / "partitions/0000/journal"
    for life in range(3):
        for number in range(3 + life):
            shard.push(make_update(shard, [A], f"{life}.{number}"))
        shard.consolidate()
    assert list(folder.glob("*.spare"))
    shard.push(make_update(shard, [A], "before"))
    (path,) = folder.glob("*.log")
    state, count = full_state(shard), scan(str(path), path.read_bytes()).num_bytes
    update = make_update(shard, [A], "refused")
    with files_up_to(count + 100), pytest.raises(ResourceExhaustedError):
        shard.push(update)
    assert full_state(shard) == state
    assert path.stat().st_size == count
    assert list(folder.glob("*.spare")) == []
    assert not shard.push(update).duplicate
    after = full_state(shard)
    shard.close(consolidate=False)
    again = Shard.open(bank)
    assert full_state(again) == after
    again.close()


def test_a_segment_that_is_cut_while_it_becomes_a_spare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "journal"
    journal, cut = _recycled(folder, KEPT)
    rename = Path.rename

    def rename_late(self: Path, target: Path) -> Path:
        if self == cut:
            journal.erase()  # as another thread does to make room, at the last moment
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    journal.trim(journal.last_lsn)  # to become a spare, and it is followed by an empty one
    append(journal, b"bridge")
    journal.trim(journal.last_lsn)  # the next one is written over it
    append(journal, b"new")
    (path,) = folder.glob("*.log")
    assert scan(str(path), path.read_bytes()).num_stale > 0
    assert payloads_of(_reopened(path)) == [b"new"]


def test_fsck_knows_spares_and_what_is_left_behind_frames(tmp_path: Path) -> None:
    bank = create_bank(tmp_path, tiny_spec(num_partitions=1))
    shard = Shard.open(bank, config=CONFIG)
    for life in range(3):
        for number in range(3 + life):
            shard.push(make_update(shard, [A], f"{life}.{number}"))
        shard.consolidate()
    shard.push(make_update(shard, [A], "last"))
    assert list((tmp_path / "partitions/0000/journal").glob("*.spare"))
    report = check_bank(LocalObjects(tmp_path))
    assert report.findings == ()
    assert report.checked.num_replayed == 1
    shard.close(consolidate=False)
    assert check_bank(LocalObjects(tmp_path)).findings == ()


def test_fsck_finds_what_a_deletion_should_have_taken_out_of_a_spare(tmp_path: Path) -> None:
    bank = create_bank(tmp_path, tiny_spec(num_partitions=1))
    shard = Shard.open(bank, config=CONFIG)
    folder = tmp_path / "partitions/0000/journal"
    shard.push(make_update(shard, [A], "u"))
    (path,) = folder.glob("*.log")
    content = path.read_bytes()
    shard.consolidate()
    transact(shard, bank, [Erase(ref=A)])
    shard.push(make_update(shard, [B], "later"))
    assert check_bank(LocalObjects(tmp_path)).findings == ()
    spare = folder / "0000000009.spare"
    spare.write_bytes(content)
    (finding,) = check_bank(LocalObjects(tmp_path)).findings
    assert finding.kind is FindingKind.REMOVAL_UNFINISHED
    assert finding.key == spare.relative_to(tmp_path).as_posix()
    shard.close()
    Shard.open(bank).close()
    assert check_bank(LocalObjects(tmp_path)).findings == ()
