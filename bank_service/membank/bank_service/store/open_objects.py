"""From a URL to the `ObjectStore` that serves it."""

from __future__ import annotations

import re

from membank.bank_service.store.fsspec_objects import FsspecObjects
from membank.bank_service.store.local_objects import LocalObjects
from membank.bank_service.store.objects import ObjectStore
from membank.bank_service.store.s3_objects import S3Objects

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_objects(url: str) -> ObjectStore:
    """Return the store at `url`.

    ``s3://bucket/prefix`` is served by obstore, any other URL by fsspec; ``fsspec+s3://`` and the
    like choose fsspec by name. A path, or a ``file://`` URL, is a directory.

    Raises
    ------
    InvalidArgumentError
        If no installed file system serves the URL, or an S3 URL is malformed.
    FailedPreconditionError
        If there are no S3 credentials (STORE_CREDENTIALS).
    """
    if url.startswith("file://"):
        return LocalObjects(url.removeprefix("file://"))
    if url.startswith("s3://"):
        return S3Objects(url)
    if _SCHEME.match(url):
        return FsspecObjects(url)
    return LocalObjects(url)
