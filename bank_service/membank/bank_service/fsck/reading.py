"""Reading objects of a bank that may be damaged in any way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.store.objects import ObjectStore, directory_of
from membank.wire.errors import MembankError, NotFoundError

K = TypeVar("K")
T = TypeVar("T")
_READS_AHEAD = 8

RESTORE = "restore the file from a copy"
"""What helps where no other object holds the same."""


class FaultKind(Enum):
    """Why an object cannot be used."""

    MISSING = auto()
    UNREADABLE = auto()
    DAMAGED = auto()


@dataclass(frozen=True, slots=True)
class Fault:
    """An object that cannot be used."""

    kind: FaultKind
    """Why."""
    problem: str
    """The same in words."""
    cause: Exception | None = None
    """What was raised."""


def examine(objects: ObjectStore, key: str, decode: Callable[[bytes], T]) -> T | Fault:
    """Return what `decode` makes of an object, or why it makes nothing.

    Parameters
    ----------
    objects
        The bank's storage.
    key
        The object.
    decode
        Raises where the bytes are not what was written; whatever it raises is the object's fault.

    Returns
    -------
    T or Fault
        Never raises for what the object holds.
    """
    try:
        data = objects.get(key)
    except NotFoundError:
        return Fault(FaultKind.MISSING, "it is missing")
    except MembankError as err:
        return Fault(FaultKind.UNREADABLE, first_clause(err), err)
    try:
        return decode(data)
    except MembankError as err:
        return Fault(FaultKind.DAMAGED, first_clause(err), err)
    except Exception as err:  # a check must outlive any bytes
        return Fault(FaultKind.DAMAGED, f"it does not decode ({type(err).__name__}: {err})", err)


Job = tuple[K, str, Callable[[bytes], T]]
"""Whose object it is, its key, and what reads it."""


def examine_each(
    objects: ObjectStore, jobs: Iterable[Job[K, T]]
) -> Iterator[tuple[K, str, T | Fault]]:
    """Do `examine` for each job, and yield who asked, the key and the answer, in their order.

    Where every object takes a round trip, the next few are on their way meanwhile; on a local disk
    there is one in memory at a time.
    """
    if directory_of(objects) is not None:
        for who, key, decode in jobs:
            yield who, key, examine(objects, key, decode)
        return
    ahead: deque[tuple[K, str, Future[T | Fault]]] = deque()
    with ThreadPoolExecutor(_READS_AHEAD, thread_name_prefix="membank-fsck") as pool:
        for who, key, decode in jobs:
            ahead.append((who, key, pool.submit(examine, objects, key, decode)))
            if len(ahead) == _READS_AHEAD:
                first = ahead.popleft()
                yield first[0], first[1], first[2].result()
        for who, key, answer in ahead:
            yield who, key, answer.result()


def finding_of(
    fault: Fault,
    key: str,
    *,
    missing: FindingKind,
    damaged: FindingKind,
    affects: str,
    remedy: str = RESTORE,
) -> Finding:
    """Return the finding that reports `fault` of the object `key`."""
    if fault.kind is FaultKind.UNREADABLE:
        return unreadable(key, fault.problem, affects)
    return Finding(
        kind=missing if fault.kind is FaultKind.MISSING else damaged,
        key=key,
        problem=fault.problem,
        affects=affects,
        remedy=remedy,
    )


def unreadable(key: str, problem: str, affects: str) -> Finding:
    """Return the finding that reports an object which the storage does not hand out."""
    return Finding(
        kind=FindingKind.OBJECT_UNREADABLE,
        key=key,
        problem=problem,
        affects=affects,
        remedy="check the storage and its permissions, then check again; or restore the file",
    )


def first_clause(err: MembankError) -> str:
    """Return what an error says is wrong, without what to do about it."""
    # Messages end in what to do, after a semicolon; a finding has a place of its own for that.
    return err.message.split("; ", 1)[0]
