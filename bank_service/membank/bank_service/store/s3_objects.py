"""Objects in a bucket, through obstore."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING

import obstore
from obstore.store import S3Store

from membank.bank_service.store.objects import check_key, forked_error, storage_error
from membank.bank_service.store.s3_account import S3Account, S3Config, S3Place
from membank.bank_service.store.s3_errors import INVALID_RANGE, s3_code
from membank.wire.errors import MembankError, NotFoundError, Reason, UnavailableError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

# Below this size a second copy costs less than the calls that avoid it.
_SMALL_BYTES = 256 * 1024
# Above this size the upload itself may take longer than a silence means anything.
_LARGE_UPLOAD_BYTES = 1024 * 1024
_NO_LIMIT = 1_000_000

# obstore's threads serve the process in which it was first used, and no child of that.
_used_in: int | None = None


class S3Objects:
    """An `ObjectStore` at ``s3://bucket/prefix``.

    Server and credentials come from the environment, the AWS configuration files or the machine's
    role (docs/s3.md); no instance holds or shows a secret, and a pickled one is opened again from its
    URL. It cannot be used across a fork: open it in the process that uses it.

    Parameters
    ----------
    url
        Bucket and prefix.
    config
        Bounds on the time of requests; None takes the defaults.

    Raises
    ------
    InvalidArgumentError
        If the URL is not of that form.
    FailedPreconditionError
        If there are no credentials, or no usable configuration (STORE_CREDENTIALS).
    """

    # Threads: nothing changes after construction; obstore's calls are safe.

    def __init__(self, url: str, config: S3Config | None = None) -> None:
        self._place = S3Place.parse(url)
        self._url = url.rstrip("/")
        self._config = config or S3Config()
        self._pid = os.getpid()
        account = S3Account()
        provider = account.credentials()

        def client(*, stalls: bool) -> S3Store:
            endpoint = account.endpoint
            return S3Store(
                self._place.bucket,
                config={
                    "region": account.region,
                    # Path style: an endpoint that is one address has no name per bucket.
                    "virtual_hosted_style_request": False,
                    # One DELETE per object; the bulk call is not served everywhere.
                    "disable_bulk_delete": True,
                    **({} if endpoint is None else {"endpoint": endpoint}),
                },
                client_options=_client_options(
                    self._config, stalls=stalls, plain=(endpoint or "").startswith("http://")
                ),
                retry_config=_retry_config(self._config),
                credential_provider=provider,
            )

        self._store = client(stalls=True)
        self._uploads = client(stalls=False)

    @property
    def url(self) -> str:
        # docstring inherited
        return self._url

    def get(self, key: str) -> bytes:
        # docstring inherited
        with self._translated(key) as path:
            found = obstore.get(self._store, path)
            size = found.meta["size"]
            if size <= _SMALL_BYTES:
                return found.bytes().to_bytes()
            return self._collect(found.stream(min_chunk_size=_SMALL_BYTES), key, size)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        # docstring inherited
        with self._translated(key) as path:
            if end <= start:
                obstore.head(self._store, path)
                return b""
            try:
                return obstore.get_range(self._store, path, start=start, end=end).to_bytes()
            except obstore.exceptions.BaseError as err:
                # S3 refuses a range that begins where the object has ended.
                if s3_code(err) == INVALID_RANGE:
                    return b""
                raise

    def put(self, key: str, data: bytes, *, durable: bool = False) -> None:
        # docstring inherited
        with self._translated(key) as path:
            # In one request: an upload in parts could leave parts behind, which cost and can be read.
            obstore.put(self._for(data), path, data, use_multipart=False)

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = False) -> None:
        # docstring inherited
        with self._translated(key) as path:
            obstore.put(self._for(data), path, data, mode="create", use_multipart=False)

    def sync(self, keys: Sequence[str]) -> None:
        # docstring inherited
        return

    def list(self, prefix: str) -> builtins.list[str]:
        # docstring inherited
        if prefix:
            check_key(prefix)
        top = self._place.path(prefix) if prefix else self._place.prefix
        with self._translated(prefix, check=False):
            pages = obstore.list(self._store, top or None)
            paths = [found["path"] for page in pages for found in page]
        below = f"{top}/" if top else ""
        start = len(self._place.path(""))
        # An object called exactly like the prefix is not below it.
        return sorted(path[start:] for path in paths if path.startswith(below))

    def delete(self, key: str) -> None:
        # docstring inherited
        with suppress(NotFoundError), self._translated(key) as path:
            obstore.delete(self._store, path)

    def keeps_versions(self, key: str) -> bool:
        # docstring inherited
        with self._translated(key) as path:
            return obstore.head(self._store, path)["version"] is not None

    def __repr__(self) -> str:
        return f"S3Objects({self._url!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return S3Objects, (self._url, self._config)

    def _for(self, data: bytes) -> S3Store:
        return self._uploads if len(data) > _LARGE_UPLOAD_BYTES else self._store

    def _collect(self, chunks: Iterator[bytes], key: str, size: int) -> bytes:
        # obstore's own buffer would have to be copied whole into bytes, which for 4 MB took half as
        # long again as the request. BytesIO gives away what it was written to, without a copy.
        buffer = io.BytesIO()
        for chunk in chunks:
            buffer.write(chunk)
        if buffer.tell() != size:
            raise UnavailableError(
                f"{self._url}/{key} ended after {buffer.tell()} of {size} bytes; try again",
                reason=Reason.STORE_FAILED,
                metadata={"object": f"{self._url}/{key}"},
            )
        return buffer.getvalue()

    @contextmanager
    def _translated(self, key: str, *, check: bool = True) -> Iterator[str]:
        if check:
            check_key(key)
        self._check_process()
        try:
            yield self._place.path(key)
        except MembankError:
            raise
        except Exception as err:
            raise storage_error(err, f"{self._url}/{key}".rstrip("/")) from err

    def _check_process(self) -> None:
        global _used_in
        pid = os.getpid()
        if _used_in is None:
            _used_in = pid
        # A call would wait for threads that a fork does not copy, for ever.
        if pid != self._pid or pid != _used_in:
            raise forked_error(self._url)


def _client_options(config: S3Config, *, stalls: bool, plain: bool) -> ClientConfig:
    options: ClientConfig = {
        "allow_http": plain,
        "connect_timeout": timedelta(seconds=config.connect_timeout_s),
        "timeout": timedelta(seconds=config.transfer_timeout_s),
        "pool_max_idle_per_host": str(config.max_idle_connections),
    }
    if stalls:
        options["read_timeout"] = timedelta(seconds=config.stall_timeout_s)
    return options


def _retry_config(config: S3Config) -> RetryConfig:
    return {
        # The time is the bound. Ten retries, the default, are over in two seconds.
        "max_retries": _NO_LIMIT if config.retry_s else 0,
        "retry_timeout": timedelta(seconds=config.retry_s),
        "backoff": {
            "init_backoff": timedelta(seconds=min(0.1, config.max_backoff_s)),
            "max_backoff": timedelta(seconds=config.max_backoff_s),
            "base": 2,
        },
    }
