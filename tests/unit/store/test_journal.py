"""The journal returns what was appended, and never anything else."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from membank.bank_service.store.journal import (
    FrameKind,
    Journal,
    LocalJournal,
    LogFile,
    Ownership,
    PosixLogFile,
)
from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    MembankError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)

PAYLOADS = [b"first", b"", b"\0" * 40, bytes(range(256)) * 2, b"last"]


def _owner(epoch: int) -> Ownership:
    return Ownership(epoch, f"owner{epoch}", f"manifest{epoch}")


def _payloads(journal: Journal, after: int = 0) -> list[bytes]:
    return [bytes(frame.payload) for frame in journal.replay(after)]


def _write(folder: Path, payloads: Sequence[bytes], **options: int) -> None:
    journal = LocalJournal.open(folder, "id", **options)  # type: ignore[arg-type]
    journal.begin(_owner(1), 0)
    for payload in payloads:
        journal.append(FrameKind.UPDATE, [[payload[:3], payload[3:]]])
    journal.close()


def _overwrite(path: Path, position: int, value: int) -> None:
    # In place: truncating a file and writing it again costs ext4 a flush.
    with path.open("r+b", buffering=0) as file:
        file.seek(position)
        file.write(bytes([value]))


def _segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def test_replay_returns_what_was_appended(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS)
    journal = LocalJournal.open(tmp_path, "id")
    assert _payloads(journal) == PAYLOADS
    assert _payloads(journal, 3) == PAYLOADS[3:]
    assert (journal.last_lsn, journal.ownership, journal.torn_tail) == (5, _owner(1), None)


@pytest.mark.parametrize("sync", [False, True])
def test_segments_continue_each_other(tmp_path: Path, sync: bool) -> None:
    _write(tmp_path, PAYLOADS, sync=sync, segment_bytes=1)
    assert len(_segments(tmp_path)) == len(PAYLOADS)
    assert _payloads(LocalJournal.open(tmp_path, "id")) == PAYLOADS


def test_a_new_owner_continues(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS)
    journal = LocalJournal.open(tmp_path, "id")
    journal.begin(_owner(2), 0)
    assert journal.append(FrameKind.UPDATE, [[b"more"]]) == 6
    journal.close()
    again = LocalJournal.open(tmp_path, "id")
    assert (_payloads(again), again.ownership) == ([*PAYLOADS, b"more"], _owner(2))


def test_trim_leaves_nothing_up_to_its_lsn(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS)
    journal = LocalJournal.open(tmp_path, "id")
    journal.begin(_owner(2), 0)
    journal.append(FrameKind.UPDATE, [[b"marker"]])
    journal.trim(6)
    assert _payloads(journal) == []
    assert not any(b"marker" in p.read_bytes() for p in _segments(tmp_path))
    assert journal.append(FrameKind.UPDATE, [[b"next"]]) == 7
    journal.close()
    again = LocalJournal.open(tmp_path, "id")
    assert (_payloads(again, 6), again.base) == ([b"next"], 6)


def test_trim_keeps_what_is_later(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS, segment_bytes=1)
    journal = LocalJournal.open(tmp_path, "id")
    journal.begin(_owner(2), 2)
    assert _payloads(journal, 2) == PAYLOADS[2:]
    assert journal.base == 2


def test_a_log_behind_the_manifest_is_replaced(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS)
    journal = LocalJournal.open(tmp_path, "id")
    journal.begin(_owner(2), 9)
    assert journal.append(FrameKind.UPDATE, [[b"x"]]) == 10
    assert _payloads(journal, 9) == [b"x"]


def test_a_foreign_log_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS)
    with pytest.raises(FailedPreconditionError, match="journal of id"):
        LocalJournal.open(tmp_path, "other")


def test_every_cut_of_the_last_segment_gives_a_prefix(tmp_path: Path) -> None:
    _write(tmp_path / "whole", PAYLOADS)
    (whole,) = _segments(tmp_path / "whole")
    data = whole.read_bytes()
    for length in range(len(data)):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / whole.name).write_bytes(data[:length])
        journal = LocalJournal.open(folder, "id")
        found = _payloads(journal)
        assert found == PAYLOADS[: len(found)], length
        boundary = journal.num_bytes
        assert (journal.torn_tail is None) == (boundary == length), length
        # What was cut off must not come back between later frames.
        journal.begin(_owner(2), 0)
        journal.append(FrameKind.UPDATE, [[b"after"]])
        journal.close()
        assert _payloads(LocalJournal.open(folder, "id")) == [*found, b"after"], length


def test_every_cut_of_an_earlier_segment_is_corruption(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS, segment_bytes=1)
    first = _segments(tmp_path)[0]
    end = first.stat().st_size - 28  # the note that a next segment exists may be cut
    for length in reversed(range(end)):
        os.truncate(first, length)
        with pytest.raises(CorruptionError) as caught:
            LocalJournal.open(tmp_path, "id")
        assert caught.value.reason is Reason.JOURNAL_CORRUPT


@pytest.mark.parametrize("which", [1, 2, -1])
def test_a_missing_segment_is_corruption(tmp_path: Path, which: int) -> None:
    _write(tmp_path, PAYLOADS, segment_bytes=1)
    _segments(tmp_path)[which].unlink()
    with pytest.raises(CorruptionError, match="missing"):
        LocalJournal.open(tmp_path, "id")


def test_a_note_of_the_next_segment_that_was_cut_short_is_no_damage(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS, segment_bytes=1)
    first = _segments(tmp_path)[0]
    os.truncate(first, first.stat().st_size - 5)
    assert _payloads(LocalJournal.open(tmp_path, "id")) == PAYLOADS


@pytest.mark.parametrize(
    "num_bits", [pytest.param(1, id="one-per-byte"), pytest.param(8, marks=pytest.mark.slow)]
)
def test_every_flipped_bit_is_found(tmp_path: Path, num_bits: int) -> None:
    _write(tmp_path, [b"one", b"two" * 20, b"three"])
    (path,) = _segments(tmp_path)
    data = path.read_bytes()
    for position in range(len(data)):
        for bit in range(position % 8, position % 8 + num_bits):
            bit %= 8
            _overwrite(path, position, data[position] ^ 1 << bit)
            with pytest.raises(CorruptionError) as caught:
                LocalJournal.open(tmp_path, "id")
            _overwrite(path, position, data[position])
            assert caught.value.metadata["file"] == str(path)
            assert int(caught.value.metadata["offset"]) <= position


def test_zeros_after_the_last_frame_are_a_torn_tail(tmp_path: Path) -> None:
    _write(tmp_path, PAYLOADS)
    (path,) = _segments(tmp_path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(4096))
    journal = LocalJournal.open(tmp_path, "id")
    assert _payloads(journal) == PAYLOADS
    assert path.stat().st_size == size


class _FullDisk(PosixLogFile):
    """Takes a number of bytes, then says that there is no space, after a part of the write."""

    def __init__(self, path: Path, room: int) -> None:
        super().__init__(path)
        self.room = room
        self.can_truncate = True

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        data = b"".join(buffers)
        super().append([data[: self.room]])
        self.room -= len(data)
        if self.room < 0:
            self.room = 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def truncate(self, num_bytes: int) -> None:
        if not self.can_truncate:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().truncate(num_bytes)


@pytest.mark.parametrize("room", [0, 1, 30, 60, 70])
def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, room: int) -> None:
    files: list[_FullDisk] = []

    def open_file(path: Path) -> LogFile:
        files.append(_FullDisk(path, 10_000))
        return files[-1]

    journal = LocalJournal.open(tmp_path, "id", open_file=open_file)
    journal.begin(_owner(1), 0)
    journal.append(FrameKind.UPDATE, [[b"kept"]])
    size = journal.num_bytes
    files[-1].room = room
    with pytest.raises(ResourceExhaustedError) as caught:
        journal.append(FrameKind.UPDATE, [[b"x" * 100]])
    assert caught.value.reason is Reason.NO_SPACE
    assert _segments(tmp_path)[0].stat().st_size == size
    files[-1].room = 10_000
    assert journal.append(FrameKind.UPDATE, [[b"later"]]) == 2
    journal.close()
    assert _payloads(LocalJournal.open(tmp_path, "id")) == [b"kept", b"later"]


def test_a_write_that_cannot_be_undone_seals_the_log(tmp_path: Path) -> None:
    files: list[_FullDisk] = []

    def open_file(path: Path) -> LogFile:
        files.append(_FullDisk(path, 10_000))
        return files[-1]

    journal = LocalJournal.open(tmp_path, "id", open_file=open_file)
    journal.begin(_owner(1), 0)
    journal.append(FrameKind.UPDATE, [[b"kept"]])
    files[-1].room, files[-1].can_truncate = 10, False
    with pytest.raises(MembankError):
        journal.append(FrameKind.UPDATE, [[b"x" * 100]])
    with pytest.raises(UnavailableError, match="restart the shard"):
        journal.append(FrameKind.UPDATE, [[b"y"]])
    journal.close()
    assert _payloads(LocalJournal.open(tmp_path, "id")) == [b"kept"]


class _FailingSync(PosixLogFile):
    fails = False

    def sync(self) -> None:
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().sync()


def test_a_failed_sync_seals_the_log(tmp_path: Path) -> None:
    files: list[_FailingSync] = []

    def open_file(path: Path) -> LogFile:
        files.append(_FailingSync(path))
        return files[-1]

    journal = LocalJournal.open(tmp_path, "id", sync=True, open_file=open_file)
    journal.begin(_owner(1), 0)
    files[-1].fails = True
    with pytest.raises(UnavailableError):
        journal.append(FrameKind.UPDATE, [[b"x"]])
    files[-1].fails = False
    with pytest.raises(UnavailableError, match="fdatasync failed"):
        journal.append(FrameKind.UPDATE, [[b"y"]])


def test_append_needs_begin(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="not begun"):
        LocalJournal.open(tmp_path, "id").append(FrameKind.UPDATE, [[b"x"]])
