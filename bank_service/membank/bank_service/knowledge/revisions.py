"""The chain of revision records: what was done to a bank, by whom, and what is in force."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from membank.bank_service.store import Bank
from membank.wire.errors import CorruptionError, NotFoundError
from membank.wire.format import RevisionRecord

T = TypeVar("T")

REMEMBERED_REQUESTS = 4096
"""Newest records whose request ids are known; an older retry would be taken for a new request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RevisionDraft:
    """What a record says beside its place in the chain."""

    operation: str
    """What is done, such as "delete"."""
    principal: str
    """Who does it."""
    request_id: str
    """Id of the request."""
    manifests: Mapping[int, int] = field(default_factory=dict)
    """Manifest number of each partition that changes."""
    changes_tree: bool = False
    """True where a tree document was written for this revision."""
    removes: bool = False
    """True where a block is withheld or deleted by it."""
    detail: Mapping[str, object] = field(default_factory=dict)
    """What it is applied to, and the answer to a retry."""


class RevisionLog:
    """The records of one bank, with an index by request id. Threads: one writer, many readers.

    Parameters
    ----------
    bank
        The bank.
    clock
        Seconds since 1970-01-01 UTC.
    """

    # `_lock` guards the index and the two numbers, which `reload` and `append` replace together.

    def __init__(self, bank: Bank, *, clock: Callable[[], float] = time.time) -> None:
        self._bank = bank
        self._clock = clock
        self._lock = threading.Lock()
        self._by_request: OrderedDict[str, int] = OrderedDict()
        self._last = -1
        self._committed = self.read(0)
        self.reload()

    @property
    def last(self) -> int:
        """Number of the newest record, commit or abort."""
        return self._last

    @property
    def committed(self) -> RevisionRecord:
        """Newest record that is a commit: what is in force."""
        return self._committed

    def reload(self) -> None:
        """Read what others, or an append whose answer was lost, may have added."""
        last = self._bank.latest_number()
        first = max(self._last + 1, last - REMEMBERED_REQUESTS + 1, 0)
        for record in self._bank.outlines(range(first, last + 1)):
            self._take(record)
        back = self._bank.outlines(range(last, -1, -1))
        committed = self.read(next(record.revision for record in back if record.committed))
        with self._lock:
            self._last, self._committed = last, committed

    def read(self, revision: int) -> RevisionRecord:
        """Return the record of `revision`.

        Raises
        ------
        CorruptionError
            If it is damaged, or gone.
        """
        return self._bank.require_record(revision)

    def read_in_force(self, read: Callable[[RevisionRecord], T]) -> tuple[RevisionRecord, T]:
        """Return the newest commit and what `read` finds of it.

        A transaction destroys what it replaces, such as the tree document; where one came between,
        both are read again.
        """
        while True:
            record = self.committed
            try:
                found = read(record)
            except (NotFoundError, CorruptionError):
                if self.committed.revision == record.revision:
                    raise
            else:
                if self.committed.revision == record.revision:
                    return record, found

    def find(self, request_id: str) -> RevisionRecord | None:
        """Return the commit that this request id made, or None."""
        with self._lock:
            revision = self._by_request.get(request_id)
        return None if revision is None else self.read(revision)

    def committed_after(self, revision: int) -> Iterator[RevisionRecord]:
        """Yield the commits that came after `revision`, oldest first."""
        for number in range(revision + 1, self._last + 1):
            record = self.read(number)
            if record.committed:
                yield record

    def newest(self, limit: int) -> tuple[RevisionRecord, ...]:
        """Return the newest `limit` records, newest first."""
        first = max(0, self._last - limit + 1)
        return tuple(self.read(number) for number in range(self._last, first - 1, -1))

    def append(self, draft: RevisionDraft) -> RevisionRecord:
        """Create the next record; that it exists is the commit.

        Raises
        ------
        ConflictError
            If somebody else created it first; what is in force has to be read again.
        """
        revision = self._last + 1
        before = self._committed
        record = self._bank.decide(
            RevisionRecord(
                revision=revision,
                committed=True,
                nonce="",
                previous_sha256="",
                operation=draft.operation,
                principal=draft.principal,
                request_id=draft.request_id,
                time_s=self._clock(),
                manifests=draft.manifests,
                tree_revision=revision if draft.changes_tree else before.tree_revision,
                removal_revision=revision if draft.removes else before.removal_revision,
                detail=draft.detail,
            )
        )
        self._take(record)
        with self._lock:
            self._last, self._committed = revision, record
        return record

    def _take(self, record: RevisionRecord) -> None:
        if not (record.committed and record.request_id):
            return
        with self._lock:
            self._by_request[record.request_id] = record.revision
            while len(self._by_request) > REMEMBERED_REQUESTS:
                self._by_request.popitem(last=False)
