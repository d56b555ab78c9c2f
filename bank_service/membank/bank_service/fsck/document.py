"""bank.json: the spec, without which little else can be checked."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from membank.bank_service.fsck.reading import Fault, examine, finding_of
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import FailedPreconditionError, NotFoundError, Reason
from membank.wire.format import decode_spec
from membank.wire.format.layout import REVISIONS, SPEC_KEY
from membank.wire.spec import BankSpec


def read_spec(objects: ObjectStore, keys: Collection[str]) -> BankSpec | Finding:
    """Return the bank's spec, or what is wrong with it.

    Parameters
    ----------
    objects
        The bank's storage.
    keys
        Keys of its objects.

    Raises
    ------
    NotFoundError
        If there is no bank, not even a damaged one (NOT_A_BANK).
    FailedPreconditionError
        If a newer membank wrote it (FORMAT_TOO_NEW).
    """
    if SPEC_KEY not in keys and not any(key.startswith(f"{REVISIONS}/") for key in keys):
        raise NotFoundError(
            f"{objects.url} is not a bank: it has no {SPEC_KEY} and no {REVISIONS}; check the URL",
            reason=Reason.NOT_A_BANK,
            metadata={"bank": objects.url},
        )
    found = examine(objects, SPEC_KEY, partial(decode_spec, where=objects.url))
    if not isinstance(found, Fault):
        return found
    if isinstance(found.cause, FailedPreconditionError):
        raise found.cause
    return finding_of(
        found,
        SPEC_KEY,
        missing=FindingKind.SPEC_MISSING,
        damaged=FindingKind.SPEC_DAMAGED,
        affects="the whole bank: it does not open, and its partitions could not be checked",
    )
