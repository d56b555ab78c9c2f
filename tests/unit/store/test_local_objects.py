"""What a directory adds to the conformance suite: scratch files, permissions, full disks."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.store import LocalObjects
from membank.bank_service.store.local_objects import offers_unnamed, write_fully
from membank.bank_service.store.objects import storage_error
from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)


def _offers_no_unnamed(folder: str) -> bool:
    del folder
    return False


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


@contextmanager
def _without_privileges() -> Iterator[None]:
    """Be nobody, if this process is root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65_534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    # An empty listing of manifests would mean that nothing was ever written.
    store = LocalObjects(tmp_path)
    store.put("manifests/1", b"1")
    (tmp_path / "manifests").chmod(0)
    try:
        with _without_privileges():
            for prefix in ("", "manifests"):
                with pytest.raises(FailedPreconditionError) as caught:
                    store.list(prefix)
                assert caught.value.reason is Reason.STORE_FAILED
    finally:
        (tmp_path / "manifests").chmod(0o700)
    assert store.list("manifests") == ["manifests/1"]
    assert store.list("nothing") == []
    assert store.list("manifests/1") == []


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


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, pread = os.read, os.pread
    monkeypatch.setattr(os, "read", lambda handle, size: read(handle, min(size, 7)))
    monkeypatch.setattr(os, "pread", lambda handle, size, at: pread(handle, min(size, 7), at))
    content = bytes(range(100))
    (tmp_path / "a").write_bytes(content)
    store = LocalObjects(tmp_path)
    assert store.get("a") == content
    assert store.get_range("a", 10, 95) == content[10:95]
    assert store.get_range("a", 90, 200) == content[90:]


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 16, 1 << 20])
def test_short_writes_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    write = os.write
    calls = []

    def writev(handle: int, buffers: Sequence[bytes | memoryview]) -> int:
        assert 0 < len(buffers) <= os.sysconf("SC_IOV_MAX")
        calls.append(len(buffers))
        return write(handle, b"".join(buffers)[:at_once])

    monkeypatch.setattr(os, "writev", writev)
    numbers = np.arange(6, dtype=np.uint16).data
    buffers: list[bytes | memoryview] = [b"", b"abc", numbers.cast("B"), b"", numbers, b"z", b""]
    with (tmp_path / "a").open("wb", buffering=0) as file:
        write_fully(file.fileno(), buffers)
    expected = b"abc" + 2 * numbers.tobytes() + b"z"
    assert (tmp_path / "a").read_bytes() == expected
    assert len(calls) == -(-len(expected) // at_once), "nothing is written twice, or for nothing"


def test_more_buffers_than_one_call_takes(tmp_path: Path) -> None:
    buffers: list[bytes | memoryview] = [number.to_bytes(2, "little") for number in range(3000)]
    with (tmp_path / "a").open("wb", buffering=0) as file:
        write_fully(file.fileno(), buffers)
    assert (tmp_path / "a").read_bytes() == b"".join(buffers)


def test_creating_makes_no_scratch_files(tmp_path: Path) -> None:
    if not offers_unnamed(str(tmp_path)):
        pytest.skip("this file system makes no files without a name")
    LocalObjects(tmp_path).put_if_absent("a/b", b"1")
    assert _files(tmp_path) == {"a/b"}


def test_without_unnamed_files_creating_uses_scratch_files(tmp_path: Path) -> None:
    asked: list[str] = []

    def offers_none(folder: str) -> bool:
        asked.append(folder)
        return False

    store = LocalObjects(tmp_path, offers_unnamed=offers_none)
    store.put_if_absent("a/b", b"1")
    store.put_if_absent("a/c", b"2")
    assert asked == [str(tmp_path / "a")], "the file system is asked once"
    assert (tmp_path / ".tmp").is_dir()
    assert store.list("") == ["a/b", "a/c"]


def test_a_file_system_without_unnamed_files_says_so(tmp_path: Path) -> None:
    # /proc makes none, whatever the kernel; nor does a folder that is not there.
    assert not offers_unnamed("/proc/self")
    assert not offers_unnamed(str(tmp_path / "missing"))


@pytest.mark.parametrize("can_unname", [offers_unnamed, _offers_no_unnamed])
def test_files_have_the_mode_that_the_umask_leaves(
    tmp_path: Path, can_unname: Callable[[str], bool]
) -> None:
    store = LocalObjects(tmp_path, offers_unnamed=can_unname)
    before = os.umask(0o027)
    try:
        store.put("put", b"1")
        store.put_if_absent("created", b"1")
    finally:
        os.umask(before)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in ("put", "created")}
    assert modes == {"put": 0o640, "created": 0o640}


@pytest.mark.parametrize("can_unname", [offers_unnamed, _offers_no_unnamed])
def test_a_lost_race_leaves_no_open_file(tmp_path: Path, can_unname: Callable[[str], bool]) -> None:
    store = LocalObjects(tmp_path, offers_unnamed=can_unname)
    store.put_if_absent("a", b"1")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(AlreadyExistsError):
        store.put_if_absent("a", b"2", durable=True)
    assert len(os.listdir("/proc/self/fd")) == before
    assert (tmp_path / "a").read_bytes() == b"1"
    assert {name for name in _files(tmp_path) if not name.endswith("/lock")} == {"a"}
