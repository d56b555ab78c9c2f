"""Sealed objects of which half is missing: a key without an object, an object without its key."""

from __future__ import annotations

from collections.abc import Iterator

from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.fsck.slots import slot_of
from membank.bank_service.fsck.view import BankView, PartitionView
from membank.bank_service.store.sealed_objects import halves_of
from membank.wire.format.layout import PACKS, TREES

_GONE = "nothing, where no damage is found: `membank gc` removes it"


def check_document_seals(bank: BankView) -> Iterator[Finding]:
    """Report halves of trees and packs; one that is in force is reported as missing, too."""
    for prefix in (TREES, PACKS):
        halves = halves_of(bank.objects, prefix)
        for key in sorted(halves.without_key):
            yield _without_key(key)
        for key in sorted(halves.without_object):
            yield _without_object(key)


def check_seals(view: PartitionView) -> Iterator[Finding]:
    """Report halves of slots and journal objects; what a manifest names is damage."""
    for key in sorted(view.halves.without_key):
        slot = slot_of(view.spec, view.number, key)
        use = view.manifests.slots.get(slot) if slot is not None else None
        if use is None or view.manifests.is_doomed(use):
            yield _without_key(key)
        else:
            yield Finding(
                kind=FindingKind.SEAL_KEY_MISSING,
                key=key,
                problem="it is there, and its key is not in the keyring",
                affects=f"block {use.ref}",
                remedy="restore the key from a copy of the keyring, if there is one",
            )
    for key in sorted(view.halves.without_object):
        yield _without_object(key)


def _without_key(key: str) -> Finding:
    return Finding(
        kind=FindingKind.SEAL_UNFINISHED,
        key=key,
        problem="its key is destroyed, so nobody can read it: its removal was cut off after that",
        remedy=_GONE,
    )


def _without_object(key: str) -> Finding:
    return Finding(
        kind=FindingKind.SEAL_UNFINISHED,
        key=key,
        problem="the keyring has a key for it, and there is no such object: a writer at work, or one "
        "that was killed",
        remedy=_GONE,
    )
