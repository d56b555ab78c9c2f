"""The lock on a bank in a directory: who has it, and file systems that have none."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from membank.bank_service.cluster.bank_lock import lock_bank
from membank.wire.errors import FailedPreconditionError, Reason


def test_a_bank_is_locked_once(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "bank"
    handle = lock_bank(folder)
    now = [0.0]
    with pytest.raises(FailedPreconditionError) as caught:
        lock_bank(
            folder,
            patience_s=1.0,
            clock=lambda: now[0],
            sleep=lambda seconds: now.append(now.pop() + seconds),
        )
    assert caught.value.reason is Reason.BANK_IN_USE
    assert 1.0 <= now[0] < 1.5
    os.close(handle)
    os.close(lock_bank(folder))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_refused(tmp_path: Path, number: int) -> None:
    handles = []

    def flock(handle: int, operation: int) -> None:
        handles.append(handle)
        raise OSError(number, os.strerror(number))

    with pytest.raises(FailedPreconditionError, match="use a file system with locks") as caught:
        lock_bank(tmp_path, flock=flock)
    assert caught.value.reason is Reason.STORE_FAILED
    (handle,) = handles
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(handle)


def test_what_is_no_directory_is_no_bank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FailedPreconditionError) as caught:
        lock_bank(tmp_path / "file")
    assert caught.value.reason is Reason.STORE_FAILED
