"""Objects at any fsspec URL."""

from __future__ import annotations

import builtins
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import fsspec
from fsspec.utils import stringify_path

from membank.bank_service.store.attempts import Attempts
from membank.bank_service.store.objects import Data, check_key, forked_error, whole
from membank.bank_service.store.s3_account import LARGE_UPLOAD_BYTES, S3Account, S3Config, S3Place
from membank.bank_service.store.s3_errors import INVALID_RANGE, s3_code
from membank.wire.errors import InvalidArgumentError, NotFoundError

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
        plain = url.removeprefix(_MARK)
        self._is_s3 = plain.startswith(_S3)
        bounds = config or S3Config()
        self._attempts = Attempts(
            self._url,
            # Other file systems have their own ways.
            retry_s=bounds.retry_s if self._is_s3 else 0.0,
            max_backoff_s=bounds.max_backoff_s,
        )
        self._fs, root = self._open(plain, bounds, silence_s=bounds.stall_timeout_s)
        self._uploads = self._fs
        if self._is_s3:
            # While a large object is sent, a server has nothing to say.
            self._uploads, _ = self._open(plain, bounds, silence_s=bounds.transfer_timeout_s)
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

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        # docstring inherited
        content = whole(data)
        self._run(key, lambda path: self._pipe(path, content))

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        # docstring inherited
        content = whole(data)
        self._run(key, lambda path: self._pipe(path, content, mode="create"))

    def sync(self, keys: Sequence[str]) -> None:
        # docstring inherited
        return

    def list(self, prefix: str) -> builtins.list[str]:
        # docstring inherited
        if prefix:
            check_key(prefix)
        top = f"{self._root}/{prefix}" if prefix else self._root
        self._check_process()
        found = self._attempts.run(prefix, lambda: self._fs.find(top))
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

    def _open(self, url: str, bounds: S3Config, *, silence_s: float) -> tuple[Any, str]:
        """Return a file system that waits `silence_s` for a server's next word, and its root."""
        settings = _s3_options(url, bounds, silence_s) if self._is_s3 else {}
        try:
            # Listings must be fresh: other processes write to the same bank.
            fs, root = fsspec.core.url_to_fs(
                url, use_listings_cache=False, **(settings | self._options)
            )
        except (ValueError, ImportError) as err:
            raise InvalidArgumentError(f"{self._url}: {err}") from err
        if self._is_s3:
            # See `Attempts`; botocore's own are switched off in the options.
            fs.retries = 1
        return fs, root

    def _pipe(self, path: str, data: bytes, **options: object) -> None:
        if self._is_s3:
            # In one request: a create-only upload in parts is not refused by every server at its end.
            options["chunksize"] = _CHUNK_BYTES
        fs = self._uploads if len(data) > LARGE_UPLOAD_BYTES else self._fs
        fs.pipe_file(path, data, **options)

    def _run(self, key: str, action: Callable[[str], T]) -> T:
        check_key(key)
        self._check_process()
        return self._attempts.run(key, lambda: action(f"{self._root}/{key}"))

    def _check_process(self) -> None:
        # The event loop's thread is not there in a forked child.
        if self._fs.async_impl and os.getpid() != self._pid:
            raise forked_error(self._url)


def _s3_options(url: str, config: S3Config, silence_s: float) -> dict[str, object]:
    """Return what s3fs is told beyond the URL."""
    S3Place.parse(url)
    account = S3Account()
    addressing = {"s3": {"addressing_style": "path"}} if account.endpoint else {}
    return {
        "endpoint_url": account.endpoint,
        "client_kwargs": {"region_name": account.region},
        "config_kwargs": {
            "connect_timeout": config.connect_timeout_s,
            "read_timeout": silence_s,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": config.max_idle_connections,
            **addressing,
        },
        # In one request: an object that is replaced meanwhile would be read half and half.
        "max_concurrency": 1,
        # Instances are shared otherwise, and what is set on one holds for all.
        "skip_instance_cache": True,
    }
