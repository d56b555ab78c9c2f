"""Objects in a bucket, through obstore."""

from __future__ import annotations

import builtins
import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.store import S3Store

from membank.bank_service.store.attempts import Attempts
from membank.bank_service.store.objects import Data, check_key, forked_error, whole
from membank.bank_service.store.s3_account import (
    LARGE_UPLOAD_BYTES,
    CredentialProvider,
    S3Account,
    S3Config,
    S3Place,
)
from membank.bank_service.store.s3_errors import INVALID_RANGE, s3_code
from membank.wire.errors import NotFoundError, Reason, UnavailableError

if TYPE_CHECKING:
    from obstore.store import S3Config as S3Settings

T = TypeVar("T")

# Below this size a second copy costs less than the calls that avoid it.
_SMALL_BYTES = 256 * 1024

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

        self._store = self._client(account, provider, silence_s=self._config.stall_timeout_s)
        # While a large object is sent, a server has nothing to say.
        self._uploads = self._client(account, provider, silence_s=self._config.transfer_timeout_s)
        self._attempts = Attempts(
            self._url, retry_s=self._config.retry_s, max_backoff_s=self._config.max_backoff_s
        )

    @property
    def url(self) -> str:
        # docstring inherited
        return self._url

    def get(self, key: str) -> bytes:
        # docstring inherited
        def read(path: str) -> bytes:
            found = obstore.get(self._store, path)
            size = found.meta["size"]
            if size <= _SMALL_BYTES:
                return found.bytes().to_bytes()
            return self._collect(found.stream(min_chunk_size=_SMALL_BYTES), key, size)

        return self._run(key, read)

    def get_view(self, key: str) -> memoryview:
        # docstring inherited
        def read(path: str) -> memoryview:
            found = obstore.get(self._store, path)
            view = memoryview(found.bytes())
            self._require_whole(key, view.nbytes, found.meta["size"])
            return view

        return self._run(key, read)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        # docstring inherited
        def read(path: str) -> bytes:
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

        return self._run(key, read)

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        # docstring inherited
        content = whole(data)
        # In one request: an upload in parts could leave parts behind, which cost and can be read.
        self._run(
            key,
            lambda path: obstore.put(self._for(content), path, content, use_multipart=False),
        )

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        # docstring inherited
        content = whole(data)
        self._run(
            key,
            lambda path: obstore.put(
                self._for(content), path, content, mode="create", use_multipart=False
            ),
        )

    def sync(self, keys: Sequence[str]) -> None:
        # docstring inherited
        return

    def list(self, prefix: str) -> builtins.list[str]:
        # docstring inherited
        if prefix:
            check_key(prefix)
        top = self._place.path(prefix) if prefix else self._place.prefix

        def read() -> builtins.list[str]:
            pages = obstore.list(self._store, top or None)
            return [found["path"] for page in pages for found in page]

        self._check_process()
        paths = self._attempts.run(prefix, read)
        below = f"{top}/" if top else ""
        start = len(self._place.path(""))
        # An object called exactly like the prefix is not below it.
        return sorted(path[start:] for path in paths if path.startswith(below))

    def delete(self, key: str) -> None:
        # docstring inherited
        with suppress(NotFoundError):
            self._run(key, lambda path: obstore.delete(self._store, path))

    def keeps_versions(self, key: str) -> bool:
        # docstring inherited
        return self._run(key, lambda path: obstore.head(self._store, path)["version"] is not None)

    def __repr__(self) -> str:
        return f"S3Objects({self._url!r})"

    def __reduce__(self) -> tuple[object, ...]:
        return S3Objects, (self._url, self._config)

    def _client(
        self, account: S3Account, provider: CredentialProvider, *, silence_s: float
    ) -> S3Store:
        """Return a client that waits `silence_s` for the server's next word."""
        config = self._config
        where: S3Settings = {} if account.endpoint is None else {"endpoint": account.endpoint}
        return S3Store(
            self._place.bucket,
            config={
                "region": account.region,
                # Path style: an endpoint that is one address has no name per bucket.
                "virtual_hosted_style_request": False,
                # One DELETE per object; the bulk call is not served everywhere.
                "disable_bulk_delete": True,
                **where,
            },
            client_options={
                "allow_http": (account.endpoint or "").startswith("http://"),
                "connect_timeout": timedelta(seconds=config.connect_timeout_s),
                "read_timeout": timedelta(seconds=silence_s),
                "timeout": timedelta(seconds=config.transfer_timeout_s),
                "pool_max_idle_per_host": str(config.max_idle_connections),
            },
            retry_config={"max_retries": 0},
            credential_provider=provider,
        )

    def _for(self, data: bytes) -> S3Store:
        return self._uploads if len(data) > LARGE_UPLOAD_BYTES else self._store

    def _collect(self, chunks: Iterator[bytes], key: str, size: int) -> bytes:
        # obstore's own buffer would have to be copied whole into bytes, which for 4 MB took half as
        # long again as the request. BytesIO gives away what it was written to, without a copy.
        buffer = io.BytesIO()
        for chunk in chunks:
            buffer.write(chunk)
        self._require_whole(key, buffer.tell(), size)
        return buffer.getvalue()

    def _require_whole(self, key: str, num_bytes: int, size: int) -> None:
        if num_bytes != size:
            raise UnavailableError(
                f"{self._url}/{key} ended after {num_bytes} of {size} bytes; try again",
                reason=Reason.STORE_FAILED,
                metadata={"object": f"{self._url}/{key}"},
            )

    def _run(self, key: str, action: Callable[[str], T]) -> T:
        check_key(key)
        self._check_process()
        path = self._place.path(key)
        return self._attempts.run(key, lambda: action(path))

    def _check_process(self) -> None:
        global _used_in
        pid = os.getpid()
        if _used_in is None:
            _used_in = pid
        # A call would wait for threads that a fork does not copy, for ever.
        if pid != self._pid or pid != _used_in:
            raise forked_error(self._url)
