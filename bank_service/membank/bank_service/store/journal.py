"""The redo log of one partition: framed, checksummed, in segments, on the owner's disk.

A segment is a file named for the LSN that it continues from. It is a sequence of frames::

    magic "MBJF" | u8 kind | 3 zero bytes | u32 length | u64 lsn | u32 payload CRC | u32 header CRC
    payload (`length` bytes)

with little-endian numbers and CRC-32C. The first frame of a segment says whose it is (bank,
partition, epoch). LSNs count from 1 without gaps. Header and payload are checked apart, so that
a frame that was cut short (which a killed writer leaves) is told from one that was damaged.
"""

from __future__ import annotations

import json
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Protocol

from membank.bank_service.store.local_objects import sync_folder, write_fully
from membank.bank_service.store.objects import storage_error
from membank.wire.crc import crc32c
from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
    UnavailableError,
)

_LOG = logging.getLogger(__name__)
_MAGIC = b"MBJF"
_HEADER = struct.Struct("<4sB3xIQII")
_CHECKED = struct.Struct("<4sB3xIQI")
_SUFFIX = ".log"
MAX_FRAME_BYTES = (1 << 32) - 1
"""Largest payload of one frame."""


class FrameKind(IntEnum):
    """What a frame holds; the numbers are part of the format."""

    SEGMENT = 1
    """Begins a segment: whose it is. Its LSN is that after which the segment begins."""
    UPDATE = 2
    """An update."""
    CONTINUED = 3
    """Ends a segment: there is a next one. Its LSN is that of the frame before."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One record of the log."""

    lsn: int
    """Its number."""
    kind: FrameKind
    """What it holds."""
    payload: memoryview
    """Its bytes."""


@dataclass(frozen=True, slots=True)
class TornTail:
    """What a writer that was killed left unfinished; it was never acknowledged."""

    file: str
    """The segment."""
    offset: int
    """Where it was cut."""
    num_bytes: int
    """Bytes that were cut off."""


class LogFile(Protocol):
    """An append-only file; the seam at which tests inject failures."""

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Write `buffers` at the end; an error may leave a part of them."""

    def truncate(self, num_bytes: int) -> None:
        """Cut the file to `num_bytes` and go on appending there."""

    def sync(self) -> None:
        """Make what was appended survive a loss of power."""

    def close(self) -> None:
        """Release the file."""


class PosixLogFile:
    """A `LogFile` on a local file system."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        # docstring inherited
        write_fully(self._handle, list(buffers))

    def truncate(self, num_bytes: int) -> None:
        # docstring inherited
        os.ftruncate(self._handle, num_bytes)

    def sync(self) -> None:
        # docstring inherited
        os.fdatasync(self._handle)

    def close(self) -> None:
        # docstring inherited
        os.close(self._handle)


@dataclass(slots=True)
class _Segment:
    path: Path
    base: int
    """LSN before its first frame."""
    last: int
    """LSN of its last frame; `base` where it has none."""
    epoch: int
    num_bytes: int


class Journal:
    """The redo log of one partition. One thread at a time may change it.

    Make one with `Journal.open`, read it with `replay`, then `begin` before the first `append`.

    Notes
    -----
    `append` returns after one write to the operating system: the frame survives the death of the
    process. With `sync`, it returns after `fdatasync`: the frame survives a loss of power.
    """

    def __init__(
        self,
        folder: Path,
        identity: str,
        *,
        sync: bool,
        segment_bytes: int,
        open_file: Callable[[Path], LogFile],
    ) -> None:
        self._folder = folder
        self._identity = identity
        self._sync = sync
        self._segment_bytes = segment_bytes
        self._open_file = open_file
        self._segments: list[_Segment] = []
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
        segment_bytes: int = 16 << 20,
        open_file: Callable[[Path], LogFile] = PosixLogFile,
    ) -> Journal:
        """Open the journal in `folder`, checking every byte and cutting off a torn tail.

        Parameters
        ----------
        folder
            Directory of the segments; made if missing.
        identity
            Names bank and partition; a journal of another is refused.
        sync
            True to make each frame survive a loss of power before `append` returns.
        segment_bytes
            Size from which on a new segment is begun.
        open_file
            Makes the file of a new segment.

        Raises
        ------
        CorruptionError
            If a byte of a complete frame was changed, or frames are missing (JOURNAL_CORRUPT;
            metadata `file` and `offset`).
        FailedPreconditionError
            If the journal belongs to another bank or partition.
        """
        journal = cls(folder, identity, sync=sync, segment_bytes=segment_bytes, open_file=open_file)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            journal._scan()
        except OSError as err:
            raise storage_error(err, str(folder)) from err
        return journal

    @property
    def last_lsn(self) -> int:
        """LSN of the last frame; 0 = none was ever written."""
        return self._segments[-1].last if self._segments else 0

    @property
    def base(self) -> int:
        """LSN after which the stored frames begin; 0 = none is stored, or they begin with 1."""
        return self._segments[0].base if self._segments else 0

    @property
    def epoch(self) -> int:
        """Epoch of the owner that wrote the newest segment; 0 = none."""
        return self._segments[-1].epoch if self._segments else 0

    @property
    def num_bytes(self) -> int:
        """Bytes on disk."""
        return sum(segment.num_bytes for segment in self._segments)

    def replay(self, after_lsn: int) -> Iterator[Frame]:
        """Yield the frames after `after_lsn`, oldest first."""
        for segment in self._segments:
            if segment.last > after_lsn:
                for frame in _frames(segment.path, segment.path.read_bytes()):
                    if frame.kind is FrameKind.UPDATE and frame.lsn > after_lsn:
                        yield frame

    def begin(self, epoch: int, after_lsn: int) -> None:
        """Start a segment of this owner, to continue from the later of `after_lsn` and the log.

        Segments that hold nothing later than `after_lsn` are removed.
        """
        if self.last_lsn < after_lsn:
            self._remove(list(self._segments))
        self._roll(epoch, max(after_lsn, self.last_lsn))
        self.trim(after_lsn)

    def append(self, kind: FrameKind, buffers: Sequence[bytes | memoryview]) -> int:
        """Add one frame and return its LSN.

        Parameters
        ----------
        kind
            What it holds.
        buffers
            Its payload, in pieces; not retained.

        Raises
        ------
        InvalidArgumentError
            If the payload exceeds `MAX_FRAME_BYTES`.
        ResourceExhaustedError
            If there is no space (NO_SPACE); the log is as before.
        UnavailableError
            If the log failed in a way that leaves its content unknown; it accepts nothing from
            then on, and a new owner finds out what it holds.
        """
        self.require_usable()
        segment = self._segments[-1]
        if segment.num_bytes >= self._segment_bytes and segment.last > segment.base:
            segment = self._roll(segment.epoch, segment.last)
        lsn = segment.last + 1
        header, length = _encode_header(kind, lsn, buffers)
        self._write(segment, [header, *buffers])
        if self._sync:
            self._sync_or_seal(segment)
        segment.last = lsn
        segment.num_bytes += _HEADER.size + length
        return lsn

    def trim(self, lsn: int) -> None:
        """Remove every frame up to `lsn`, as far as whole segments hold nothing later.

        After a trim up to the last frame, no byte of any payload is left.
        """
        current = self._segments[-1]
        if current.base < current.last <= lsn and self._failure is None:
            self._roll(current.epoch, current.last)
        self._remove([segment for segment in self._segments[:-1] if segment.last <= lsn])

    def discard(self) -> None:
        """Remove every segment."""
        self._close_file()
        self._remove(list(self._segments))

    def close(self) -> None:
        """Release the files; what was appended stays."""
        self._close_file()
        self._failure = self._failure or "it is closed"

    def require_usable(self) -> None:
        """Raise `UnavailableError` if the journal accepts nothing any more."""
        if self._failure is not None or self._file is None:
            raise UnavailableError(
                f"the journal in {self._folder} accepts nothing: "
                f"{self._failure or 'it was not begun'}; restart the shard",
                reason=Reason.STORE_FAILED,
                metadata={"file": str(self._folder)},
            )

    def _write(self, segment: _Segment, buffers: Sequence[bytes | memoryview]) -> None:
        assert self._file is not None
        try:
            self._file.append(buffers)
        except OSError as err:
            try:
                self._file.truncate(segment.num_bytes)
            except OSError as second:
                self._failure = f"a failed write could not be undone ({second})"
            raise storage_error(err, str(segment.path)) from err

    def _sync_or_seal(self, segment: _Segment) -> None:
        assert self._file is not None
        try:
            self._file.sync()
        except OSError as err:
            # After a failed fsync the kernel may have dropped the pages: a second one that
            # succeeds would prove nothing.
            self._failure = f"fdatasync failed ({err})"
            raise storage_error(err, str(segment.path)) from err

    def _roll(self, epoch: int, base: int) -> _Segment:
        """Begin a new segment; the present one stays open until the new one is whole."""
        path = self._folder / f"{base:020d}-{epoch:010d}{_SUFFIX}"
        head = {"format": 1, "identity": self._identity, "epoch": epoch, "base": base}
        payload = json.dumps(head).encode()
        header, length = _encode_header(FrameKind.SEGMENT, base, [payload])
        file: LogFile | None = None
        try:
            with suppress(FileNotFoundError):
                path.unlink()  # an empty segment of the same place and epoch
            file = self._open_file(path)
            file.append([header, payload])
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
                self._file.append([_encode_header(FrameKind.CONTINUED, base, [])[0]])
        self._close_file()
        self._file = file
        self._segments = [segment for segment in self._segments if segment.path != path]
        self._segments.append(_Segment(path, base, base, epoch, _HEADER.size + length))
        return self._segments[-1]

    def _remove(self, segments: list[_Segment]) -> None:
        # Oldest first: a crash in between leaves a gap at the start, never one in the middle.
        for segment in segments:
            try:
                segment.path.unlink(missing_ok=True)
            except OSError as err:
                raise storage_error(err, str(segment.path)) from err
            self._segments.remove(segment)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _scan(self) -> None:
        paths = sorted(self._folder.glob(f"*{_SUFFIX}"))
        for path in paths:
            self._scan_segment(path, last=path == paths[-1])

    def _scan_segment(self, path: Path, *, last: bool) -> None:
        data = path.read_bytes()
        segment: _Segment | None = None
        for frame in _frames(path, data):
            if segment is None:
                segment = self._begin_segment(path, frame)
            elif frame.kind is FrameKind.CONTINUED:
                if last:
                    raise _corrupt(path, segment.num_bytes, "the next segment is missing")
                continue
            elif frame.kind is FrameKind.SEGMENT or frame.lsn != segment.last + 1:
                raise _corrupt(path, segment.num_bytes, f"LSN {frame.lsn} is out of order")
            segment.last = frame.lsn
            segment.num_bytes += _HEADER.size + len(frame.payload)
        if segment is not None:
            self._segments.append(segment)
        elif not last:
            raise _corrupt(path, 0, "cut short, and a later segment exists")
        # In an earlier segment the base of the next one tells whether a frame is missing.
        if last:
            self._cut_tail(path, 0 if segment is None else segment.num_bytes, len(data))

    def _cut_tail(self, path: Path, end: int, size: int) -> None:
        if end < size:
            self.torn_tail = TornTail(str(path), end, size - end)
            _LOG.warning("cut %d bytes of an unfinished write off %s", size - end, path)
            os.truncate(path, end)
        if end == 0:
            path.unlink()

    def _begin_segment(self, path: Path, frame: Frame) -> _Segment:
        if frame.kind is not FrameKind.SEGMENT:
            raise _corrupt(path, 0, "the first frame is not that of a segment")
        head = json.loads(bytes(frame.payload))
        if head["identity"] != self._identity:
            raise FailedPreconditionError(
                f"{path} is the journal of {head['identity']}, not of {self._identity}; "
                "give each bank a journal directory of its own",
                reason=Reason.BAD_CONFIG,
                metadata={"file": str(path)},
            )
        if self._segments and frame.lsn != self.last_lsn:
            before = self._segments[-1]
            raise _corrupt(
                before.path,
                before.num_bytes,
                f"frames {before.last + 1} to {frame.lsn} are missing before {path.name}",
            )
        return _Segment(path, frame.lsn, frame.lsn, head["epoch"], 0)


def _encode_header(
    kind: FrameKind, lsn: int, buffers: Sequence[bytes | memoryview]
) -> tuple[bytes, int]:
    length = sum(memoryview(buffer).nbytes for buffer in buffers)
    if length > MAX_FRAME_BYTES:
        raise InvalidArgumentError(
            f"an update of {length} bytes exceeds {MAX_FRAME_BYTES}; send its blocks apart",
            reason=Reason.MESSAGE_TOO_LARGE,
        )
    crc = 0
    for buffer in buffers:
        crc = crc32c(buffer, start=crc)
    checked = _CHECKED.pack(_MAGIC, kind, length, lsn, crc)
    return checked + struct.pack("<I", crc32c(checked)), length


def _frames(path: Path, data: bytes) -> Iterator[Frame]:
    """Yield the frames of a segment up to its end or its torn tail."""
    offset = 0
    view = memoryview(data)
    while offset < len(view):
        rest = view[offset:]
        frame = _decode_frame(path, offset, rest)
        if frame is None:
            return
        yield frame
        offset += _HEADER.size + len(frame.payload)


def _decode_frame(path: Path, offset: int, rest: memoryview) -> Frame | None:
    """Return the frame that begins `rest`, or None if it was never finished."""
    if len(rest) < _HEADER.size or not any(rest):
        # Zeros are what a file system may leave of a write that lost its power.
        return None
    magic, kind, length, lsn, payload_crc, header_crc = _HEADER.unpack_from(rest)
    if magic != _MAGIC or crc32c(rest[: _CHECKED.size]) != header_crc:
        raise _corrupt(path, offset, "the header of a frame is damaged")
    payload = rest[_HEADER.size : _HEADER.size + length]
    if len(payload) < length:
        return None
    if crc32c(payload) != payload_crc:
        raise _corrupt(path, offset, "the payload of a frame is damaged")
    if kind not in {known.value for known in FrameKind}:
        raise _corrupt(path, offset, f"frames of kind {kind} are not known here")
    return Frame(lsn, FrameKind(kind), payload)


def _corrupt(path: Path, offset: int, problem: str) -> CorruptionError:
    return CorruptionError(
        f"journal {path}, offset {offset}: {problem}; restore the file from a copy",
        reason=Reason.JOURNAL_CORRUPT,
        metadata={"file": str(path), "offset": str(offset)},
    )
