"""Objects at any fsspec URL."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec.utils import stringify_path

from membank.bank_service.store.objects import check_key, forked_error, storage_error
from membank.bank_service.store.s3_account import S3Account, S3Config, S3Place
from membank.bank_service.store.s3_errors import INVALID_RANGE, s3_code
from membank.wire.errors import (
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    UnavailableError,
)

T = TypeVar("T")

_MARK = "fsspec+"
_S3 = "s3://"
# One PUT takes 5 GB; s3fs begins to upload in parts at twice this.
_CHUNK_BYTES = 2 * 2**30


class FsspecObjects:
    """An `ObjectStore` at an fsspec URL, such as ``fsspec+s3://bucket/bank`` or ``memory://bank``.

    Call it from threads, never from a coroutine: fsspec runs asynchronous file systems on an
    event loop of its own and blocks until that answers.

    Parameters
    ----------
    url
        Where; credentials come from the environment, as the file system documents. A leading
        ``fsspec+`` is left out, and kept in `url`, so that the same store is opened from it.
    config
        Bounds on the time of requests to S3; None takes the defaults.
    **options
        Passed to the file system.

    Raises
    ------
    InvalidArgumentError
        If no installed file system serves the URL.
    """

    # Threads: nothing changes after construction; the file system answers for itself.

    def __init__(self, url: str, config: S3Config | None = None, **options: object) -> None:
        self._url = url.rstrip("/")
        self._config = config
        self._options = options
        self._pid = os.getpid()
        plain = self._url.removeprefix(_MARK)
        self._is_s3 = plain.startswith(_S3)
        bounds = config or S3Config()
        # Only S3 is tried again here; other file systems have their own ways.
        self._retry_s = bounds.retry_s if self._is_s3 else 0.0
        self._max_backoff_s = bounds.max_backoff_s
        settings = _s3_options(plain, bounds) if self._is_s3 else {}
        try:
            # Listings must be fresh: other processes write to the same bank.
            self._fs, root = fsspec.core.url_to_fs(
                plain, use_listings_cache=False, **(settings | options)
            )
        except (ValueError, ImportError) as err:
            raise InvalidArgumentError(f"{url}: {err}") from err
        if self._is_s3:
            # Two layers of retries multiply, and neither knows of a time; ours does.
            self._fs.retries = 1
        self._root = stringify_path(root).rstrip("/")

    @property
    def url(self) -> str:
        # docstring inherited
        return self._url

    def get(self, key: str) -> bytes:
        # docstring inherited
        return self._run(key, lambda path: bytes(self._fs.cat_file(path)))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        # docstring inherited
        def read(path: str) -> bytes:
            if end <= start:
                if self._fs.info(path)["type"] != "file":
                    raise FileNotFoundError(path)
                return b""
            try:
                # By keyword: the second positional parameter is the version of an object on S3.
                return bytes(self._fs.cat_file(path, start=start, end=end))
            except OSError as err:
                # S3 refuses a range that begins where the object has ended.
                if s3_code(err) == INVALID_RANGE:
                    return b""
                raise

        return self._run(key, read)

    def put(self, key: str, data: bytes, *, durable: bool = False) -> None:
        # docstring inherited
        self._run(key, lambda path: self._fs.pipe_file(path, data, **self._whole()))

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = False) -> None:
        # docstring inherited
        self._run(key, lambda path: self._fs.pipe_file(path, data, mode="create", **self._whole()))

    def sync(self, keys: Sequence[str]) -> None:
        # docstring inherited
        return

    def list(self, prefix: str) -> builtins.list[str]:
        # docstring inherited
        if prefix:
            check_key(prefix)
        top = f"{self._root}/{prefix}" if prefix else self._root
        found = self._run(prefix, lambda _: self._fs.find(top), check=False)
        start = len(self._root) + 1
        # An object called exactly like the prefix is not below it; one whose name ends in a slash is
        # what the consoles of buckets show as a folder.
        return sorted(
            path[start:] for path in found if path.startswith(f"{top}/") and not path.endswith("/")
        )

    def delete(self, key: str) -> None:
        # docstring inherited
        with suppress(NotFoundError):
            self._run(key, self._fs.rm_file)

    def keeps_versions(self, key: str) -> bool:
        # docstring inherited
        return self._run(key, lambda path: self._fs.info(path).get("VersionId") is not None)

    def __repr__(self) -> str:
        return f"FsspecObjects({self._url!r})"

    def __reduce__(self) -> tuple[object, ...]:
        if self._options:
            raise TypeError("a store with options, which may hold secrets, is not pickled")
        return FsspecObjects, (self._url, self._config)

    def _whole(self) -> dict[str, Any]:
        # A create-only upload in parts is not refused by every server when it ends.
        return {"chunksize": _CHUNK_BYTES} if self._is_s3 else {}

    def _run(self, key: str, action: Callable[[str], T], *, check: bool = True) -> T:
        """Run `action` on the path of `key`, again where that may help, and translate its error."""
        if check:
            check_key(key)
        if self._fs.async_impl and os.getpid() != self._pid:
            raise forked_error(self._url)

        def attempt() -> T:
            with self._translated(key):
                return action(f"{self._root}/{key}")

        if not self._retry_s:
            return attempt()
        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(UnavailableError),
            stop=tenacity.stop_after_delay(self._retry_s),
            wait=tenacity.wait_random_exponential(0.1, self._max_backoff_s),
            reraise=True,
        )(attempt)

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except MembankError:
            raise
        except Exception as err:
            # File systems raise what their libraries raise (botocore, aiohttp, ...).
            raise storage_error(err, f"{self._url}/{key}".rstrip("/")) from err


def _s3_options(url: str, config: S3Config) -> dict[str, object]:
    """Return what s3fs is told beyond the URL."""
    S3Place.parse(url)
    account = S3Account()
    addressing = {"s3": {"addressing_style": "path"}} if account.endpoint else {}
    return {
        "endpoint_url": account.endpoint,
        "client_kwargs": {"region_name": account.region},
        "config_kwargs": {
            "connect_timeout": config.connect_timeout_s,
            # It also runs while a large object is sent, hence not the time of a silence.
            "read_timeout": config.transfer_timeout_s,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": config.max_idle_connections,
            **addressing,
        },
        # In one request: an object that is replaced meanwhile would be read half and half.
        "max_concurrency": 1,
        # Instances are shared otherwise, and what is set on one holds for all.
        "skip_instance_cache": True,
    }
