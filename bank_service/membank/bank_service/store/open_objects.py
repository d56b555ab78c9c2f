"""From a URL to the `ObjectStore` that serves it."""

from __future__ import annotations

import re

from membank.bank_service.store.fsspec_objects import FsspecObjects
from membank.bank_service.store.local_objects import LocalObjects
from membank.bank_service.store.objects import ObjectStore
from membank.bank_service.store.s3_objects import S3Objects
from membank.bank_service.store.sealed_objects import SealedObjects
from membank.wire.errors import InvalidArgumentError, Reason

_FSSPEC = "fsspec+"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_objects(url: str, *, keyring: str = "") -> ObjectStore:
    """Return the store at `url`, which seals with the keys at `keyring` unless that is empty.

    ``s3://bucket/prefix`` is served by obstore, any other URL by fsspec; ``fsspec+s3://`` and the
    like choose fsspec by name. A path, or a ``file://`` URL, is a directory.

    Raises
    ------
    InvalidArgumentError
        If no installed file system serves the URL, an S3 URL is malformed, or one of the two places
        lies within the other (BAD_CONFIG).
    FailedPreconditionError
        If there are no S3 credentials (STORE_CREDENTIALS).
    """
    if keyring:
        return SealedObjects(*_apart(open_objects(url), open_objects(keyring)))
    if url.startswith("file://"):
        return LocalObjects(url.removeprefix("file://"))
    if url.startswith("s3://"):
        return S3Objects(url)
    if _SCHEME.match(url):
        return FsspecObjects(url)
    return LocalObjects(url)


def _apart(objects: ObjectStore, keyring: ObjectStore) -> tuple[ObjectStore, ObjectStore]:
    """Return both; raise where a copy of the one place would have the other in it."""
    bank_at, keyring_at = (f"{store.url.removeprefix(_FSSPEC)}/" for store in (objects, keyring))
    if bank_at.startswith(keyring_at) or keyring_at.startswith(bank_at):
        raise InvalidArgumentError(
            f"the keyring {keyring.url} and the bank {objects.url} lie in one place: whoever has a "
            "copy of it would have the keys; choose another place for the keyring",
            reason=Reason.BAD_CONFIG,
            metadata={"bank": objects.url, "keyring": keyring.url},
        )
    return objects, keyring
