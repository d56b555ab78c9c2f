"""Whatever happens to the bytes of a journal, it yields what was appended, or it says what is wrong.

Every cut, every flipped bit, every loss, swap and copy of a part is tried. What a reader of the
journal alone cannot notice is shown at the end, with what tells it all the same.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from journal_rigs import IDENTITY, PARTITION, LocalRig, MemoryObjects, ObjectRig
from membank.bank_service.store.journal import FrameKind, Journal, LocalJournal, ObjectJournal
from membank.bank_service.store.journal.frames import HEADER_BYTES, read_frames
from membank.wire.errors import CorruptionError, Reason

Frames = list[tuple[int, FrameKind, bytes]]
Parts = Mapping[str, bytes]

SIZES = [5, 0, 133, 160, 1, 120, 17, 190, 164, 8]


def _fill(journal: Journal) -> None:
    """Append batches of one and two frames, as updates and as images."""
    contents = [bytes([number]) * size for number, size in enumerate(SIZES, 1)]
    journal.append(FrameKind.UPDATE, [[content] for content in contents[:2]])
    for number in range(2, 6):
        journal.append(FrameKind.IMAGE, [[contents[number]]])
    journal.append(FrameKind.UPDATE, [[content] for content in contents[6:8]])
    journal.append(FrameKind.UPDATE, [[content] for content in contents[8:]])


class Log(ABC):
    """A journal of some 2 KB as named parts, and how to read another version of them."""

    parts: Parts
    frames: Frames

    @abstractmethod
    def open(self, parts: Parts) -> Journal:
        """Open the journal that has these parts instead."""

    @abstractmethod
    def path(self, name: str) -> str:
        """Return what errors call a part."""

    def read(self, parts: Parts) -> tuple[Frames, Journal]:
        """Return what the journal that has these parts yields."""
        journal = self.open(parts)
        return [(f.lsn, f.kind, bytes(f.payload)) for f in journal.replay(0)], journal

    def with_part(self, name: str, data: bytes) -> Parts:
        return {**self.parts, name: data}

    def names(self) -> list[str]:
        """Return the names of the parts, oldest first."""
        return sorted(self.parts)

    def cuts(self) -> Iterator[tuple[str, int]]:
        """Yield every part with every length that it may be cut to."""
        for name in self.names():
            yield from ((name, length) for length in range(len(self.parts[name])))

    def frame_ends(self, name: str) -> list[int]:
        """Return the offsets where frames of a part end, and 0."""
        sizes = [HEADER_BYTES + len(f.payload) for f in read_frames(name, self.parts[name])]
        return [0, *itertools.accumulate(sizes)]

    def must_refuse(self, parts: Parts, *names: str) -> int:
        """Check that these parts are refused, and one of `names` named; return the offset."""
        with pytest.raises(CorruptionError) as caught:
            self.open(parts)
        assert caught.value.reason is Reason.JOURNAL_CORRUPT
        assert caught.value.metadata["file"] in {self.path(name) for name in names}
        assert caught.value.metadata["file"] in str(caught.value)
        return int(caught.value.metadata["offset"])

    def may_refuse(self, parts: Parts) -> tuple[Frames, Journal] | None:
        """Return what these parts yield, None if they are refused."""
        try:
            return self.read(parts)
        except CorruptionError:
            return None


class LocalLog(Log):
    """Four segments in a directory."""

    def __init__(self, folder: Path) -> None:
        rig = LocalRig(folder, segment_bytes=350)
        journal = rig.start()
        _fill(journal)
        self.frames = [(f.lsn, f.kind, bytes(f.payload)) for f in journal.replay(0)]
        journal.close()
        self._folder = folder
        self.parts = {path.name: path.read_bytes() for path in folder.glob("*.log")}
        self._written: Parts = self.parts

    def open(self, parts: Parts) -> LocalJournal:
        # An opening cuts torn tails off, and removes what was never begun.
        sizes = {path.name: path.stat().st_size for path in self._folder.glob("*.log")}
        for name in sizes.keys() - parts.keys():
            (self._folder / name).unlink()
        for name, data in parts.items():
            if self._written.get(name) != data or sizes.get(name) != len(data):
                self._write(self._folder / name, data)
        self._written = parts
        return LocalJournal.open(self._folder, IDENTITY)

    def path(self, name: str) -> str:
        return str(self._folder / name)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        # In place: truncating a file and writing it again costs ext4 a flush.
        with path.open("r+b" if path.exists() else "xb", buffering=0) as file:
            file.write(data)
            file.truncate()


class ObjectLog(Log):
    """A fence and seven batches in memory."""

    def __init__(self) -> None:
        content: dict[str, bytes] = {}
        journal = ObjectRig(lambda: MemoryObjects(content)).start()
        _fill(journal)
        self.frames = [(f.lsn, f.kind, bytes(f.payload)) for f in journal.replay(0)]
        self.parts = content

    def open(self, parts: Parts) -> ObjectJournal:
        # One after the other: threads would cost more than all the rest.
        store = MemoryObjects(dict(parts))
        return ObjectJournal.open(store, PARTITION, IDENTITY, reads_ahead=1)

    def path(self, name: str) -> str:
        return f"dict://bank/{name}"


@pytest.fixture
def local(tmp_path: Path) -> LocalLog:
    return LocalLog(tmp_path / "journal")


@pytest.fixture
def objects() -> ObjectLog:
    return ObjectLog()


@pytest.fixture(params=["local", "objects"])
def log(request: pytest.FixtureRequest) -> Log:
    found: Log = request.getfixturevalue(request.param)
    return found


def test_the_logs_are_what_the_other_tests_need(local: LocalLog, objects: ObjectLog) -> None:
    for log, num_parts in ((local, 4), (objects, 8)):
        assert log.read(log.parts)[0] == log.frames
        assert [frame[0] for frame in log.frames] == list(range(1, 11))
        assert len(log.parts) == num_parts
        assert 1400 < sum(map(len, log.parts.values())) < 3000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_flipped_bit(log: Log) -> None:
    for name, position in log.cuts():
        data = log.parts[name]
        for bit in range(8):
            flipped = bytes([data[position] ^ 1 << bit])
            parts = log.with_part(name, data[:position] + flipped + data[position + 1 :])
            assert log.must_refuse(parts, name) <= position


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_cut_of_a_segment(local: LocalLog) -> None:
    *_, last = local.names()
    num_torn = num_whole = 0
    for name, length in local.cuts():
        parts = local.with_part(name, local.parts[name][:length])
        ends = local.frame_ends(name)
        if name == last and length >= ends[1]:
            frames, journal = local.read(parts)
            assert frames == local.frames[: len(frames)]
            assert isinstance(journal, LocalJournal)
            if length in ends:
                assert journal.torn_tail is None  # nobody can tell
            else:
                assert journal.torn_tail is not None
                assert journal.torn_tail.offset == max(end for end in ends if end < length)
                num_torn += 1
        elif name != last and length >= ends[-2]:
            # Only the note that there is a next segment is missing, and that one is there.
            assert local.read(parts)[0] == local.frames
            num_whole += 1
        else:
            local.must_refuse(parts, name)
    assert num_torn > 100
    assert num_whole == 3 * HEADER_BYTES


@pytest.mark.slow
def test_every_cut_of_an_object(objects: ObjectLog) -> None:
    for name, length in objects.cuts():
        offset = objects.must_refuse(objects.with_part(name, objects.parts[name][:length]), name)
        assert offset <= length


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_stretch_of_zeros(log: Log) -> None:
    last = log.names()[-1]
    for name, start in log.cuts():
        data = log.parts[name]
        for end in {min(start + size, len(data)) for size in (16, 64, 512)} | {len(data)}:
            zeroed = data[:start] + bytes(end - start) + data[end:]
            if zeroed == data:
                continue
            if end == len(data) and name == last and isinstance(log, LocalLog):
                # What a file system may leave of writes that lost their power.
                result = log.may_refuse(log.with_part(name, zeroed))
                assert result is None or result[0] == log.frames[: len(result[0])]
            elif end == len(data) and isinstance(log, LocalLog):
                result = log.may_refuse(log.with_part(name, zeroed))
                assert result is None or result[0] == log.frames
            else:
                log.must_refuse(log.with_part(name, zeroed), name)


def test_bytes_after_the_end(log: Log) -> None:
    frame = next(iter(log.parts.values()))[:40]
    for name in log.names():
        for extra in (b"\0", bytes(100), b"x", b"x" * 100, frame):
            result = log.may_refuse(log.with_part(name, log.parts[name] + extra))
            # On a disk they look like a write that was not finished.
            assert result is None or result[0] == log.frames
            assert result is None or isinstance(log, LocalLog)


def test_every_loss_of_segments(local: LocalLog) -> None:
    names = local.names()
    num_refused = 0
    for kept in _subsets(names):
        result = local.may_refuse({name: local.parts[name] for name in kept})
        if result is None:
            num_refused += 1
            continue
        frames, journal = result
        # Only the oldest ones, or all, can be missing, and `base` tells whoever knows the manifest.
        assert kept == names[len(names) - len(kept) :]
        assert frames == (local.frames[journal.base :] if kept else [])
    assert num_refused == 2 ** len(names) - len(names) - 1


def test_every_loss_of_objects(objects: ObjectLog) -> None:
    names = objects.names()
    for kept in _subsets(names):
        result = objects.may_refuse({name: objects.parts[name] for name in kept})
        rest = kept[1:] if kept[:1] == names[:1] else kept
        has_gap = bool(rest) and rest != names[names.index(rest[0]) : names.index(rest[-1]) + 1]
        assert (result is None) == has_gap
        if result is not None:
            # The oldest can be missing, which `base` tells, and the newest (see below).
            frames, journal = result
            assert frames == objects.frames[journal.base : journal.last_lsn]


def test_every_swap(log: Log) -> None:
    for one, other in itertools.combinations(log.names(), 2):
        parts = {**log.parts, one: log.parts[other], other: log.parts[one]}
        log.must_refuse(parts, one, other)


def test_every_copy_over_another(log: Log) -> None:
    for one, other in itertools.permutations(log.names(), 2):
        log.must_refuse(log.with_part(other, log.parts[one]), other)


def test_every_copy_under_a_new_name(log: Log) -> None:
    for one in log.names():
        for new in _plausible_names(log):
            log.must_refuse(log.with_part(new, log.parts[one]), new)


def test_every_part_under_another_name(log: Log) -> None:
    for one in log.names():
        for new in _plausible_names(log):
            parts = dict(log.parts)
            parts[new] = parts.pop(one)
            with pytest.raises(CorruptionError):
                log.open(parts)


def test_parts_of_two_histories(tmp_path: Path) -> None:
    # The same bank, restored from a copy and gone on with: each segment is whole in itself.
    logs: list[Log] = [LocalLog(tmp_path / "a"), LocalLog(tmp_path / "b")]
    assert logs[0].names() == logs[1].names()
    for name in logs[0].names():
        result = logs[0].may_refuse(logs[0].with_part(name, logs[1].parts[name]))
        assert result is None or result[0] == logs[0].frames


def test_what_the_journal_alone_cannot_know(local: LocalLog, objects: ObjectLog) -> None:
    """A log that was cut exactly between two frames, or lost its newest object, looks whole.

    Of a log on a disk, what is lost then was written after the last segment began; an owner that
    starts anew in the meantime, or a manifest that is further, tells. A medium that loses whole
    frames at the end, and nothing else, and a bucket that loses its newest objects, do not.
    """
    *_, last = local.names()
    for end in local.frame_ends(last)[1:]:
        frames, journal = local.read(local.with_part(last, local.parts[last][:end]))
        assert frames == local.frames[: len(frames)]
        assert isinstance(journal, LocalJournal)
        assert journal.torn_tail is None
    names = objects.names()
    for count in range(1, len(names)):
        frames, remote = objects.read({name: objects.parts[name] for name in names[:count]})
        assert frames == objects.frames[: remote.last_lsn]


def _subsets(names: list[str]) -> Iterator[list[str]]:
    for size in range(len(names) + 1):
        yield from map(list, itertools.combinations(names, size))


def _plausible_names(log: Log) -> list[str]:
    if isinstance(log, LocalLog):
        pairs = itertools.product((0, 1, 5, 10, 11), (1, 2))
        names = [f"{base:020d}-{epoch:010d}.log" for base, epoch in pairs]
    else:
        names = [f"partitions/0003/log/{number:010d}" for number in range(1, 12)]
    return [name for name in names if name not in log.parts]
