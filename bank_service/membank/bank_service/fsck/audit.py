"""The check of the audit log alone: its chain, the receipts, and that what was deleted is gone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from membank.bank_service.fsck.checker import Checks, check_bank, check_chain, check_journals
from membank.bank_service.fsck.receipts import ReceiptCheck
from membank.bank_service.fsck.removal import (
    check_deleted_trees,
    check_former_removals,
    check_removal,
)
from membank.bank_service.fsck.report import Finding, FindingKind, FsckReport
from membank.bank_service.fsck.slots import check_unnamed
from membank.bank_service.fsck.view import BankView
from membank.bank_service.store.bank import Bank
from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import InvalidArgumentError
from membank.wire.format.layout import revision_key
from membank.wire.format.revision import record_sha256
from membank.wire.signing import TrustedKeys


@dataclass(frozen=True, slots=True)
class Head:
    """The newest record at some time: by it a log is known that lost its end, or was made anew."""

    revision: int
    """Its number."""
    sha256: str
    """SHA-256 of its bytes, in hexadecimal."""

    def __str__(self) -> str:
        return f"{self.revision}:{self.sha256}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Read ``NUMBER:DIGEST``."""
        match = re.fullmatch(r"(\d+):([0-9a-f]{64})", text.strip())
        if match is None:
            raise InvalidArgumentError(
                f"{text[:100]!r} is no head of a log; write NUMBER:DIGEST, as `membank audit head` "
                "prints it"
            )
        return cls(int(match[1]), match[2])


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """What a check of the audit log found."""

    found: FsckReport
    """Records and findings."""
    num_deletions: int
    """Revisions that deleted something."""
    num_blocks: int
    """Blocks that they deleted."""
    num_receipts: int
    """Receipts that are in order."""

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON-able values."""
        counts = {name: getattr(self, name) for name in ("num_deletions", "num_blocks")}
        return {**self.found.to_json(), **counts, "num_receipts": self.num_receipts}


def head_of(objects: ObjectStore) -> Head:
    """Return the head of a bank's log, to be kept elsewhere.

    Raises
    ------
    NotFoundError
        If there is no bank (NOT_A_BANK).
    CorruptionError
        If a record is missing or damaged.
    """
    bank = Bank.open(objects)
    number = bank.latest_number()
    bank.require_record(number)
    return Head(number, record_sha256(objects.get(revision_key(number))))


def verify_audit(
    objects: ObjectStore,
    *,
    trusted: TrustedKeys | None = None,
    heads: Sequence[Head] = (),
    journal_dir: str | Path | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> AuditReport:
    """Check the chain of records, every receipt, and that nothing deleted is stored any more.

    Nothing is written, and a service may be running.

    Parameters
    ----------
    objects
        The bank's storage.
    trusted
        Keys whose receipts count; None = those that the chain vouches for.
    heads
        Heads of the log that were kept elsewhere.
    journal_dir
        Directory of the journals, where the service is set to keep them outside of the bank.
    on_progress
        Called with the number of objects that were looked at, and of all.

    Returns
    -------
    AuditReport
        What was found.

    Raises
    ------
    MembankError
        As for `check_bank`.
    """
    receipts, deletions = ReceiptCheck(trusted), _DeletionCount()
    found = check_bank(
        objects,
        journal_dir=journal_dir,
        deep=False,
        checks=Checks(
            bank=(check_chain, _HeadCheck(tuple(heads)), receipts, check_deleted_trees, deletions),
            partition=(check_removal, check_former_removals, check_unnamed, check_journals),
        ),
        on_progress=on_progress,
    )
    return AuditReport(
        found=found,
        num_deletions=deletions.num_deletions,
        num_blocks=deletions.num_blocks,
        num_receipts=receipts.num_receipts,
    )


@dataclass(slots=True)
class _DeletionCount:
    """A `BankCheck` that finds nothing wrong, and counts."""

    num_deletions: int = 0
    num_blocks: int = 0

    def __call__(self, bank: BankView) -> Iterator[Finding]:
        deleted = [link.deleted for link in bank.chain.links.values() if link.deleted]
        self.num_deletions, self.num_blocks = len(deleted), sum(map(len, deleted))
        return iter(())


@dataclass(frozen=True, slots=True)
class _HeadCheck:
    """A `BankCheck` that compares the log with heads that were kept."""

    heads: tuple[Head, ...]

    def __call__(self, bank: BankView) -> Iterator[Finding]:
        for head in self.heads:
            link = bank.chain.links.get(head.revision)
            if link is not None and link.sha256 == head.sha256:
                continue
            is_gone = link is None and head.revision > bank.chain.latest
            yield Finding(
                kind=FindingKind.LOG_CUT_OFF if is_gone else FindingKind.HEAD_MISMATCH,
                key=revision_key(head.revision),
                problem="it was there when the head was taken, and is not any more"
                if is_gone
                else "it is not the record that was there when the head was taken",
                affects="the log: records were removed or replaced",
                remedy="restore the records from a copy",
            )
