"""The files of a bank, to be read: of a directory, or at any URL that fsspec serves."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from membank.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format.stored import BankObjects

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9.-]*\+)?[A-Za-z][A-Za-z0-9.-]*://")
_FILE = "file://"
_FSSPEC = "fsspec+"


def open_files(where: str | os.PathLike[str]) -> BankObjects:
    """Return the files of the bank at `where`: a path or ``file://`` URL, or what fsspec serves.

    Raises
    ------
    FailedPreconditionError
        If that needs fsspec, and it is not installed (MISSING_EXTRA).
    InvalidArgumentError
        If no installed file system serves the URL.
    """
    url = os.fspath(where)
    if _SCHEME.match(url) and not url.startswith(_FILE):
        return FsspecFiles(url)
    return DirectoryFiles(Path(url.removeprefix(_FILE)))


class DirectoryFiles:
    """The files of a bank in a directory.

    Parameters
    ----------
    root
        The directory.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def url(self) -> str:
        # docstring inherited
        return str(self._root)

    def get(self, key: str) -> bytes:
        # docstring inherited
        try:
            return (self._root / key).read_bytes()
        except OSError as err:
            raise _error(f"{self.url}/{key}", key, err) from err

    def list(self, prefix: str) -> list[str]:
        # docstring inherited
        try:
            return [f"{prefix}/{entry.name}" for entry in os.scandir(self._root / prefix)]
        except FileNotFoundError:
            return []
        except OSError as err:
            raise _error(f"{self.url}/{prefix}", prefix, err) from err


class FsspecFiles:
    """The files of a bank at an fsspec URL; call it from threads, never from a coroutine.

    Parameters
    ----------
    url
        Where; credentials come from the environment, as the file system documents. A leading
        ``fsspec+``, as the service takes it, is left out.

    Raises
    ------
    FailedPreconditionError
        If fsspec, or what it needs for the URL, is not installed (MISSING_EXTRA).
    InvalidArgumentError
        If no file system is known for the URL.
    """

    def __init__(self, url: str) -> None:
        self._url = url.removeprefix(_FSSPEC).rstrip("/")
        self._files: Any
        try:
            import fsspec

            self._files, self._root = fsspec.url_to_fs(self._url)
        except ImportError as err:
            raise _missing_extra(self._url, str(err)) from err
        except ValueError as err:
            raise InvalidArgumentError(f"{self._url}: {err}", reason=Reason.BAD_CONFIG) from err

    @property
    def url(self) -> str:
        # docstring inherited
        return self._url

    def get(self, key: str) -> bytes:
        # docstring inherited
        try:
            return bytes(self._files.cat_file(f"{self._root}/{key}"))
        except OSError as err:
            raise _error(f"{self.url}/{key}", key, err) from err

    def list(self, prefix: str) -> list[str]:
        # docstring inherited
        try:
            # A listing that is remembered would hide what was written since.
            self._files.invalidate_cache()
            names = self._files.ls(f"{self._root}/{prefix}", detail=False)
        except FileNotFoundError:
            return []
        except OSError as err:
            raise _error(f"{self.url}/{prefix}", prefix, err) from err
        return [f"{prefix}/{name.rstrip('/').rsplit('/', 1)[-1]}" for name in names]


def _error(where: str, key: str, err: OSError) -> MembankError:
    if isinstance(err, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return NotFoundError(
            f"there is no {where}", reason=Reason.OBJECT_MISSING, metadata={"key": key}
        )
    if isinstance(err, PermissionError):
        return FailedPreconditionError(
            f"{where}: {err.strerror or err}; ask for the right to read it",
            reason=Reason.STORE_DENIED,
            metadata={"key": key},
        )
    return UnavailableError(
        f"{where}: {err.strerror or err}", reason=Reason.STORE_FAILED, metadata={"key": key}
    )


def _missing_extra(url: str, needed: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"{url} is read through a package that is not installed ({needed}): "
        "pip install 'membank[service]', or that package alone (for s3:// that is s3fs)",
        reason=Reason.MISSING_EXTRA,
        metadata={"extra": "service"},
    )
