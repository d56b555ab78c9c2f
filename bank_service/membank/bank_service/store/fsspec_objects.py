"""Objects at any fsspec URL."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import fsspec
from fsspec.utils import stringify_path

from membank.bank_service.store.objects import check_key, storage_error
from membank.wire.errors import InvalidArgumentError, MembankError


class FsspecObjects:
    """An `ObjectStore` at an fsspec URL, such as ``s3://bucket/bank`` or ``memory://bank``.

    Call it from threads, never from a coroutine: fsspec runs asynchronous file systems on an
    event loop of its own and blocks until that answers.

    Parameters
    ----------
    url
        Where; credentials come from the environment, as the file system documents.
    **options
        Passed to the file system.
    """

    def __init__(self, url: str, **options: object) -> None:
        try:
            # Listings must be fresh: other processes write to the same bank.
            self._fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        except (ValueError, ImportError) as err:
            raise InvalidArgumentError(f"{url}: {err}") from err
        self._root = stringify_path(root).rstrip("/")
        self._url = url.rstrip("/")

    @property
    def url(self) -> str:
        # docstring inherited
        return self._url

    def get(self, key: str) -> bytes:
        # docstring inherited
        with self._translated(key) as path:
            return bytes(self._fs.cat_file(path))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        # docstring inherited
        with self._translated(key) as path:
            if end <= start:
                self._fs.info(path)
                return b""
            # By keyword: the second positional parameter is the version of an object on S3.
            return bytes(self._fs.cat_file(path, start=start, end=end))

    def put(self, key: str, data: bytes, *, durable: bool = False) -> None:
        # docstring inherited
        with self._translated(key) as path:
            self._fs.pipe_file(path, data)

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = False) -> None:
        # docstring inherited
        with self._translated(key) as path:
            try:
                self._fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                raise
            except OSError as err:
                # Some servers' conflict arrives as an unspecific error (Ceph: EINVAL).
                if self._fs.exists(path):
                    raise FileExistsError(path) from err
                raise

    def sync(self, keys: Sequence[str]) -> None:
        # docstring inherited
        return

    def list(self, prefix: str) -> builtins.list[str]:
        # docstring inherited
        top = f"{self._root}/{prefix}" if prefix else self._root
        with self._translated(prefix or ".", check=False):
            found = self._fs.find(top)
        start = len(self._root) + 1
        # An object called exactly like the prefix is not below it.
        return sorted(path[start:] for path in found if path.startswith(f"{top}/"))

    def delete(self, key: str) -> None:
        # docstring inherited
        with self._translated(key) as path, suppress(FileNotFoundError):
            self._fs.rm_file(path)

    @contextmanager
    def _translated(self, key: str, *, check: bool = True) -> Iterator[str]:
        if check:
            check_key(key)
        try:
            yield f"{self._root}/{key}"
        except MembankError:
            raise
        except Exception as err:
            # File systems raise what their libraries raise (botocore, aiohttp, ...).
            raise storage_error(err, f"{self._url}/{key}") from err
