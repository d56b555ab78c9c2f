"""Reading one object of a bank that may be damaged in any way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import MembankError, NotFoundError

T = TypeVar("T")

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
