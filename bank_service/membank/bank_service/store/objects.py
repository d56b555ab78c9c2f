"""The seam to storage: a flat space of immutable-or-replaced objects under relative keys.

Everything above needs seven verbs and two promises: `put_if_absent` creates or fails, whoever else
tries at the same moment, and what was deleted is gone. A store that cannot keep them is refused by
`probe_create_only`.
"""

from __future__ import annotations

import errno
import re
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from membank.bank_service.store.s3_errors import s3_error
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
# Stores behind a network repeat requests themselves; this is for the answer that got lost.
_PUBLISH_ATTEMPTS = 2
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")

PROBES = ".probes"
"""Prefix of the objects by which a store is tried out; no part of a bank."""

Data = bytes | Sequence[bytes | memoryview]
"""Content of an object: whole, or in pieces one after the other, which saves a copy where the
store can write them so. Pieces are bytes or flat views of bytes; none is retained."""


class ObjectStore(Protocol):
    """Objects of one bank. Keys are relative, with ``/`` between parts. Safe to use from threads.

    A reader sees an object whole or not at all, and sees what was put as soon as `put` returns.
    Errors: `NotFoundError` (OBJECT_MISSING), `AlreadyExistsError` (OBJECT_EXISTS),
    `ResourceExhaustedError` (NO_SPACE), `InvalidArgumentError` (a key that `check_key` refuses),
    `FailedPreconditionError` (what somebody must mend: NO_BUCKET, STORE_CREDENTIALS, STORE_DENIED,
    STORE_CLOCK_SKEW, otherwise STORE_FAILED), `UnavailableError` (STORE_FAILED: what may pass).

    Behind a network, requests that fail are repeated for a bounded time. A create-only put may
    therefore raise `AlreadyExistsError` although it was its own first attempt that created the
    object: who must know, calls `publish`; who does not, takes another key.
    """

    @property
    def url(self) -> str:
        """Where the objects are; holds no credentials."""

    def get(self, key: str) -> bytes:
        """Return an object."""

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return bytes `start` (inclusive) to `end` (exclusive), fewer where the object ends."""

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        """Write an object, replacing what was there.

        With `durable`, return only once it survives the loss of power of this machine; stores
        behind a network always do.
        """

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        """Create an object; raise `AlreadyExistsError` if there is one."""

    def sync(self, keys: Sequence[str]) -> None:
        """Make objects that were put survive the loss of power, many at the price of few."""

    def list(self, prefix: str) -> list[str]:
        """Return the keys that begin with ``prefix + "/"``, sorted; "" lists everything."""

    def delete(self, key: str) -> None:
        """Remove an object; no effect where there is none."""


@runtime_checkable
class Viewable(Protocol):
    """What a store may offer beside its verbs: an object without the copy that makes it `bytes`."""

    def get_view(self, key: str) -> memoryview:
        """Return an object as `ObjectStore.get` does, read-only, in the memory that it came in."""


@runtime_checkable
class Checking(Protocol):
    """What a store may offer beside its verbs: a checksum of what it reads, while it reads."""

    def get_checked(self, key: str, num_bytes: int) -> tuple[memoryview, int]:
        """Return an object as `ObjectStore.get` does, and the CRC-32C of its first `num_bytes`."""


@runtime_checkable
class VersionKeeping(Protocol):
    """What a store may offer beside its verbs, so that one that keeps versions can be refused."""

    def keeps_versions(self, key: str) -> bool:
        """Say whether what is put at `key`, where there is an object, stays after its removal."""


@runtime_checkable
class InDirectory(Protocol):
    """What a store may offer beside its verbs: its objects are files, beside which locks can lie."""

    @property
    def directory(self) -> Path | None:
        """The directory; None = there is none after all."""


@runtime_checkable
class Forgetting(Protocol):
    """What a store may offer beside its verbs, if a removal could be undone by a loss of power."""

    def delete_durably(self, key: str) -> None:
        """Remove an object as `ObjectStore.delete` does, and return once it stays away."""


@runtime_checkable
class Layered(Protocol):
    """What a store offers beside its verbs that keeps its objects in others."""

    @property
    def stores(self) -> Sequence[ObjectStore]:
        """The others, each of which must keep the promises of a store."""


def directory_of(objects: ObjectStore) -> Path | None:
    """Return the directory whose files the objects are; None = they lie elsewhere."""
    return objects.directory if isinstance(objects, InDirectory) else None


def forget(objects: ObjectStore, key: str) -> None:
    """Remove an object for good: stores behind a network always do."""
    if isinstance(objects, Forgetting):
        objects.delete_durably(key)
    else:
        objects.delete(key)


def whole(data: Data) -> bytes:
    """Return `data` in one piece."""
    return data if isinstance(data, bytes) else b"".join(data)


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
            with suppress(NotFoundError):
                if objects.get(key) == data:
                    return
                raise
            # Taken and yet not there: a conflict with a request that did not succeed.
            failure = UnavailableError(
                f"{objects.url}/{key}: the storage reports a conflict with nothing; try again",
                reason=Reason.STORE_FAILED,
                metadata={"object": f"{objects.url}/{key}"},
            )
        except UnavailableError as err:
            failure = err
        else:
            return
        if attempt == _PUBLISH_ATTEMPTS:
            raise failure


def probe_create_only(objects: ObjectStore) -> None:
    """Find out whether the store honours create-only puts and forgets what is deleted.

    Raises
    ------
    FailedPreconditionError
        If it does not, or keeps versions of what is deleted (reason STORE_UNSUPPORTED).
    """
    if isinstance(objects, Layered):
        for store in objects.stores:
            probe_create_only(store)
        return
    key = f"{PROBES}/{uuid.uuid4().hex}"
    first, second = (uuid.uuid4().bytes for _ in range(2))
    try:
        publish(objects, key, first)
        problem = _probe(objects, key, first, second)
    finally:
        # A probe that failed has said why; a leftover is ignored, and swept with the others.
        with suppress(MembankError):
            objects.delete(key)
    if problem is not None:
        raise FailedPreconditionError(
            f"{objects.url} cannot hold a bank, nor a keyring: {problem}",
            reason=Reason.STORE_UNSUPPORTED,
            metadata={"url": objects.url},
        )


def _probe(objects: ObjectStore, key: str, first: bytes, second: bytes) -> str | None:
    """Return what is wrong with the store, given an object that holds `first`."""
    # First: where versions are kept, a server may ignore create-only writes besides (Ceph).
    if isinstance(objects, VersionKeeping) and objects.keeps_versions(key):
        return _VERSIONED
    with suppress(AlreadyExistsError):
        objects.put_if_absent(key, second)
        return _IGNORED
    if objects.get(key) != first:
        return _IGNORED
    objects.delete(key)
    try:
        objects.put_if_absent(key, second)
    except AlreadyExistsError:
        # A bucket whose versioning is suspended may take a marker of the removal for the object.
        with suppress(NotFoundError):
            return None if objects.get(key) == second else _IGNORED
        return _NOT_FORGOTTEN
    return None


_IGNORED = (
    "it ignores create-only writes, so two writers could both believe that they committed; use a "
    "local directory or a store with conditional puts"
)
_VERSIONED = (
    "it keeps old versions, so what is deleted could still be read; use a bucket that never had "
    "versioning"
)
_NOT_FORGOTTEN = (
    "what was deleted there cannot be created again, as on a bucket whose versioning is suspended; "
    "use one that never had versioning"
)


def check_key(key: str) -> None:
    """Raise `InvalidArgumentError` unless `key` is relative, stays below its store and is printable.

    Control characters are refused because not every client of a bucket can name such objects.
    """
    parts = key.split("/")
    if any(part in {"", ".", ".."} for part in parts) or _CONTROL.search(key):
        raise InvalidArgumentError(f"{key!r} is not a key of an object")


def forked_error(url: str) -> FailedPreconditionError:
    """Return the error for a store that is used on the other side of a fork."""
    return FailedPreconditionError(
        f"{url} was in use before this process was forked, and its connections stayed behind; "
        "open it in the process that uses it, and start that by spawn, not fork",
        reason=Reason.STORE_FAILED,
        metadata={"url": url},
    )


def storage_error(err: Exception, what: str) -> MembankError:
    """Return the error of the tree that says what `err` means for `what` (URL and key)."""
    if (from_s3 := s3_error(err, what)) is not None:
        return from_s3
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
