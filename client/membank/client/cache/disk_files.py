"""The files of the cache's disk tier: one block each, named by what it holds.

A name says all that an index needs, so a directory is taken over without reading a file. What a
name says counts for nothing when the content is used: a file ends with a trailer that says the
same, and the content must have the CRC that both of them give.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from membank.wire.crc import as_uint8, crc32c
from membank.wire.spec import Array, BlockRef

_FORMAT = b"mbblock1"
# Format, SHA-256 of the bank's id, level, cluster, version, dtype, bytes and CRC of the content.
_TRAILER = struct.Struct("<8s32sIQQ16sQI")
_CRC = struct.Struct("<I")
TRAILER_BYTES = _TRAILER.size + _CRC.size
"""How much longer a file is than the content in it."""

_LOCK = "lock"
_FOLDER = re.compile(r"bank-[0-9a-f]{32}")
_NAME = re.compile(r"(\d+)-(\d+)-v(\d+)-(\w+)-r(\d+)-([0-9a-f]{8})\.block")
_UNFINISHED = ".tmp"
_ERASED_AT_ONCE_BYTES = 1 << 20


class DamagedFileError(Exception):
    """A file does not hold what its name says."""


class DirectoryInUseError(Exception):
    """Another client has the directory."""


@dataclass(frozen=True, slots=True)
class BlockFile:
    """What one file holds."""

    ref: BlockRef
    """The block."""
    version: int
    """Version of the content."""
    dtype: str
    """Element type of the content."""
    revision: int
    """Revision in which the block was seen with this content, as it was written."""
    crc32c: int
    """CRC-32C of the content."""

    @property
    def name(self) -> str:
        """Name of the file."""
        ref = f"{self.ref.level}-{self.ref.cluster}"
        state = f"v{self.version}-{self.dtype}-r{self.revision}"
        return f"{ref}-{state}-{self.crc32c:08x}.block"

    @classmethod
    def parse(cls, name: str) -> BlockFile | None:
        """Read a name; None where it is none of a block's file."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        level, cluster, version, dtype, revision, crc = match.groups()
        ref = BlockRef(int(level), int(cluster))
        return cls(ref, int(version), dtype, int(revision), int(crc, 16))


class BlockFolder:
    """The files of one bank in a directory, which nobody else uses meanwhile. Blocks its caller.

    Parameters
    ----------
    directory
        Where the folder of the bank lies; made if missing. Files of other banks that a client has
        left there are removed, and no others.
    bank_id
        Identity of the bank.

    Raises
    ------
    DirectoryInUseError
        If another client, in this process or another one, has the directory.
    OSError
        If it cannot be used.
    """

    def __init__(self, directory: Path, bank_id: str) -> None:
        self._identity = hashlib.sha256(bank_id.encode()).digest()
        self._folder = directory / f"bank-{self._identity.hex()[:32]}"
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(directory)
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            _remove_others(directory, self._folder)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Let others have the directory."""
        os.close(self._lock)

    def adopt(self, content_bytes: Callable[[BlockFile], int | None]) -> list[BlockFile]:
        """Return the files, the one written longest ago first; remove what is left over.

        Parameters
        ----------
        content_bytes
            Says how many bytes the content of a file has; None = the file is of no use.
        """
        found = []
        for item in os.scandir(self._folder):
            file = BlockFile.parse(item.name)
            if file is None:
                if item.name.endswith(_UNFINISHED):  # its writer was killed
                    os.unlink(item.path)
                continue
            status, num_bytes = item.stat(), content_bytes(file)
            if num_bytes is None or status.st_size != num_bytes + TRAILER_BYTES:
                os.unlink(item.path)
            else:
                found.append((status.st_mtime_ns, item.name, file))
        return [file for _, _, file in sorted(found, key=lambda each: each[:2])]

    def write(self, file: BlockFile, weight: Array) -> None:
        """Write a file as a whole, or leave nothing of it.

        It is not synced: after a loss of power it may be damaged, and its reader finds out.
        """
        path = self._folder / file.name
        unfinished = path.with_name(path.name + _UNFINISHED)
        content = as_uint8(weight)
        try:
            with open(unfinished, "wb", opener=_private) as out:
                out.write(content.data)
                out.write(self._trailer(file, content.nbytes))
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise

    def read(self, file: BlockFile, buffer: Array) -> None:
        """Read the content of a file into `buffer`, (num_bytes,) uint8.

        Raises
        ------
        DamagedFileError
            If it holds anything else than its name says.
        OSError
            If it cannot be read.
        """
        with (self._folder / file.name).open("rb", buffering=0) as source:
            filled = 0
            while filled < buffer.nbytes:
                num_read = source.readinto(buffer.data[filled:])
                if not num_read:
                    raise DamagedFileError(f"{file.name} is cut off")
                filled += num_read
            if source.read(TRAILER_BYTES + 1) != self._trailer(file, buffer.nbytes):
                raise DamagedFileError(f"{file.name} is of something else")
        if crc32c(buffer) != file.crc32c:
            raise DamagedFileError(f"{file.name} has another CRC than it should")

    def remove(self, file: BlockFile, *, erase: bool) -> None:
        """Remove a file, if it is there; with `erase` write zeros over it first."""
        path = self._folder / file.name
        try:
            if erase:
                _overwrite(path)
        finally:
            path.unlink(missing_ok=True)

    def _trailer(self, file: BlockFile, num_bytes: int) -> bytes:
        trailer = _TRAILER.pack(
            _FORMAT,
            self._identity,
            *file.ref,
            file.version,
            file.dtype.encode(),
            num_bytes,
            file.crc32c,
        )
        return trailer + _CRC.pack(crc32c(trailer))


def _lock(directory: Path) -> int:
    handle = os.open(directory / _LOCK, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        os.close(handle)
        raise DirectoryInUseError(f"{directory} is in use by another client") from err
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_others(directory: Path, own: Path) -> None:
    """Remove the blocks of other banks: nobody would keep them within a bound, or delete them."""
    for folder in directory.iterdir():
        if folder == own or not _FOLDER.fullmatch(folder.name):
            continue
        for path in folder.iterdir():
            if BlockFile.parse(path.name) or path.name.endswith(_UNFINISHED):
                path.unlink(missing_ok=True)
        try:
            folder.rmdir()
        except OSError:
            continue  # somebody keeps something else there


def _overwrite(path: Path) -> None:
    try:
        with path.open("r+b", buffering=0) as file:
            left = os.fstat(file.fileno()).st_size
            zeros = bytes(min(left, _ERASED_AT_ONCE_BYTES))
            while left > 0:
                left -= file.write(zeros[:left])
            os.fsync(file.fileno())
    except FileNotFoundError:
        return


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
