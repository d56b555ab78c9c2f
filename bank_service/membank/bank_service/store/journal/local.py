"""A journal in files on the owner's disk.

A segment is the file ``BASE-EPOCH.log``, named for the LSN that it continues from and the owner
that wrote it. Segments continue each other; the last one may end in a write that was never
finished, because its writer was killed. A segment that is trimmed becomes a spare (`spares`), which a
later one is written over; what is left of it there is cut off when the journal is closed or opened.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
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
    encode_batch,
    encode_continued,
    encode_head,
    scan,
)
from membank.bank_service.store.journal.log_file import LogFile, PosixLogFile
from membank.bank_service.store.journal.segment_file import (
    SEGMENT_SUFFIX,
    Segment,
    new_life,
    rank_of,
    read_part,
    require_name,
    segment_name,
    segment_of,
)
from membank.bank_service.store.journal.spares import Spare, Spares
from membank.bank_service.store.local_objects import sync_folder
from membank.bank_service.store.objects import storage_error
from membank.wire.errors import (
    CorruptionError,
    InvalidArgumentError,
    MembankError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)

_LOG = logging.getLogger(__name__)


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
        spare_bytes: int,
        open_file: Callable[[Path], LogFile],
        remove_file: Callable[[Path], None],
    ) -> None:
        self._folder = folder
        self._identity = identity
        self._sync = sync
        self._segment_bytes = segment_bytes
        self._open_file = open_file
        self._remove_file = remove_file
        self._spares = Spares(folder, spare_bytes, sync=sync, remove_file=remove_file)
        self._lock = Lock()
        self._segments: tuple[Segment, ...] = ()
        self._given_up: tuple[Segment, ...] = ()
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
        spare_bytes: int = 0,
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
        spare_bytes
            Bytes of trimmed segments that are kept, at most, for the next ones to be written over.
        open_file
            Opens the file of a new segment, or a spare.
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
            spare_bytes=spare_bytes,
            open_file=open_file,
            remove_file=remove_file,
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            journal._spares.sweep()
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
                (segment, segment.offset_before(after_lsn), segment.num_bytes)
                for segment in self._segments
                if segment.last > after_lsn
            ]
        for segment, start, end in parts:
            yield from self._replay_segment(segment, start, end, after_lsn)

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
        # Nothing is kept: this may be a journal that is only begun to be rid of what is in it.
        self._trim(after_lsn, self._remove)

    def _replay_segment(
        self, segment: Segment, start: int, end: int, after_lsn: int
    ) -> Iterator[Frame]:
        # All of it is there, whatever it was written over.
        life = None if segment.life is None else replace(segment.life, reused_bytes=0)
        path = str(segment.path)
        try:
            data = read_part(segment.path, start, end)
            yield from content_frames(path, data, after_lsn=after_lsn, offset=start, life=life)
        except CorruptionError as err:
            with self._lock:
                is_trimmed = all(kept is not segment for kept in self._segments)
            if not is_trimmed:
                raise
            # While it was read, the file became a spare, and was written over.
            raise storage_error(FileNotFoundError(path), path) from err

    def append(self, kind: FrameKind, payloads: Sequence[Payload]) -> int:
        # docstring inherited
        with self._lock:
            self.require_usable()
            if not payloads:
                return self.last_lsn
            segment = self._segments[-1]
            if segment.num_bytes >= self._segment_bytes and segment.last > segment.base:
                segment = self._roll(segment.ownership, segment.last)
            buffers = encode_batch(kind, self.last_lsn, payloads, segment.life)
            try:
                self._write(segment, buffers)
            except ResourceExhaustedError:
                # What is kept for speed must not be what there is no space for.
                with suppress(OSError):
                    self._spares.drop()
                raise
            segment.add(segment.last + len(payloads), sum(map(len, buffers)))
            return segment.last

    def trim(self, lsn: int) -> None:
        # docstring inherited
        self._trim(lsn, self._retire)

    def _trim(self, lsn: int, remove: Callable[[Sequence[Segment]], None]) -> None:
        # What can go without a new segment goes first: on a full disk it makes room for that.
        remove(self._covered(lsn))
        with self._lock:
            if self._segments and self._failure is None and self._file is not None:
                current = self._segments[-1]
                # Also where later frames share it with earlier ones: those go once they are covered.
                if current.base < min(current.last, lsn):
                    self._roll(current.ownership, current.last)
        remove(self._covered(lsn))

    def erase(self) -> None:
        # docstring inherited
        with self._lock:
            try:
                self._spares.drop()
                for segment in self._segments:
                    self._cut(segment)
            except OSError as err:
                raise storage_error(err, str(self._folder)) from err

    def discard(self) -> None:
        # docstring inherited
        with self._lock:
            self._give_up()

    def close(self) -> None:
        # docstring inherited
        try:
            self.erase()
        except MembankError as err:
            # Nothing is lost: the next opening does the same.
            _LOG.info("%s keeps what was written over: %s", self._folder, err)
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

    def _covered(self, lsn: int) -> tuple[Segment, ...]:
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

    def _write(self, segment: Segment, buffers: Sequence[bytes | memoryview]) -> None:
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

    def _undo(self, segment: Segment) -> None:
        assert self._file is not None
        try:
            self._file.truncate(segment.num_bytes)
            if self._sync:
                # Else a loss of power could bring back frames that were reported as failed.
                self._file.sync()
        except OSError as err:
            self._failure = f"a failed write could not be undone ({err})"

    def _roll(self, ownership: Ownership, base: int) -> Segment:
        """Begin a new segment; the present one stays open until the new one is whole."""
        path = self._folder / segment_name(base, ownership.epoch)
        stored = (*self._given_up, *self._segments)
        follows = stored[-1].last if stored else base
        head = SegmentHead(self._identity, ownership, base, follows)
        segment = self._make_segment(path, head)
        self._segments = tuple(kept for kept in self._segments if kept.path != path)
        self._given_up = tuple(kept for kept in self._given_up if kept.path != path)
        self._segments += (segment,)
        return segment

    def _make_segment(self, path: Path, head: SegmentHead) -> Segment:
        spare = self._spares.take()
        if spare is not None:
            head = replace(head, life=new_life(spare))
        data = encode_head(head)
        file = self._open_segment(path, data, spare)
        self._announce_next()
        self._close_file()
        self._file = file
        marks = [(head.base, len(data))]
        return Segment(path, head.base, head.base, head.ownership, len(data), marks, life=head.life)

    def _open_segment(self, path: Path, head: bytes, spare: Spare | None) -> LogFile:
        """Return the file of a new segment, of which the head is written."""
        file: LogFile | None = None
        # A spare gets the name of a segment once it has the head of one, so that what it held
        # before is never taken for something else.
        place = path if spare is None else spare.path
        try:
            with suppress(FileNotFoundError):
                self._remove_file(path)  # an empty segment of the same place and epoch
            file = self._open_file(place)
            file.append([head])
            if self._sync:
                file.sync()
            if spare is not None:
                place.rename(path)
            if self._sync:
                sync_folder(self._folder)
        except OSError as err:
            if file is not None:
                file.close()
            with suppress(OSError):
                place.unlink(missing_ok=True)
                path.unlink(missing_ok=True)
            raise storage_error(err, str(path)) from err
        return file

    def _announce_next(self) -> None:
        """Say at the end of the present segment, if there is one, that there is a next one."""
        if self._file is None:
            return
        current = self._segments[-1]
        note = encode_continued(current.last, current.life)
        # Without this note a lost segment would look like the end of the log. If it cannot be
        # written, or only in part, nothing else is wrong.
        with suppress(OSError):
            self._file.append([note])
            current.note_bytes = len(note)

    def _remove(self, segments: Sequence[Segment]) -> None:
        # Oldest first: a crash in between leaves a gap at the start, never one in the middle.
        for segment in segments:
            self._unlink([segment])
            self._forget(segment, None)

    def _retire(self, segments: Sequence[Segment]) -> None:
        """Make spares of segments, as far as those are wanted; oldest first, as in `_remove`."""
        for segment in segments:
            try:
                spare = self._spares.retire(segment.path)
            except FileNotFoundError:
                spare = None
            except OSError as err:
                raise storage_error(err, str(segment.path)) from err
            self._forget(segment, spare)

    def _forget(self, segment: Segment, spare: Spare | None) -> None:
        with self._lock:
            self._segments = tuple(kept for kept in self._segments if kept is not segment)
            # Not before: who reads the segment meanwhile must find out that it is gone.
            if spare is not None:
                self._spares.add(spare)

    def _cut(self, segment: Segment) -> None:
        """Cut off what a segment was written over, as far as it is still there."""
        if segment.life is None or segment.is_cut:
            return
        if segment is not self._segments[-1] or self._file is None:
            with suppress(FileNotFoundError):  # it is becoming a spare
                os.truncate(segment.path, segment.num_bytes + segment.note_bytes)
        elif self._failure is None:
            self._file.truncate(segment.num_bytes)
        segment.is_cut = True

    def _unlink(self, segments: Sequence[Segment]) -> None:
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
        paths = sorted(self._folder.glob(f"*{SEGMENT_SUFFIX}"), key=rank_of)
        scans = [scan(str(path), path.read_bytes()) for path in paths]
        for path, found in zip(paths, scans, strict=True):
            require_name(path, found)
        start = check_chain(scans, self._identity)
        segments = [
            segment_of(path, s.head, s)
            for path, s in zip(paths, scans, strict=True)
            if s.head is not None
        ]
        for path, found in zip(paths, scans, strict=True):
            if found.num_stale:
                os.truncate(path, found.num_bytes)
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
