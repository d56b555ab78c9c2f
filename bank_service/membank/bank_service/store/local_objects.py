"""Objects as files of a directory."""

from __future__ import annotations

import builtins
import fcntl
import os
import shutil
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock

from membank.bank_service.store.checked_read import read_checked
from membank.bank_service.store.objects import Data, check_key, storage_error
from membank.wire.errors import MembankError

_SCRATCH = ".tmp"
_LOCK_NAME = "lock"
_SYNC_THREADS = 8
_MODE = 0o666  # less what the umask takes, as of any file
_O_TMPFILE = getattr(os, "O_TMPFILE", 0)  # Linux


def offers_unnamed(folder: str) -> bool:
    """Say whether files can be made in `folder` without a name, and be given one later."""
    try:
        handle = os.open(folder, _O_TMPFILE | os.O_WRONLY, _MODE) if _O_TMPFILE else None
    except OSError:
        return False  # if nothing can be made at all, the other way says why
    if handle is None:
        return False
    try:
        # A container may have no /proc, by which such a file gets its name.
        return os.path.samestat(os.stat(f"/proc/self/fd/{handle}"), os.fstat(handle))
    except OSError:
        return False
    finally:
        os.close(handle)


class LocalObjects:
    """An `ObjectStore` in a directory.

    An object is written aside and given its name when it is whole, so that readers see all of it
    or nothing. One that is created is written to a file without a name, of which a killed process
    leaves nothing. One that replaces another, and every one where the file system knows no such
    files, is written to a scratch file. Those lie in a directory per instance, locked for as long
    as the instance lives; what a killed process left is swept by the next one.

    Parameters
    ----------
    root
        The directory; made at the first write.
    offers_unnamed
        Says whether files without a name can be made in a directory; asked once.
    """

    # Threads: `_lock` guards the making of the scratch directory; the rest is the kernel's.

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        offers_unnamed: Callable[[str], bool] = offers_unnamed,
    ) -> None:
        self.root = Path(root).absolute()
        # Paths are joined as text: pathlib takes longer than the kernel does for a small object.
        self._prefix = f"{self.root}/"
        self._offers_unnamed = offers_unnamed
        self._is_unnamed: bool | None = None
        self._lock = Lock()
        self._scratch: Path | None = None

    @property
    def url(self) -> str:
        # docstring inherited
        return str(self.root)

    @property
    def directory(self) -> Path:
        # docstring inherited
        return self.root

    def get(self, key: str) -> bytes:
        # docstring inherited
        path = self._path(key)
        try:
            return _read(path)
        except OSError as err:
            raise self._error(err, key, reading=True) from err

    def get_checked(self, key: str, num_bytes: int) -> tuple[memoryview, int]:
        # docstring inherited
        path = self._path(key)
        try:
            return read_checked(path, num_bytes)
        except OSError as err:
            raise self._error(err, key, reading=True) from err

    def get_range(self, key: str, start: int, end: int) -> bytes:
        # docstring inherited
        path = self._path(key)
        try:
            return _read_range(path, start, end)
        except OSError as err:
            raise self._error(err, key, reading=True) from err

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        # docstring inherited
        target = self._path(key)
        try:
            self._write_scratch(target, data, os.replace, durable=durable)
        except OSError as err:
            raise self._error(err, key) from err

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        # docstring inherited
        target = self._path(key)
        try:
            if self._creates_unnamed(_parent(target)):
                _create(target, data, durable=durable)
            else:
                self._write_scratch(target, data, os.link, durable=durable)
        except OSError as err:
            raise self._error(err, key) from err

    def sync(self, keys: Sequence[str]) -> None:
        # docstring inherited
        if not keys:
            return
        paths = [self._path(key) for key in keys]
        folders = {_parent(path) for path in paths}
        # Side by side, so that the file system commits many files at once: 256 files of 100 kB
        # took 0.2 s, against 1.3 s one after the other (ext4). A thread takes a share of them,
        # because handing over one file costs as much as syncing one that has been written back.
        shares = [paths[start::_SYNC_THREADS] for start in range(min(_SYNC_THREADS, len(paths)))]
        try:
            with ThreadPoolExecutor(_SYNC_THREADS) as pool:
                builtins.list(pool.map(_sync_files, shares))
                # Folders after their files: a name that survives must not lead to nothing.
                builtins.list(pool.map(sync_folder, folders))
        except OSError as err:
            raise self._error(err, f"{keys[0]} ... {keys[-1]}") from err

    def list(self, prefix: str) -> builtins.list[str]:
        # docstring inherited
        top = self._path(prefix) if prefix else str(self.root)
        keys = []
        try:
            for folder, names, files in os.walk(top, onerror=_raise_unless_absent):
                if _SCRATCH in names:
                    names.remove(_SCRATCH)
                base = Path(folder).relative_to(self.root).as_posix()
                keys += files if base == "." else [f"{base}/{name}" for name in files]
        except OSError as err:
            raise self._error(err, prefix) from err
        return sorted(keys)

    def delete(self, key: str) -> None:
        # docstring inherited
        path = self._path(key)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as err:
            raise self._error(err, key) from err

    def delete_durably(self, key: str) -> None:
        # docstring inherited
        self.delete(key)
        try:
            # Also where there was no file: an earlier removal may have been cut off before this.
            sync_folder(_parent(self._path(key)))
        except FileNotFoundError:
            pass
        except OSError as err:
            raise self._error(err, key) from err

    def _path(self, key: str) -> str:
        check_key(key)
        return self._prefix + key

    def _error(self, err: OSError, key: str, *, reading: bool = False) -> MembankError:
        # Folders are no objects, and files have no objects below them.
        absent = reading and isinstance(err, IsADirectoryError | NotADirectoryError)
        return storage_error(FileNotFoundError() if absent else err, f"{self._prefix}{key}")

    def _creates_unnamed(self, folder: str) -> bool:
        if self._is_unnamed is None:
            _make_folder(Path(folder))
            self._is_unnamed = self._offers_unnamed(folder)
        return self._is_unnamed

    def _write_scratch(
        self, target: str, data: Data, name: Callable[[str, str], None], *, durable: bool
    ) -> None:
        """Write a scratch file and let `name` give it the name `target`."""
        scratch = f"{self._scratch_folder()}/{uuid.uuid4().hex}"
        folder = _parent(target)
        try:
            handle = os.open(scratch, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _MODE)
            try:
                _fill(handle, data, durable=durable)
            finally:
                os.close(handle)
            _make_folder(Path(folder))
            name(scratch, target)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(scratch)
        if durable:
            # The name must survive too, not only the content.
            sync_folder(folder)

    def _scratch_folder(self) -> Path:
        with self._lock:
            if self._scratch is None:
                top = self.root / _SCRATCH
                top.mkdir(parents=True, exist_ok=True)
                # Nobody may sweep between the making of a folder and the locking of it.
                with _flocked(top / _LOCK_NAME):
                    _sweep(top)
                    folder = top / uuid.uuid4().hex
                    folder.mkdir()
                    handle = _open_lock(folder / _LOCK_NAME)
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                weakref.finalize(self, _abandon, os.getpid(), handle, folder)
                self._scratch = folder
            return self._scratch


def _raise_unless_absent(err: OSError) -> None:
    # A folder that cannot be read must not look like one without objects. One that went away, or
    # that is a file, has none.
    if not isinstance(err, FileNotFoundError | NotADirectoryError):
        raise err


def write_fully(handle: int, buffers: Sequence[bytes | memoryview]) -> None:
    """Write `buffers`, flat ones, to a file descriptor, whatever the kernel takes at once.

    Raises
    ------
    OSError
        As the system call does; a part may have been written.
    """
    for start in range(0, len(buffers), _IOV_MAX):
        some = buffers[start : start + _IOV_MAX]
        written = os.writev(handle, some)
        if written < sum(map(len, some)):
            _write_rest(handle, some, written)


def _write_rest(handle: int, buffers: Sequence[bytes | memoryview], written: int) -> None:
    views = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
    while True:
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if not views:
            return
        views[0] = views[0][written:]
        written = os.writev(handle, views)


_IOV_MAX = os.sysconf("SC_IOV_MAX")


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make the names in `folder` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _read(path: str) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        data = os.read(handle, size)
        # One call moves at most 2 GiB, and some file systems less.
        parts = [data]
        while size > len(data) and (part := os.read(handle, size)):
            parts.append(part)
    finally:
        os.close(handle)
    return data if len(parts) == 1 else b"".join(parts)


def _read_range(path: str, start: int, end: int) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    try:
        parts = []
        # At least one call, which finds out that this is a folder.
        while part := os.pread(handle, max(end - start, 0), start):
            parts.append(part)
            start += len(part)
    finally:
        os.close(handle)
    return b"".join(parts)


def _fill(handle: int, data: Data, *, durable: bool) -> None:
    """Write the content of a new file."""
    write_fully(handle, [data] if isinstance(data, bytes) else data)
    if durable:
        os.fdatasync(handle)
    else:
        # Makes Linux begin to write it to the disk, so that a `sync` that follows finds most of
        # the work done: a consolidation took a third less time. What is written already may leave
        # the page cache, where nobody looks for it soon: it comes from the memory of its owner.
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _create(target: str, data: Data, *, durable: bool) -> None:
    """Create a file by way of one without a name."""
    folder = _parent(target)
    try:
        handle = os.open(folder, _O_TMPFILE | os.O_WRONLY, _MODE)
    except FileNotFoundError:
        _make_folder(Path(folder))
        handle = os.open(folder, _O_TMPFILE | os.O_WRONLY, _MODE)
    try:
        _fill(handle, data, durable=durable)
        # With a directory's descriptor, which an absolute path ignores, Python follows the link
        # from /proc to the file; without one, it would try to give the link itself a second name.
        os.link(f"/proc/self/fd/{handle}", target, src_dir_fd=handle, follow_symlinks=True)
    finally:
        os.close(handle)
    if durable:
        # The name must survive too, not only the content.
        sync_folder(folder)


def _sync_files(paths: Sequence[str]) -> None:
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fdatasync(handle)
        finally:
            os.close(handle)


def _make_folder(folder: Path) -> None:
    """Make `folder` and those above it, so that they survive a loss of power."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    sync_folder(folder.parent)


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_RDWR, 0o644)


@contextmanager
def _flocked(path: Path) -> Iterator[None]:
    handle = _open_lock(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sweep(top: Path) -> None:
    """Remove scratch folders whose owner is gone: their lock is free."""
    for folder in top.iterdir():
        if not folder.is_dir():
            continue
        try:
            handle = _open_lock(folder / _LOCK_NAME)
        except FileNotFoundError:
            continue  # its owner took it away since it was listed
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(handle)


def _abandon(owner: int, handle: int, folder: Path) -> None:
    if os.getpid() == owner:  # a forked child must not take its parent's folder away
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)
