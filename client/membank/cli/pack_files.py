"""Packs at a path or at any URL that fsspec serves: read and written whole, or not at all."""

from __future__ import annotations

import mmap
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from membank.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(://|::)")
_FILE = "file://"
_ATOMIC = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory"})
"""Stores in which an object that is being written is not to be seen before it is whole."""


class _Files(Protocol):
    """What is needed of a file system of fsspec, which has no types."""

    protocol: str | tuple[str, ...]

    def get_file(self, source: str, target: str) -> None:
        """Copy a file to this machine."""

    def put_file(self, source: str, target: str) -> None:
        """Copy a file from this machine."""

    def mv(self, source: str, target: str) -> None:
        """Give a file another name."""

    def rm_file(self, path: str) -> None:
        """Remove a file."""


@contextmanager
def written_pack(where: str) -> Iterator[BinaryIO]:
    """Let a pack be written, to appear at a path or URL when the block is left without an error.

    Parameters
    ----------
    where
        Path, ``file://`` URL, or any URL that fsspec can write; what is there is replaced.

    Raises
    ------
    FailedPreconditionError
        If fsspec, or what it needs for the URL, is not installed (MISSING_EXTRA), or the right to
        write is missing (STORE_DENIED).
    InvalidArgumentError
        If it cannot be written, or no file system serves the URL.
    UnavailableError
        If the storage fails (STORE_FAILED).
    """
    if not _is_remote(where):
        with _written_file(_path(where)) as file:
            yield file
        return
    files, path = _file_system(where)
    with tempfile.TemporaryDirectory(prefix="membank-") as folder:
        waiting = Path(folder) / "pack"
        with waiting.open("wb") as file:
            yield file
        with _failures(where):
            _upload(files, str(waiting), path)


@contextmanager
def read_pack(where: str) -> Iterator[BinaryIO]:
    """Open a pack at a path or URL, to be read in any order; of a URL, a copy in a temporary file.

    Parameters
    ----------
    where
        Path, ``file://`` URL, or any URL that fsspec can read.

    Raises
    ------
    NotFoundError
        If there is nothing (OBJECT_MISSING).
    FailedPreconditionError, InvalidArgumentError, UnavailableError
        As for `written_pack`.
    """
    if not _is_remote(where):
        with _failures(where):
            file = _path(where).open("rb")
        with file:
            yield file
        return
    files, path = _file_system(where)
    with tempfile.TemporaryDirectory(prefix="membank-") as folder:
        copy = Path(folder) / "pack"
        with _failures(where):
            files.get_file(path, str(copy))
        with copy.open("rb") as file:
            yield file


@contextmanager
def mapped_pack(where: str) -> Iterator[memoryview]:
    """Map a pack at a path or URL, so that it is not in memory as a whole; errors as of `read_pack`."""
    with read_pack(where) as file:
        yield mapped(file)


def mapped(file: BinaryIO) -> memoryview:
    """Map all of an open file; its position is at the end afterwards."""
    if file.seek(0, os.SEEK_END) == 0:
        return memoryview(b"")  # what is empty cannot be mapped
    # Unmapped with the last array that is a view of it.
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _is_remote(where: str) -> bool:
    return bool(_SCHEME.match(where)) and not where.startswith(_FILE)


def _path(where: str) -> Path:
    return Path(where.removeprefix(_FILE))


@contextmanager
def _written_file(target: Path) -> Iterator[BinaryIO]:
    partial = target.with_name(target.name + ".partial")
    try:
        with _failures(str(target)), partial.open("wb") as file:
            yield file
        with _failures(str(target)):
            partial.replace(target)
    finally:
        with suppress(OSError):
            partial.unlink()


def _file_system(url: str) -> tuple[_Files, str]:
    try:
        import fsspec

        files, path = fsspec.url_to_fs(url)
    except ImportError as err:
        raise FailedPreconditionError(
            f"{url} is reached through a package that is not installed ({err}): "
            "pip install 'membank[service]', or that package alone (for s3:// that is s3fs, for "
            "https:// aiohttp); paths need none",
            reason=Reason.MISSING_EXTRA,
            metadata={"extra": "service"},
        ) from err
    except ValueError as err:
        raise InvalidArgumentError(f"{url}: {err}") from err
    return files, path


def _upload(files: _Files, source: str, target: str) -> None:
    protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
    if protocols & _ATOMIC:
        files.put_file(source, target)
        return
    partial = f"{target}.partial"
    try:
        files.put_file(source, partial)
        files.mv(partial, target)
    except BaseException:
        with suppress(Exception):
            files.rm_file(partial)
        raise


@contextmanager
def _failures(where: str) -> Iterator[None]:
    """Say of a failure of storage what it means; of others, nothing."""
    try:
        yield
    except MembankError:
        raise
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotFoundError(
            f"there is no {where}, or no folder for it", reason=Reason.OBJECT_MISSING
        ) from err
    except NotImplementedError as err:
        raise InvalidArgumentError(
            f"{where} cannot be written; export to a path or to a store that takes files"
        ) from err
    except PermissionError as err:
        raise FailedPreconditionError(
            f"{where}: {err.strerror or err}; ask for the right to use it",
            reason=Reason.STORE_DENIED,
        ) from err
    except IsADirectoryError as err:
        raise InvalidArgumentError(f"{where} is a directory; name a file") from err
    except Exception as err:  # each file system has errors of its own
        if not isinstance(err, OSError) and not _is_remote(where):
            raise
        raise UnavailableError(
            f"{where}: {str(err) or type(err).__name__}", reason=Reason.STORE_FAILED
        ) from err
