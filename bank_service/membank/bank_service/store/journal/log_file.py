"""The files that a journal on a local disk is written to."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from membank.bank_service.store.local_objects import write_fully


class LogFile(Protocol):
    """A file that is written from its start on; the seam at which tests inject failures.

    It may hold bytes of an earlier use already, which are written over.
    """

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Write `buffers` behind what was appended before; an error may leave a part of them."""

    def truncate(self, num_bytes: int) -> None:
        """Cut the file to `num_bytes` and go on appending there."""

    def sync(self) -> None:
        """Make what was appended survive a loss of power."""

    def close(self) -> None:
        """Release the file."""


class PosixLogFile:
    """A `LogFile` on a local file system.

    Parameters
    ----------
    path
        The file; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644)

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        # docstring inherited
        write_fully(self._handle, list(buffers))

    def truncate(self, num_bytes: int) -> None:
        # docstring inherited
        os.ftruncate(self._handle, num_bytes)
        os.lseek(self._handle, num_bytes, os.SEEK_SET)

    def sync(self) -> None:
        # docstring inherited
        os.fdatasync(self._handle)

    def close(self) -> None:
        # docstring inherited
        os.close(self._handle)
