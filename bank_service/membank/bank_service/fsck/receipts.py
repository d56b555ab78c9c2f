"""Receipts: every deletion has one, it says what the record says, and somebody known signed it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from membank.bank_service.fsck.reading import (
    RESTORE,
    Fault,
    FaultKind,
    examine,
    examine_each,
    finding_of,
)
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.fsck.view import BankView
from membank.wire.format import decode_revision
from membank.wire.format.layout import (
    KEYS,
    RECEIPTS,
    key_id_in,
    number_in,
    public_key_key,
    receipt_key,
    revision_key,
)
from membank.wire.format.receipt import (
    DELETION,
    KEY_OPERATION,
    Deletion,
    Receipt,
    Recycling,
    SignedReceipt,
    decode_public_key,
    decode_receipt,
)
from membank.wire.signing import PublicKey, TrustedKeys


@dataclass(slots=True)
class ReceiptCheck:
    """A `BankCheck` of receipts and of the keys that signed them."""

    trusted: TrustedKeys | None = None
    """Keys whose signatures count; None = those that the chain of records vouches for."""
    num_receipts: int = 0
    """Receipts that were found in order by the last look."""

    def __call__(self, bank: BankView) -> Iterator[Finding]:
        """Yield what is wrong with receipts and keys."""
        self.num_receipts = 0
        keys = bank.objects.list(RECEIPTS)
        numbers = [n for key in keys if (n := number_in(key, receipt_key)) is not None]
        jobs = (
            (n, receipt_key(n), partial(decode_receipt, what=receipt_key(n)))
            for n in sorted(numbers)
        )
        for number, key, found in examine_each(bank.objects, jobs):
            if isinstance(found, Fault):
                if found.kind is not FaultKind.MISSING:
                    yield _damaged(found, key)
                continue
            problems = list(self._check(bank, number, found))
            self.num_receipts += not problems
            yield from problems
        yield from _missing(bank, set(numbers))
        yield from _check_keys(bank)

    def _check(self, bank: BankView, number: int, found: SignedReceipt) -> Iterator[Finding]:
        key = receipt_key(number)
        if number not in bank.chain.links:
            if number > bank.chain.latest:
                yield _cut_off(key, number)
            return  # a record that is damaged is reported as such
        problem = _difference(bank, number, found.receipt)
        if problem:
            yield Finding(
                kind=FindingKind.RECEIPT_MISMATCH,
                key=key,
                problem=problem,
                affects=f"what is proved of the deletion at revision {number}",
                remedy=f"compare it and {revision_key(number)} with copies; {RESTORE}",
            )
        doubt = self._doubt(bank, number, found.signature.public_key)
        if doubt:
            yield Finding(
                kind=FindingKind.RECEIPT_UNTRUSTED,
                key=key,
                problem=f"it is signed with the key {found.signature.public_key.text}, {doubt}",
                affects=f"what is proved of the deletion at revision {number}",
                remedy="find out whose key it is",
            )

    def _doubt(self, bank: BankView, number: int, key: PublicKey) -> str:
        """Return why a key does not sign for the deletion at `number`; empty = it does."""
        if self.trusted is not None and key not in self.trusted:
            return "which is not among the trusted ones"
        # A record that deleted nothing names none; that it has a receipt is a fault of its own.
        if not bank.chain.links[number].owes_receipt or key.text in _keys_for(bank, number):
            return ""
        is_named = any(link.signing_key == key.text for link in bank.chain.links.values())
        return (
            "which the log names for other deletions, and not for this one"
            if is_named
            else "which no record names"
        )


def _keys_for(bank: BankView, number: int) -> Iterator[str]:
    """Yield the keys that may sign for the deletion at `number`.

    Its record names one. Where the service came back with another one before there was a receipt,
    the next commit made that known, as nothing else is committed before.
    """
    yield bank.chain.links[number].signing_key
    for later in range(number + 1, bank.chain.latest + 1):
        link = bank.chain.links.get(later)
        # A record that cannot be read is reported as such, and may have been one of these.
        if link is None or not link.committed:
            continue
        if link.operation != KEY_OPERATION:
            return
        yield link.signing_key


def _difference(bank: BankView, number: int, receipt: Receipt) -> str:
    """Return in what a receipt differs from the record of its revision; empty = in nothing."""
    key, link = revision_key(number), bank.chain.links[number]
    record = examine(bank.objects, key, partial(decode_revision, key=key))
    if isinstance(record, Fault):
        return f"the record of revision {number} cannot be read: {record.problem}"
    if not record.committed or DELETION not in record.detail:
        return f"revision {number} deleted nothing"
    expected = {
        "revision": number,
        "record_sha256": link.sha256,
        "operation": record.operation,
        "principal": record.principal,
        "request_id": record.request_id,
        "time_s": record.time_s,
        "deletion": Deletion.from_json(record.detail[DELETION], what=key),
    }
    if bank.spec is not None:
        expected["bank_id"] = bank.spec.bank_id
    differing = [name for name, value in expected.items() if getattr(receipt, name) != value]
    if differing:
        return f"its {', '.join(differing)} is not what the record of revision {number} says"
    return _incomplete(receipt, link.deleted)


def _incomplete(receipt: Receipt, deleted: tuple[object, ...]) -> str:
    """Return what a receipt lacks by itself; empty = nothing."""
    deletion = receipt.deletion
    if {block.ref for block in deletion.blocks} != set(deleted):
        return "the blocks that it names are not those that were deleted"
    said = {number for one in receipt.acknowledgements for number in one.partitions}
    if said != deletion.partitions:
        return "not every owner has acknowledged the deletion"
    if receipt.recycling is not Recycling.DONE:
        return ""
    holders = {one.confirmed_by for one in receipt.acknowledgements}
    holders |= {owner.process for owner in deletion.owners}
    if holders & {one.now for one in receipt.acknowledgements}:
        return "a process that held what was deleted has not ended"
    if receipt.issuer in holders | {deletion.coordinator}:
        return "a process that is said to have ended has signed it"
    return ""


def _missing(bank: BankView, numbers: set[int]) -> Iterator[Finding]:
    chain = bank.chain
    last = max(
        (
            n
            for n, link in chain.links.items()
            if link.committed and link.operation != KEY_OPERATION
        ),
        default=-1,
    )
    for number, link in sorted(chain.links.items()):
        if not link.deleted or number in numbers:
            continue
        key, affects = receipt_key(number), f"the proof of the deletion at revision {number}"
        if not link.owes_receipt:
            yield Finding(
                kind=FindingKind.RECEIPT_NEVER_MADE,
                key=key,
                problem="the deletion was made without receipts, as by an earlier version",
                affects=affects,
                remedy="nothing",
            )
        elif number == last:
            yield Finding(
                kind=FindingKind.RECEIPT_PENDING,
                key=key,
                problem="the deletion is under way, or was cut short",
                affects=affects,
                remedy="let the service go on with it; one that is started does so by itself",
            )
        else:
            yield Finding(
                kind=FindingKind.RECEIPT_MISSING,
                key=key,
                problem="it is missing, and later revisions are there",
                affects=affects,
                remedy=RESTORE,
            )


def _check_keys(bank: BankView) -> Iterator[Finding]:
    vouched = {link.signing_key for link in bank.chain.links.values() if link.signing_key}
    ids = {key_id for key in bank.objects.list(KEYS) if (key_id := key_id_in(key)) is not None}
    for text in sorted(vouched):
        ids.add(PublicKey.parse(text).key_id)
    for key_id in sorted(ids):
        key = public_key_key(key_id)
        found = examine(bank.objects, key, partial(decode_public_key, what=key))
        affects = "signatures can still be checked: receipts and records have the key too"
        if isinstance(found, Fault):
            yield finding_of(
                found,
                key,
                missing=FindingKind.KEY_MISSING,
                damaged=FindingKind.KEY_DAMAGED,
                affects=affects,
            )
        elif found.key_id != key_id:
            yield Finding(
                kind=FindingKind.KEY_DAMAGED,
                key=key,
                problem=f"it holds the key {found.key_id}",
                affects=affects,
                remedy=RESTORE,
            )


def _damaged(fault: Fault, key: str) -> Finding:
    return finding_of(
        fault,
        key,
        missing=FindingKind.RECEIPT_MISSING,
        damaged=FindingKind.RECEIPT_DAMAGED,
        affects="what is proved of the deletion",
    )


def _cut_off(key: str, number: int) -> Finding:
    return Finding(
        kind=FindingKind.LOG_CUT_OFF,
        key=key,
        problem=f"the log has no record {number}, of which there is a receipt: its newest records "
        "were removed",
        affects="whatever was changed since",
        remedy="restore the records from a copy",
    )
