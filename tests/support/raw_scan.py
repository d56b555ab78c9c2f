"""Looks for bytes wherever a process, a directory or a bucket may keep them; knows nothing of membank.

A test plants content that consists of a short pattern over and over (`marked`), and looks afterwards
for pieces of that pattern (`needles`). So every fragment of it that is longer than one and a half
periods is found, wherever it was cut and however it is aligned.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from membank.wire.spec import Array

PERIOD = 16
"""Elements after which marked content repeats itself; 64 bytes of float32."""

_READ_BYTES = 16 << 20
_PAGE = mmap.PAGESIZE
# Bits of /proc/PID/pagemap: in memory, in the swap, a page of a file or of shared memory.
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))

Needles = Mapping[str, bytes]
"""What is looked for, by the name that a finding says."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A place where something was found."""

    name: str
    """Which needle."""
    place: str
    """File, object, or memory of a process."""
    offset: int
    """Bytes from the beginning of the file or object, or the address."""

    def __str__(self) -> str:
        return f"{self.name} in {self.place} at {self.offset:#x}"


def pattern(seed: int, *, scale: float = 1.0) -> Array:
    """Return (PERIOD,) float32 that nothing but `seed` gives: positive, and none equal to another.

    Every one has a mantissa of its own, of which bfloat16 keeps the sign, exponent and 7 bits.
    """
    rng = np.random.default_rng(seed)
    return (scale * rng.uniform(0.5, 1.0, PERIOD)).astype(np.float32)


def marked(shape: Sequence[int], seed: int, *, scale: float = 1.0) -> Array:
    """Return float32 of `shape`, whose elements are `pattern` over and over."""
    return np.resize(pattern(seed, scale=scale), tuple(shape))


def needles(name: str, content: Array | bytes) -> dict[str, bytes]:
    """Return what to look for where periodic content was: the halves of its period.

    Parameters
    ----------
    name
        Name of the content, for findings.
    content
        Elements of any type, C-contiguous, `PERIOD` of them over and over; or their bytes, of which
        the whole is one period.
    """
    if isinstance(content, bytes):
        period = content
    else:
        period = np.ascontiguousarray(content).reshape(-1)[:PERIOD].tobytes()
    half = len(period) // 2
    assert half >= 12, "too short to be told from chance"
    assert len(set(period)) > 4, "of equal bytes, as memory is full of"
    return {f"{name}, first half": period[:half], f"{name}, second half": period[half:]}


# ---- files


def scan_files(root: Path, wanted: Needles) -> list[Finding]:
    """Look through every file under `root`, hidden and unfinished ones included.

    A file that goes away meanwhile is looked through as far as it was opened.
    """
    found = []
    for folder, _, names in os.walk(root):
        for name in names:
            path = f"{folder}/{name}"
            with suppress(FileNotFoundError), open(path, "rb", buffering=0) as file:
                if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    found += _scan_handle(file.fileno(), path, wanted)
    return found


def scan_objects(client: Any, bucket: str, prefix: str, wanted: Needles) -> list[Finding]:
    """Look through all objects below `prefix`, and all versions of them where the server has any.

    Parameters
    ----------
    client
        A botocore client of S3.
    bucket
        Name of the bucket.
    prefix
        What keys begin with; "" = all.
    wanted
        What is looked for.
    """
    found = []
    for key, version in _objects(client, bucket, prefix):
        which = {"VersionId": version} if version not in {None, "null"} else {}
        body = client.get_object(Bucket=bucket, Key=key, **which)["Body"].read()
        place = f"s3://{bucket}/{key}" + (f" version {version}" if which else "")
        found += _scan_bytes(body, 0, place, wanted)
    return found


def _objects(client: Any, bucket: str, prefix: str) -> Iterator[tuple[str, str | None]]:
    pages = client.get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=prefix)
    for page in pages:
        for version in page.get("Versions", ()):
            yield version["Key"], version.get("VersionId")
    # Parts that were sent and never put together are content as well, but cannot be read: there
    # must be none.
    uploads = client.list_multipart_uploads(Bucket=bucket, Prefix=prefix).get("Uploads", ())
    assert not list(uploads), "unfinished uploads hold content that no scan reaches"


# ---- memory


def scan_process(pid: int, wanted: Needles) -> list[Finding]:
    """Look through all memory that a process has mapped, and the files that it alone can reach.

    Of private memory every page that the process has written to; of shared memory and unlinked
    files, which a peer may have written, all that the file holds.

    Parameters
    ----------
    pid
        The process; of the same user, a child where the kernel wants that (Yama).
    wanted
        What is looked for.

    Raises
    ------
    ProcessLookupError
        If there is no such process.
    PermissionError
        If its memory cannot be read.
    """
    found = scan_open_files(pid, wanted)
    with (
        _opened(f"/proc/{pid}/mem") as memory,
        _opened(f"/proc/{pid}/pagemap") as pagemap,
    ):
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, access, *_, last = line.split(maxsplit=5)
            start, end = (int(each, 16) for each in span.split("-"))
            if start >> 63:
                continue  # [vsyscall], a page of the kernel's that is the same for all
            name = last if "/" in last or "[" in last else "anonymous"
            place = f"process {pid}, {name} {access}"
            is_own = access.endswith("p")
            for first, after in _spans_with_content(pagemap, start, end, is_own=is_own):
                found += _scan_span(
                    lambda size, at: os.pread(memory, size, at), first, after, place, wanted
                )
    return found


def scan_open_files(pid: int, wanted: Needles) -> list[Finding]:
    """Look through the files of a process that have no name: anonymous memory, and unlinked ones."""
    found = []
    folder = f"/proc/{pid}/fd"
    for number in os.listdir(folder):
        with suppress(FileNotFoundError, OSError):
            target = os.readlink(f"{folder}/{number}")
            if not target.endswith(" (deleted)"):
                continue
            with _opened(f"{folder}/{number}") as handle:
                if stat.S_ISREG(os.fstat(handle).st_mode):
                    found += _scan_handle(handle, f"process {pid}, file {target}", wanted)
    return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Keep a process of ours still, so that nothing moves from where a scan goes to where it was."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _spans_with_content(
    pagemap: int, start: int, end: int, *, is_own: bool
) -> Iterator[tuple[int, int]]:
    """Yield the stretches of a mapping that somebody wrote to.

    A private one shows pages of its file as they are there, until the process writes to them: of
    libraries, most of which nobody does. As files they are looked through where they lie.
    """
    count = (end - start) // _PAGE
    try:
        data = os.pread(pagemap, count * 8, start // _PAGE * 8)
    except OSError:
        data = b""
    if len(data) < count * 8:
        # The table says nothing of it, so all of it is read.
        yield start, end
        return
    pages = np.frombuffer(data, np.uint64)
    has_content = (pages & (_PRESENT | _SWAPPED)) != 0
    if is_own:
        has_content &= (pages & _OF_FILE) == 0
    edges = np.flatnonzero(np.diff(np.concatenate(([False], has_content, [False])).astype(np.int8)))
    for first, after in edges.reshape(-1, 2):
        yield start + int(first) * _PAGE, start + int(after) * _PAGE


def _scan_handle(handle: int, place: str, wanted: Needles) -> list[Finding]:
    """Look through a file, passing over its holes."""
    found: list[Finding] = []
    end = 0
    while True:
        try:
            start = os.lseek(handle, end, os.SEEK_DATA)
            end = os.lseek(handle, start, os.SEEK_HOLE)
        except OSError as err:
            if err.errno == errno.ENXIO:  # nothing but a hole is left
                return found
            raise
        found += _scan_span(lambda size, at: os.pread(handle, size, at), start, end, place, wanted)


def _scan_span(
    read: Callable[[int, int], bytes], start: int, end: int, place: str, wanted: Needles
) -> list[Finding]:
    found: list[Finding] = []
    # What lies across two reads is found by reading its beginning twice.
    overlap = max(map(len, wanted.values())) - 1
    at = start
    while at < end:
        try:
            data = read(min(_READ_BYTES, end - at), at)
        except OSError:
            return found  # it was unmapped meanwhile, or is the kernel's own
        if not data:
            return found
        found += _scan_bytes(data, at, place, wanted)
        if at + len(data) >= end:
            return found
        at += max(1, len(data) - overlap)
    return found


def _scan_bytes(data: bytes, start: int, place: str, wanted: Needles) -> list[Finding]:
    """Return the first place of each needle; one is enough to know that it is there."""
    return [
        Finding(name, place, start + offset)
        for name, needle in wanted.items()
        if (offset := data.find(needle)) >= 0
    ]


@contextmanager
def _opened(path: str) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
