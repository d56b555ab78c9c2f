"""A journal in files on the owner's disk.

A segment is the file ``BASE-EPOCH.log``, named for the LSN that it continues from and the owner
that wrote it. Segments continue each other; the last one may end in a write that was never
finished, because its writer was killed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from membank.bank_service.store.journal.contract import (
    Frame,
    FrameKind,
    Ownership,
    Payload,
    TornTail,
)
from membank.bank_service.store.journal.frames import (
    SegmentHead,
    SegmentScan,
    check_chain,
    content_frames,
    corrupt,
    encode_batch,
    encode_continued,
    encode_head,
    scan,
)
from membank.bank_service.store.journal.log_file import LogFile, PosixLogFile
from membank.bank_service.store.local_objects import sync_folder
from membank.bank_service.store.objects import storage_error
from membank.wire.errors import InvalidArgumentError, Reason, UnavailableError

_LOG = logging.getLogger(__name__)
_SUFFIX = ".log"
_MARK_BYTES = 1 << 20


@dataclass(slots=True)
class _Segment:
    path: Path
    base: int
    """LSN before its first frame."""
    last: int
    """LSN of its last frame; `base` where it has none."""
    ownership: Ownership
    num_bytes: int
    marks: list[tuple[int, int]]
    """(LSN, offset after its frame), ascending: from where a later frame may be looked for."""

    @property
    def rank(self) -> tuple[int, int]:
        """What orders segments: an owner may start anew, before segments of earlier ones."""
        return self.ownership.epoch, self.base

    def add(self, last: int, num_bytes: int) -> None:
        """Take note of frames up to `last` that were written."""
        self.num_bytes += num_bytes
        self.last = last
        if self.num_bytes - self.marks[-1][1] >= _MARK_BYTES:
            self.marks.append((last, self.num_bytes))

    def offset_before(self, lsn: int) -> int:
        """Return an offset behind which every frame later than `lsn` is."""
        return max((offset for known, offset in self.marks if known <= lsn), default=0)


class LocalJournal:
    """A `Journal` in a directory.

    `append` returns after one write to the operating system: the frames survive the death of the
    process. With `sync`, it returns after one more `fdatasync`: they survive a loss of power.

    Make one with `LocalJournal.open`.
    """

    # Threads: `_lock` is held while the newest segment changes or another one takes its place, and
    # never while files are removed. `_segments` is replaced, never changed in place, so that the
    # properties read it without the lock.

    def __init__(
        self,
        folder: Path,
        identity: str,
        *,
        sync: bool,
        segment_bytes: int,
        open_file: Callable[[Path], LogFile],
        remove_file: Callable[[Path], None],
    ) -> None:
        self._folder = folder
        self._identity = identity
        self._sync = sync
        self._segment_bytes = segment_bytes
        self._open_file = open_file
        self._remove_file = remove_file
        self._lock = Lock()
        self._segments: tuple[_Segment, ...] = ()
        self._given_up: tuple[_Segment, ...] = ()
        self._file: LogFile | None = None
        self._failure: str | None = None
        self.torn_tail: TornTail | None = None
        """What was cut off at open; None = nothing."""

    @classmethod
    def open(
        cls,
        folder: Path,
        identity: str,
        *,
        sync: bool = False,
        segment_bytes: int = 64 << 20,
        open_file: Callable[[Path], LogFile] = PosixLogFile,
        remove_file: Callable[[Path], None] = Path.unlink,
    ) -> LocalJournal:
        """Open the journal in `folder`, checking every byte and cutting off a torn tail.

        Parameters
        ----------
        folder
            Directory of the segments; made if missing.
        identity
            Names bank and partition; a journal of another is refused.
        sync
            True to make each batch survive a loss of power before `append` returns.
        segment_bytes
            Size from which on a new segment is begun.
        open_file
            Makes the file of a new segment.
        remove_file
            Removes that of a segment.

        Raises
        ------
        CorruptionError
            If a byte of a complete frame was changed, or frames are missing (JOURNAL_CORRUPT;
            metadata `file` and `offset`).
        FailedPreconditionError
            If the journal belongs to another bank or partition.
        """
        journal = cls(
            folder,
            identity,
            sync=sync,
            segment_bytes=segment_bytes,
            open_file=open_file,
            remove_file=remove_file,
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            journal._scan()
        except OSError as err:
            raise storage_error(err, str(folder)) from err
        return journal

    @property
    def last_lsn(self) -> int:
        # docstring inherited
        return self._segments[-1].last if self._segments else 0

    @property
    def base(self) -> int:
        # docstring inherited
        return self._segments[0].base if self._segments else 0

    @property
    def num_bytes(self) -> int:
        # docstring inherited
        return sum(segment.num_bytes for segment in self._segments)

    @property
    def ownership(self) -> Ownership | None:
        # docstring inherited
        return self._segments[-1].ownership if self._segments else None

    def replay(self, after_lsn: int) -> Iterator[Frame]:
        # docstring inherited
        with self._lock:
            # A write that is going on, or that will be undone, ends after these bytes.
            parts = [
                (segment.path, segment.offset_before(after_lsn), segment.num_bytes)
                for segment in self._segments
                if segment.last > after_lsn
            ]
        for path, start, end in parts:
            data = _read(path, start, end)
            yield from content_frames(str(path), data, after_lsn=after_lsn, offset=start)

    def begin(self, ownership: Ownership, after_lsn: int) -> None:
        # docstring inherited
        with self._lock:
            # A log that ends before `after_lsn` is replaced by a segment that says so, rather than
            # removed first: a crash in between would look like a journal that was lost.
            if self.last_lsn < after_lsn:
                self._give_up()
            self._require_order(ownership, base := max(after_lsn, self.last_lsn))
            if self._sync:
                self._sync_parents()
            self._roll(ownership, base)
            self._unlink(self._given_up)
            self._given_up = ()
        self.trim(after_lsn)

    def append(self, kind: FrameKind, payloads: Sequence[Payload]) -> int:
        # docstring inherited
        with self._lock:
            self.require_usable()
            if not payloads:
                return self.last_lsn
            buffers = encode_batch(kind, self.last_lsn, payloads)
            segment = self._segments[-1]
            if segment.num_bytes >= self._segment_bytes and segment.last > segment.base:
                segment = self._roll(segment.ownership, segment.last)
            self._write(segment, buffers)
            segment.add(segment.last + len(payloads), sum(map(len, buffers)))
            return segment.last

    def trim(self, lsn: int) -> None:
        # docstring inherited
        # What can go without a new segment goes first: on a full disk it makes room for that.
        self._remove(self._covered(lsn))
        with self._lock:
            if self._segments and self._failure is None and self._file is not None:
                current = self._segments[-1]
                # Also where later frames share it with earlier ones: those go once they are covered.
                if current.base < min(current.last, lsn):
                    self._roll(current.ownership, current.last)
        self._remove(self._covered(lsn))

    def discard(self) -> None:
        # docstring inherited
        with self._lock:
            self._give_up()

    def close(self) -> None:
        # docstring inherited
        with self._lock:
            self._close_file()
            self._failure = self._failure or "it is closed"

    def require_usable(self) -> None:
        # docstring inherited
        if self._failure is not None or self._file is None:
            raise self._unusable()

    def _unusable(self) -> UnavailableError:
        return UnavailableError(
            f"the journal in {self._folder} accepts nothing: "
            f"{self._failure or 'it was not begun'}; restart the shard",
            reason=Reason.STORE_FAILED,
            metadata={"file": str(self._folder)},
        )

    def _covered(self, lsn: int) -> tuple[_Segment, ...]:
        return tuple(segment for segment in self._segments[:-1] if segment.last <= lsn)

    def _give_up(self) -> None:
        self._close_file()
        self._given_up += self._segments
        self._segments = ()

    def _require_order(self, ownership: Ownership, base: int) -> None:
        """Make sure that the next segment is the last one by rank."""
        rank = (ownership.epoch, base)
        if any(segment.rank > rank for segment in self._segments):
            raise InvalidArgumentError(
                f"owner {ownership.epoch} of {self._folder} comes after owner "
                f"{self._segments[-1].ownership.epoch}; owners are counted up"
            )
        if any(segment.rank >= rank for segment in self._given_up):
            # Not in one step, then: what was given up has the names that come later.
            self._unlink(self._given_up)
            self._given_up = ()

    def _sync_parents(self) -> None:
        """Make the directory itself survive a loss of power; others made it, and did not."""
        for folder in self._folder.parents:
            with suppress(PermissionError):  # not made by us, then
                sync_folder(folder)

    def _write(self, segment: _Segment, buffers: Sequence[bytes | memoryview]) -> None:
        """Write a batch, or leave the segment as it was, or seal the journal."""
        assert self._file is not None
        try:
            self._file.append(buffers)
        except OSError as err:
            self._undo(segment)
            raise storage_error(err, str(segment.path)) from err
        if self._sync:
            try:
                self._file.sync()
            except OSError as err:
                # After a failed fsync the kernel may have dropped the pages: a second one that
                # succeeds would prove nothing.
                self._failure = f"fdatasync failed ({err})"
                raise self._unusable() from err

    def _undo(self, segment: _Segment) -> None:
        assert self._file is not None
        try:
            self._file.truncate(segment.num_bytes)
            if self._sync:
                # Else a loss of power could bring back frames that were reported as failed.
                self._file.sync()
        except OSError as err:
            self._failure = f"a failed write could not be undone ({err})"

    def _roll(self, ownership: Ownership, base: int) -> _Segment:
        """Begin a new segment; the present one stays open until the new one is whole."""
        path = self._folder / _name(base, ownership.epoch)
        stored = (*self._given_up, *self._segments)
        follows = stored[-1].last if stored else base
        data = encode_head(SegmentHead(self._identity, ownership, base, follows))
        self._make_segment(path, data)
        self._segments = tuple(segment for segment in self._segments if segment.path != path)
        self._given_up = tuple(segment for segment in self._given_up if segment.path != path)
        segment = _Segment(path, base, base, ownership, len(data), [(base, len(data))])
        self._segments += (segment,)
        return segment

    def _make_segment(self, path: Path, head: bytes) -> None:
        file: LogFile | None = None
        try:
            with suppress(FileNotFoundError):
                self._remove_file(path)  # an empty segment of the same place and epoch
            file = self._open_file(path)
            file.append([head])
            if self._sync:
                file.sync()
                sync_folder(self._folder)
        except OSError as err:
            if file is not None:
                file.close()
            with suppress(OSError):
                path.unlink(missing_ok=True)
            raise storage_error(err, str(path)) from err
        if self._file is not None:
            # Without this note a lost segment would look like the end of the log. If it cannot be
            # written, or only in part, nothing else is wrong.
            with suppress(OSError):
                self._file.append([encode_continued(self.last_lsn)])
        self._close_file()
        self._file = file

    def _remove(self, segments: Sequence[_Segment]) -> None:
        # Oldest first: a crash in between leaves a gap at the start, never one in the middle.
        for segment in segments:
            self._unlink([segment])
            with self._lock:
                self._segments = tuple(kept for kept in self._segments if kept is not segment)

    def _unlink(self, segments: Sequence[_Segment]) -> None:
        for segment in segments:
            try:
                with suppress(FileNotFoundError):
                    self._remove_file(segment.path)
            except OSError as err:
                raise storage_error(err, str(segment.path)) from err

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # ---- opening

    def _scan(self) -> None:
        paths = sorted(self._folder.glob(f"*{_SUFFIX}"), key=_rank_of)
        scans = [scan(str(path), path.read_bytes()) for path in paths]
        for path, found in zip(paths, scans, strict=True):
            _require_name(path, found)
        start = check_chain(scans, self._identity)
        segments = [
            _Segment(path, s.head.base, s.last, s.head.ownership, s.num_bytes, [(s.head.base, 0)])
            for path, s in zip(paths, scans, strict=True)
            if s.head is not None
        ]
        if paths:
            self._cut_tail(paths[-1], scans[-1])
        self._segments = tuple(segments[start:])
        self._remove(segments[:start])

    def _cut_tail(self, path: Path, found: SegmentScan) -> None:
        if found.torn is not None:
            self.torn_tail = found.torn
            _LOG.warning("cut %d bytes of an unfinished write off %s", found.torn.num_bytes, path)
            os.truncate(path, found.num_bytes)
        if found.head is None:
            self._remove_file(path)


def _read(path: Path, start: int, end: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), end - start, start)
    except OSError as err:
        raise storage_error(err, str(path)) from err
    if len(data) < end - start:
        raise corrupt(str(path), start + len(data), "the file became shorter")
    return data


def _require_name(path: Path, found: SegmentScan) -> None:
    head = found.head
    if head is not None and path.name != _name(head.base, head.ownership.epoch):
        raise corrupt(str(path), 0, f"it holds {_name(head.base, head.ownership.epoch)}")


def _rank_of(path: Path) -> tuple[int, int]:
    """Return the rank of a segment by its name."""
    base, _, epoch = path.name.removesuffix(_SUFFIX).partition("-")
    try:
        return int(epoch), int(base)
    except ValueError as err:
        raise corrupt(str(path), 0, "its name is not that of a segment") from err


def _name(base: int, epoch: int) -> str:
    return f"{base:020d}-{epoch:010d}{_SUFFIX}"
