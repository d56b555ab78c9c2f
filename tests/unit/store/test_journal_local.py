"""A journal on a local disk: segments, batches that fail, disks that fill."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from journal_rigs import append, payloads_of
from membank.bank_service.store.journal import LocalJournal, LogFile, Ownership, PosixLogFile
from membank.bank_service.store.local_objects import sync_folder
from membank.wire.errors import (
    CorruptionError,
    InvalidArgumentError,
    MembankError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from storage_faults import Crash, FaultPlan, FaultyLogFile, StorageFault, faulty_remove

PAYLOADS = [b"first", b"", b"\0" * 40, bytes(range(256)) * 2, b"last"]


def _owner(epoch: int) -> Ownership:
    return Ownership(epoch, f"owner{epoch}", f"manifest{epoch}")


def _write(folder: Path, payloads: Sequence[bytes], *, segment_bytes: int = 1 << 20) -> None:
    journal = LocalJournal.open(folder, "id", segment_bytes=segment_bytes)
    journal.begin(_owner(1), 0)
    for payload in payloads:
        append(journal, payload)
    journal.close()


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def test_every_segment_is_named_for_what_it_continues(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS, segment_bytes=1)
    assert [path.name for path in _segments(tmp_path)] == [
        f"{base:020d}-0000000001.log" for base in range(5)
    ]
    assert payloads_of(LocalJournal.open(tmp_path, "id")) == PAYLOADS


def test_a_batch_stays_in_one_segment(tmp_path: Path) -> None:
    journal = LocalJournal.open(tmp_path, "id", segment_bytes=1)
    journal.begin(_owner(1), 0)
    append(journal, *PAYLOADS)
    append(journal, b"x")
    journal.close()
    assert len(_segments(tmp_path)) == 2
    assert payloads_of(LocalJournal.open(tmp_path, "id")) == [*PAYLOADS, b"x"]


def test_zeros_after_the_last_frame_are_a_torn_tail(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS)
    (path,) = _segments(tmp_path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(4096))
    journal = LocalJournal.open(tmp_path, "id")
    assert payloads_of(journal) == PAYLOADS
    assert path.stat().st_size == size
    torn = journal.torn_tail
    assert torn is not None
    assert (torn.file, torn.offset, torn.num_bytes) == (str(path), size, 4096)


def test_a_file_that_is_no_segment_is_told(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS)
    (tmp_path / "copy.log").write_bytes(b"")
    with pytest.raises(CorruptionError, match="not that of a segment"):
        LocalJournal.open(tmp_path, "id")


def test_owners_are_counted_up(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS)
    journal = LocalJournal.open(tmp_path, "id")
    with pytest.raises(InvalidArgumentError, match="counted up"):
        journal.begin(_owner(0), 0)
    journal.begin(_owner(1), 0)
    assert append(journal, b"x") == 6


def test_an_owner_may_start_anew_before_segments_of_its_own_epoch(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS, segment_bytes=1)
    journal = LocalJournal.open(tmp_path, "id")
    journal.discard()
    journal.begin(_owner(1), 2)
    append(journal, b"x")
    journal.close()
    again = LocalJournal.open(tmp_path, "id")
    assert (again.base, payloads_of(again)) == (2, [b"x"])


def test_a_crash_while_an_owner_starts_anew_in_its_own_epoch(tmp_path: Path) -> None:
    # Its first segment would have the name of an older one, so those go first, oldest first.
    for at in range(1, 10):
        folder = tmp_path / str(at)
        _write(folder, PAYLOADS, segment_bytes=1)
        plan = FaultPlan(StorageFault.CRASH_BEFORE, at)
        journal = LocalJournal.open(
            folder,
            "id",
            open_file=lambda path, plan=plan: FaultyLogFile(path, plan),  # type: ignore[misc]
            remove_file=faulty_remove(plan),
        )
        journal.discard()
        with suppress(Crash):
            journal.begin(_owner(1), 2)
        found = payloads_of(LocalJournal.open(folder, "id"))
        assert found == PAYLOADS[len(PAYLOADS) - len(found) :]
        assert plan.happened == (at < 9)


class _Disk:
    """Room for a number of bytes; files that fail beyond it, after a part of the write."""

    def __init__(self) -> None:
        self.room = 10_000_000
        self.truncates = True
        self.syncs = True
        self.num_syncs = 0

    def open(self, path: Path) -> LogFile:
        return _DiskFile(path, self)


class _DiskFile(PosixLogFile):
    def __init__(self, path: Path, disk: _Disk) -> None:
        super().__init__(path)
        self._disk = disk

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        data = b"".join(buffers)
        super().append([data[: self._disk.room]])
        self._disk.room -= len(data)
        if self._disk.room < 0:
            self._disk.room = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncate(self, num_bytes: int) -> None:
        if not self._disk.truncates:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().truncate(num_bytes)

    def sync(self) -> None:
        self._disk.num_syncs += 1
        if not self._disk.syncs:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync()


@pytest.fixture
def disk() -> _Disk:
    return _Disk()


def _begun(folder: Path, disk: _Disk, *, sync: bool = False) -> LocalJournal:
    journal = LocalJournal.open(folder, "id", sync=sync, open_file=disk.open)
    journal.begin(_owner(1), 0)
    return journal


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("room", [0, 1, 27, 28, 30, 128, 140, 200, 383])
def test_a_batch_that_fails_is_undone_whole(
    tmp_path: Path, disk: _Disk, room: int, sync: bool
) -> None:
    journal = _begun(tmp_path, disk, sync=sync)
    append(journal, b"kept")
    size, num_bytes = _segments(tmp_path)[0].stat().st_size, journal.num_bytes
    disk.room = room
    with pytest.raises(ResourceExhaustedError) as caught:
        append(journal, b"x" * 100, b"y" * 100, b"z" * 100)
    assert caught.value.reason is Reason.NO_SPACE
    assert _segments(tmp_path)[0].stat().st_size == size
    assert (journal.num_bytes, journal.last_lsn) == (num_bytes, 1)
    disk.room = 10_000
    assert append(journal, b"later") == 2
    journal.close()
    assert payloads_of(LocalJournal.open(tmp_path, "id")) == [b"kept", b"later"]


def test_a_batch_is_synced_once(tmp_path: Path, disk: _Disk) -> None:
    journal = _begun(tmp_path, disk, sync=True)
    before = disk.num_syncs
    append(journal, *PAYLOADS)
    assert disk.num_syncs == before + 1


def test_a_write_that_cannot_be_undone_seals_the_log(tmp_path: Path, disk: _Disk) -> None:
    journal = _begun(tmp_path, disk)
    append(journal, b"kept")
    disk.room, disk.truncates = 10, False
    with pytest.raises(MembankError):
        append(journal, b"x" * 100)
    with pytest.raises(UnavailableError, match="restart the shard"):
        append(journal, b"y")
    journal.close()
    assert payloads_of(LocalJournal.open(tmp_path, "id")) == [b"kept"]


def test_an_undone_write_that_may_come_back_seals_the_log(tmp_path: Path, disk: _Disk) -> None:
    journal = _begun(tmp_path, disk, sync=True)
    append(journal, b"kept")
    disk.room, disk.syncs = 10, False
    with pytest.raises(ResourceExhaustedError):
        append(journal, b"x" * 100)
    disk.room, disk.syncs = 1000, True
    with pytest.raises(UnavailableError, match="could not be undone"):
        append(journal, b"y")


def test_a_failed_sync_seals_the_log(tmp_path: Path, disk: _Disk) -> None:
    journal = _begun(tmp_path, disk, sync=True)
    disk.syncs = False
    with pytest.raises(UnavailableError, match="fdatasync failed"):
        append(journal, b"x")
    disk.syncs = True
    with pytest.raises(UnavailableError, match="fdatasync failed"):
        append(journal, b"y")
    # What is sealed can still be trimmed of what a manifest contains.
    journal.trim(1)


def test_a_full_disk_can_be_trimmed(tmp_path: Path, disk: _Disk) -> None:
    _write(tmp_path, PAYLOADS, segment_bytes=1)
    journal = LocalJournal.open(tmp_path, "id", open_file=disk.open)
    journal.begin(_owner(2), 0)
    append(journal, b"six")
    disk.room = 0
    with pytest.raises(ResourceExhaustedError):
        journal.trim(6)  # there is no room for an empty segment
    assert len(_segments(tmp_path)) == 1
    disk.room = 1000
    journal.trim(6)
    assert (journal.base, payloads_of(journal)) == (6, [])
    assert append(journal, b"seven") == 7


def test_a_full_disk_in_the_middle_of_a_new_segment(tmp_path: Path, disk: _Disk) -> None:
    journal = LocalJournal.open(tmp_path, "id", segment_bytes=1, open_file=disk.open)
    journal.begin(_owner(1), 0)
    append(journal, b"one")
    disk.room = 20
    with pytest.raises(ResourceExhaustedError):
        append(journal, b"two")
    assert len(_segments(tmp_path)) == 1
    disk.room = 1000
    assert append(journal, b"two") == 2
    journal.close()
    assert payloads_of(LocalJournal.open(tmp_path, "id")) == [b"one", b"two"]


def test_a_note_of_the_next_segment_that_does_not_fit_is_no_damage(
    tmp_path: Path, disk: _Disk
) -> None:
    for room in range(28):
        folder = tmp_path / str(room)
        journal = LocalJournal.open(folder, "id", segment_bytes=1, open_file=disk.open)
        journal.begin(_owner(1), 0)
        append(journal, b"one")
        head = _segments(folder)[0].stat().st_size - 28 - 3
        disk.room = head + room
        with pytest.raises(ResourceExhaustedError):
            append(journal, b"two")
        disk.room = 1000
        append(journal, b"two")
        journal.close()
        assert payloads_of(LocalJournal.open(folder, "id")) == [b"one", b"two"]


def test_replay_begins_near_what_it_is_asked_for(tmp_path: Path) -> None:
    journal = LocalJournal.open(tmp_path, "id")
    journal.begin(_owner(1), 0)
    payloads = [bytes([number]) * 300_000 for number in range(12)]
    for payload in payloads:
        append(journal, payload)
    (path,) = _segments(tmp_path)
    with path.open("r+b", buffering=0) as file:
        file.seek(300)
        file.write(b"damage")
    assert payloads_of(journal, 11) == payloads[11:]
    assert payloads_of(journal, 8) == payloads[8:]
    with pytest.raises(CorruptionError) as caught:
        payloads_of(journal, 0)
    assert caught.value.metadata["file"] == str(path)


def test_the_offset_of_damage_counts_from_the_start_of_the_file(tmp_path: Path) -> None:
    journal = LocalJournal.open(tmp_path, "id")
    journal.begin(_owner(1), 0)
    sizes = []
    for number in range(6):
        sizes.append(journal.num_bytes)
        append(journal, bytes([number]) * 600_000)
    (path,) = _segments(tmp_path)
    with path.open("r+b", buffering=0) as file:
        file.seek(sizes[5] + 1000)
        file.write(b"damage")
    with pytest.raises(CorruptionError) as caught:
        payloads_of(journal, 5)
    assert caught.value.metadata["offset"] == str(sizes[5])


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    journal = LocalJournal.open(tmp_path, "id")
    journal.begin(_owner(1), 0)
    append(journal, b"one", b"two")
    (path,) = _segments(tmp_path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(CorruptionError, match="became shorter"):
        payloads_of(journal)


def test_with_sync_the_directory_itself_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []

    def note(folder: Path) -> None:
        synced.append(folder)
        sync_folder(folder)

    monkeypatch.setattr("membank.bank_service.store.journal.local.sync_folder", note)
    folder = tmp_path / "partitions" / "0000" / "journal"
    LocalJournal.open(folder, "id").begin(_owner(1), 0)
    assert synced == []
    LocalJournal.open(folder, "id", sync=True).begin(_owner(2), 0)
    assert {folder, *folder.parents} == set(synced)
