"""The seam to storage: a flat space of immutable-or-replaced objects under relative keys.

Everything above needs six verbs and one promise: `put_if_absent` creates or fails, whoever else
tries at the same moment. A store that cannot keep it is refused by `probe_create_only`.
"""

from __future__ import annotations

import errno
import uuid
from collections.abc import Sequence
from typing import Protocol

from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})
_PUBLISH_ATTEMPTS = 4


class ObjectStore(Protocol):
    """Objects of one bank. Keys are relative, with ``/`` between parts. Safe to use from threads.

    A reader sees an object whole or not at all, and sees what was put as soon as `put` returns.
    Errors: `NotFoundError` (OBJECT_MISSING), `AlreadyExistsError` (OBJECT_EXISTS),
    `ResourceExhaustedError` (NO_SPACE), `FailedPreconditionError` (STORE_FAILED: no permission,
    read-only), `UnavailableError` (STORE_FAILED: anything that may pass).
    """

    @property
    def url(self) -> str:
        """Where the objects are; holds no credentials."""

    def get(self, key: str) -> bytes:
        """Return an object."""

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return bytes `start` (inclusive) to `end` (exclusive), fewer where the object ends."""

    def put(self, key: str, data: bytes, *, durable: bool = False) -> None:
        """Write an object, replacing what was there.

        With `durable`, return only once it survives the loss of power of this machine; stores
        behind a network always do.
        """

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = False) -> None:
        """Create an object; raise `AlreadyExistsError` if there is one."""

    def sync(self, keys: Sequence[str]) -> None:
        """Make objects that were put survive the loss of power, many at the price of few."""

    def list(self, prefix: str) -> list[str]:
        """Return the keys that begin with ``prefix + "/"``, sorted; "" lists everything."""

    def delete(self, key: str) -> None:
        """Remove an object; no effect where there is none."""


def publish(objects: ObjectStore, key: str, data: bytes) -> None:
    """Create an object whose success must be known, durably.

    `data` must hold a nonce of this writer. If the answer to a put is lost, the next attempt
    finds the key taken; bytes equal to ours then mean that the first attempt succeeded.

    Raises
    ------
    AlreadyExistsError
        If somebody else created the object.
    """
    for attempt in range(1, _PUBLISH_ATTEMPTS + 1):
        try:
            objects.put_if_absent(key, data, durable=True)
        except AlreadyExistsError:
            if objects.get(key) == data:
                return
            raise
        except UnavailableError:
            if attempt == _PUBLISH_ATTEMPTS:
                raise
        else:
            return


def probe_create_only(objects: ObjectStore) -> None:
    """Find out whether the store honours create-only puts, by trying two of them.

    Raises
    ------
    FailedPreconditionError
        If the second one succeeded or replaced the first (reason STORE_UNSUPPORTED).
    """
    key = f".probe-{uuid.uuid4().hex}"
    try:
        objects.put_if_absent(key, b"first")
        try:
            objects.put_if_absent(key, b"second")
        except AlreadyExistsError:
            honoured = objects.get(key) == b"first"
        else:
            honoured = False
    finally:
        objects.delete(key)
    if not honoured:
        raise FailedPreconditionError(
            f"{objects.url} ignores create-only writes, so two writers could both believe that "
            "they committed; use a local directory or a store with conditional puts",
            reason=Reason.STORE_UNSUPPORTED,
            metadata={"url": objects.url},
        )


def check_key(key: str) -> None:
    """Raise `InvalidArgumentError` unless `key` is relative and stays below its store."""
    parts = key.split("/")
    if not key or any(part in {"", ".", ".."} for part in parts):
        raise InvalidArgumentError(f"{key!r} is not a key of an object")


def storage_error(err: Exception, what: str) -> MembankError:
    """Return the error of the tree that says what `err` means for `what` (URL and key)."""
    number = err.errno if isinstance(err, OSError) else None
    metadata = {"object": what}
    if isinstance(err, FileNotFoundError):
        return NotFoundError(
            f"{what} does not exist", reason=Reason.OBJECT_MISSING, metadata=metadata
        )
    if isinstance(err, FileExistsError):
        return AlreadyExistsError(f"{what} exists", reason=Reason.OBJECT_EXISTS, metadata=metadata)
    if number in _NO_SPACE:
        return ResourceExhaustedError(
            f"no space left for {what} ({err}); free some and try again",
            reason=Reason.NO_SPACE,
            metadata=metadata,
        )
    if number in _REFUSED or isinstance(err, PermissionError):
        return FailedPreconditionError(
            f"the storage refuses access to {what} ({err}); check the path and its permissions",
            reason=Reason.STORE_FAILED,
            metadata=metadata,
        )
    return UnavailableError(
        f"the storage failed at {what}: {type(err).__name__}: {err}",
        reason=Reason.STORE_FAILED,
        metadata=metadata,
    )
