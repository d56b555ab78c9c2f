"""The lock that keeps a second process of a machine from owning the same partition."""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path

from membank.bank_service.store.objects import storage_error
from membank.wire.errors import FailedPreconditionError, Reason

_NAME = "lock"
_IDENTITY_BYTES = 64


class LockFile:
    """An exclusive lock on a directory; the kernel releases it when the process dies, however.

    The file has an identity of its own, so that whoever holds it can tell from a manifest that the
    owner before held the very same lock, and is therefore gone.

    Parameters
    ----------
    folder
        The directory; made if missing.
    what
        What it protects, for the error.

    Raises
    ------
    FailedPreconditionError
        If another process holds it (BANK_IN_USE).
    """

    def __init__(self, folder: Path, what: str) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(folder / _NAME, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as err:
            raise storage_error(err, str(folder)) from err
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.identity = self._identify()
            """Random; the same for all who hold this lock, one after the other."""
        except BlockingIOError as err:
            os.close(self._handle)
            raise FailedPreconditionError(
                f"{what} is served by another process of this machine; stop that one first",
                reason=Reason.BANK_IN_USE,
                metadata={"folder": str(folder)},
            ) from err
        except OSError as err:
            os.close(self._handle)
            raise storage_error(err, str(folder / _NAME)) from err

    def release(self) -> None:
        """Let others own the directory."""
        os.close(self._handle)

    def _identify(self) -> str:
        found = os.pread(self._handle, _IDENTITY_BYTES, 0)
        if not found:
            found = uuid.uuid4().hex.encode()
            os.pwrite(self._handle, found, 0)
        return found.decode("ascii", "replace")
