"""What a directory adds to the conformance suite: scratch files, permissions, full disks."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest

from membank.bank_service.store import LocalObjects
from membank.bank_service.store.objects import storage_error
from membank.wire.errors import (
    FailedPreconditionError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)


def _files(root: Path) -> set[str]:
    return {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}


def test_scratch_files_do_not_stay(tmp_path: Path) -> None:
    store = LocalObjects(tmp_path)
    store.put("a", b"1")
    store.put_if_absent("b", b"2", durable=True)
    assert {name for name in _files(tmp_path) if not name.endswith("/lock")} == {"a", "b"}
    del store
    gc.collect()
    assert _files(tmp_path) == {".tmp/lock", "a", "b"}


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / ".tmp" / "dead"
    left.mkdir(parents=True)
    (left / "lock").touch()
    (left / "half-written").write_bytes(b"secret")
    LocalObjects(tmp_path).put("a", b"1")
    assert not left.exists()


def test_the_living_are_not_swept(tmp_path: Path) -> None:
    first = LocalObjects(tmp_path)
    first.put("a", b"1")
    second = LocalObjects(tmp_path)
    second.put("b", b"2")
    first.put("c", b"3")
    assert second.list("") == ["a", "b", "c"]


def test_scratch_is_not_listed(tmp_path: Path) -> None:
    store = LocalObjects(tmp_path)
    store.put("a", b"1")
    assert store.list("") == ["a"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(FailedPreconditionError) as caught:
            LocalObjects(tmp_path).put("a", b"1")
    finally:
        tmp_path.chmod(0o700)
    assert caught.value.reason is Reason.STORE_FAILED


def test_a_file_in_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = LocalObjects(tmp_path / "file")
    with pytest.raises(NotFoundError):
        store.get("a")
    with pytest.raises(FailedPreconditionError):
        store.put("a", b"1")


@pytest.mark.parametrize(
    ("number", "leaf", "reason"),
    [
        (errno.ENOSPC, ResourceExhaustedError, Reason.NO_SPACE),
        (errno.EDQUOT, ResourceExhaustedError, Reason.NO_SPACE),
        (errno.EROFS, FailedPreconditionError, Reason.STORE_FAILED),
        (errno.EACCES, FailedPreconditionError, Reason.STORE_FAILED),
        (errno.EIO, UnavailableError, Reason.STORE_FAILED),
    ],
)
def test_errors_of_the_kernel_are_typed(number: int, leaf: type, reason: Reason) -> None:
    error = storage_error(OSError(number, os.strerror(number)), "bank/key")
    assert type(error) is leaf
    assert error.reason is reason
    assert "bank/key" in error.message
