"""From a URL to the `ObjectStore` that serves it."""

from __future__ import annotations

import re

from membank.bank_service.store.fsspec_objects import FsspecObjects
from membank.bank_service.store.local_objects import LocalObjects
from membank.bank_service.store.objects import ObjectStore

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def open_objects(url: str) -> ObjectStore:
    """Return the store at `url`: a directory's path, ``file://`` URL, or any fsspec URL.

    Raises
    ------
    InvalidArgumentError
        If no installed file system serves the URL.
    """
    if url.startswith("file://"):
        return LocalObjects(url.removeprefix("file://"))
    if _SCHEME.match(url):
        return FsspecObjects(url)
    return LocalObjects(url)
