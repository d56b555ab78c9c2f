"""The revision records of a bank, read ahead where many are needed, remembered within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock
from typing import NamedTuple

from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import CorruptionError, NotFoundError, Reason
from membank.wire.format import RevisionRecord, decode_revision
from membank.wire.format.layout import revision_key
from membank.wire.format.revision import record_sha256

_WHOLE_BYTES = 8 << 20
"""Bytes of records, as stored, that are remembered whole. One that changed 100,000 blocks has 3 MB."""
_OUTLINE_BYTES = 8 << 20
"""Bytes of records that are remembered without their detail: 16,000 that name one partition each."""
_AHEAD = 256
"""Records that are read ahead, at most; the walk may end at the first of them."""
_READERS = 16


class StoredRecord(NamedTuple):
    """A record as it is stored."""

    record: RevisionRecord
    """The record."""
    sha256: str
    """Digest of the object's bytes, for the record after it."""
    num_bytes: int
    """Size of the object."""


class RevisionRecords:
    """Reads revision records. Safe to use from threads.

    Parameters
    ----------
    objects
        The bank's storage.
    """

    # A record never changes once it exists. `_lock` guards the two caches. `_walking` is held while
    # records are read ahead, so that walks along the same part of the chain share the reading.

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self._lock = Lock()
        self._walking = Lock()
        self._whole: OrderedDict[int, StoredRecord] = OrderedDict()
        self._whole_bytes = 0
        self._outlines: OrderedDict[int, RevisionRecord] = OrderedDict()
        self._outline_bytes = 0

    def find(self, revision: int) -> StoredRecord | None:
        """Return the record of `revision`, or None while nobody has decided it."""
        with self._lock:
            if (known := self._whole.get(revision)) is not None:
                self._whole.move_to_end(revision)
                return known
        key = revision_key(revision)
        try:
            data = self._objects.get(key)
        except NotFoundError:
            return None
        record = decode_revision(data, key=f"{self._objects.url}/{key}")
        found = StoredRecord(record, record_sha256(data), len(data))
        with self._lock:
            self._remember(found)
        return found

    def outline(self, revision: int) -> RevisionRecord | None:
        """Return the record of `revision` without its `detail`, or None as `find` does."""
        with self._lock:
            if (known := self._outlines.get(revision)) is not None:
                self._outlines.move_to_end(revision)
                return known
        found = self.find(revision)
        return None if found is None else _without_detail(found.record)

    def outlines(self, revisions: Sequence[int]) -> Iterator[RevisionRecord]:
        """Yield the records of `revisions`, in this order, without their `detail`.

        The longer the caller goes on, the further is read ahead.

        Raises
        ------
        CorruptionError
            If one is damaged, or not there.
        """
        start, size = 0, 1
        while start < len(revisions):
            part = revisions[start : start + size]
            self._read_ahead(part)
            for revision in part:
                record = self.outline(revision)
                if record is None:
                    raise missing_record(revision)
                yield record
            start, size = start + size, min(2 * size, _AHEAD)

    def _read_ahead(self, revisions: Sequence[int]) -> None:
        with self._walking:
            with self._lock:
                unknown = [number for number in revisions if number not in self._outlines]
            if len(unknown) < 2:
                return
            with ThreadPoolExecutor(min(_READERS, len(unknown))) as pool:
                for _ in pool.map(self.find, unknown):
                    pass

    def _remember(self, found: StoredRecord) -> None:
        revision = found.record.revision
        if revision not in self._outlines:
            self._outlines[revision] = _without_detail(found.record)
            self._outline_bytes += _bytes_of(found.record)
        while self._outline_bytes > _OUTLINE_BYTES:
            _, outline = self._outlines.popitem(last=False)
            self._outline_bytes -= _bytes_of(outline)
        if revision in self._whole:
            return
        self._whole[revision] = found
        self._whole_bytes += found.num_bytes
        while self._whole_bytes > _WHOLE_BYTES:
            _, oldest = self._whole.popitem(last=False)
            self._whole_bytes -= oldest.num_bytes


def missing_record(revision: int) -> CorruptionError:
    """Return the error for a record that has to be there and is not."""
    return CorruptionError(
        f"revision record {revision_key(revision)} is missing; restore the file from a copy",
        reason=Reason.MANIFEST_CORRUPT,
        metadata={"key": revision_key(revision)},
    )


def _bytes_of(outline: RevisionRecord) -> int:
    # As measured with 1 to 1024 partitions, to a third.
    return 448 + 80 * len(outline.manifests)


def _without_detail(record: RevisionRecord) -> RevisionRecord:
    return replace(record, detail={})
