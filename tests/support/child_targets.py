"""Functions for processes of their own: a spawned process imports them by name."""

from __future__ import annotations

import itertools
from multiprocessing.connection import Connection
from pathlib import Path

from membank.bank_service.store.journal import FrameKind, LocalJournal, Ownership
from membank.wire.errors import NotFoundError


def refuse(task: str, pipe: Connection) -> None:
    """Fail with an error that says `task`."""
    raise NotFoundError(task)


def die(task: str, pipe: Connection) -> None:
    """End without a word."""
    raise SystemExit(int(task))


def wait(task: str, pipe: Connection) -> None:
    """Do nothing until the other end is closed."""
    pipe.recv()


def append_until_killed(folder: str, acknowledged: Connection) -> None:
    """Append to a journal whose segments are written over, and send each LSN once it is there."""
    journal = LocalJournal.open(Path(folder), "bank/3", segment_bytes=1 << 20, spare_bytes=1 << 26)
    journal.begin(Ownership(1, "owner", ""), 0)
    for lsn in itertools.count(1):
        # Of many pages, so that a kill falls into the middle of one as often as not.
        payload = numbered_payload(lsn, (1 << 20) + lsn * 4099 % 70001)
        acknowledged.send(journal.append(FrameKind.UPDATE, [[payload]]))
        if lsn % 5 == 0:
            journal.trim(lsn - 1)


def numbered_payload(number: int, num_bytes: int) -> bytes:
    """Return bytes that depend on `number`."""
    return (b"%d." % number * (num_bytes // 2 + 1))[:num_bytes]
