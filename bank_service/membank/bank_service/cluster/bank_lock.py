"""Keeping other services on this machine off a bank in a directory."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from membank.wire.errors import FailedPreconditionError, Reason

_POLL_S = 0.1


def lock_bank(
    folder: Path,
    *,
    patience_s: float = 0.0,
    flock: Callable[[int, int], None] = fcntl.flock,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Lock a bank in a directory, and make the directory where there is none.

    Parameters
    ----------
    folder
        The directory.
    patience_s
        Longest wait for another one's lock.
    flock
        Locks an open file; `fcntl.flock`.
    clock
        Monotonic seconds.
    sleep
        Waits for some seconds.

    Returns
    -------
    int
        The open directory; the lock is held until it is closed, or the process ends.

    Raises
    ------
    FailedPreconditionError
        If another service has the lock (BANK_IN_USE), or the directory cannot be used or locked
        (STORE_FAILED).
    """
    deadline = clock() + patience_s
    handle = _open(folder)
    try:
        while True:
            try:
                flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                if clock() >= deadline:
                    raise bank_in_use(str(folder)) from err
                sleep(_POLL_S)
            else:
                return handle
    except OSError as err:
        # Some file systems of a network have no locks.
        os.close(handle)
        raise FailedPreconditionError(
            f"cannot lock {folder}, so another service could serve the bank as well: "
            f"{err.strerror or err}; use a file system with locks",
            reason=Reason.STORE_FAILED,
        ) from err
    except BaseException:
        os.close(handle)
        raise


def bank_in_use(bank_url: str) -> FailedPreconditionError:
    """Return the error for a bank that another service serves."""
    return FailedPreconditionError(
        f"{bank_url} is served already; see `membank status`, or stop it with `membank down`",
        reason=Reason.BANK_IN_USE,
        metadata={"bank": bank_url},
    )


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as err:
        raise FailedPreconditionError(
            f"cannot use {folder} for a bank: {err.strerror or err}",
            reason=Reason.STORE_FAILED,
        ) from err
