"""bank.json: the spec, without which little else can be checked."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from membank.bank_service.fsck.reading import examine, finding_of
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import FailedPreconditionError, NotFoundError, Reason
from membank.wire.format import BankDocument, decode_bank
from membank.wire.format.layout import REVISIONS, SPEC_KEY
from membank.wire.format.sealed import require_keyring
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
        If a newer membank wrote it (FORMAT_TOO_NEW), or the keyring is not the one that it needs
        (KEYRING_NEEDED, KEYRING_MISMATCH, BANK_NOT_SEALED).
    CorruptionError
        If the keyring does not say whose it is.
    """
    if SPEC_KEY not in keys and not any(key.startswith(f"{REVISIONS}/") for key in keys):
        raise NotFoundError(
            f"{objects.url} is not a bank: it has no {SPEC_KEY} and no {REVISIONS}; check the URL",
            reason=Reason.NOT_A_BANK,
            metadata={"bank": objects.url},
        )
    found = examine(objects, SPEC_KEY, partial(decode_bank, where=objects.url))
    if isinstance(found, BankDocument):
        require_keyring(objects, found, where=objects.url)
        return found.spec
    if isinstance(found.cause, FailedPreconditionError):
        raise found.cause
    return finding_of(
        found,
        SPEC_KEY,
        missing=FindingKind.SPEC_MISSING,
        damaged=FindingKind.SPEC_DAMAGED,
        affects="the whole bank: it does not open, and its partitions could not be checked",
    )
