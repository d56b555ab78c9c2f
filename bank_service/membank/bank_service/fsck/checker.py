"""The check of a whole bank, part by part, with a second look at whatever seems wrong.

A service may be at work: an object can vanish between the moment at which something names it and
the moment at which it is read. So nothing but a note is reported on one look. A second one reads
everything afresh that led to the suspicion, and what it does not find again was no fault.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from membank.bank_service.fsck.arrays import check_arrays
from membank.bank_service.fsck.document import read_spec
from membank.bank_service.fsck.journals import check_continuity, check_deleted
from membank.bank_service.fsck.receipts import ReceiptCheck
from membank.bank_service.fsck.removal import check_removal
from membank.bank_service.fsck.replay import check_replay
from membank.bank_service.fsck.report import (
    Checked,
    Finding,
    FindingLog,
    FsckReport,
    Severity,
)
from membank.bank_service.fsck.retention import lost_records, missing_manifests
from membank.bank_service.fsck.seals import check_document_seals, check_seals
from membank.bank_service.fsck.slots import check_slots, check_unnamed
from membank.bank_service.fsck.strays import (
    JOURNAL_KEY,
    PARTITION_KEY,
    check_names,
    check_partition_names,
    check_scratch,
)
from membank.bank_service.fsck.trees import check_trees
from membank.bank_service.fsck.view import BankView, PartitionView
from membank.bank_service.store.objects import ObjectStore


class BankCheck(Protocol):
    """Checks one kind of thing in a bank, by reading alone."""

    def __call__(self, bank: BankView) -> Iterator[Finding]:
        """Yield what is not as it should be; never raise for what objects hold."""


class PartitionCheck(Protocol):
    """Checks one kind of thing in a partition, by reading alone."""

    def __call__(self, view: PartitionView) -> Iterator[Finding]:
        """Yield what is not as it should be; never raise for what objects hold."""


def check_chain(bank: BankView) -> Iterator[Finding]:
    """Report records that are missing, damaged, or linked to another one."""
    yield from bank.chain.findings


def _check_snapshots(bank: BankView) -> Iterator[Finding]:
    yield from bank.snapshots.findings


def _check_packs(bank: BankView) -> Iterator[Finding]:
    yield from bank.packs.findings


def _check_manifests(view: PartitionView) -> Iterator[Finding]:
    yield from view.manifests.findings
    yield from missing_manifests(view.manifests, view.needed)
    yield from lost_records(view.bank.chain, view.manifests)


def check_journals(view: PartitionView) -> Iterator[Finding]:
    """Check what is in the journals, and that nothing deleted is in them."""
    index, journals = view.manifests, view.journals
    is_elsewhere = view.bank.journal_dir is not None
    yield from check_continuity(index, journals, view.journal_place, is_elsewhere=is_elsewhere)
    if not index.is_certain:
        return
    # Spares are removed by a deletion; one at a time, as they may be large.
    for journal in itertools.chain(journals, view.spares() if index.deleted else ()):
        yield from check_deleted(index, journal)
    if view.bank.deep:
        yield from check_replay(view)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checks:
    """What to look at."""

    bank: tuple[BankCheck, ...]
    """Once for the bank."""
    partition: tuple[PartitionCheck, ...]
    """Once for each partition."""


EVERYTHING = Checks(
    bank=(
        check_chain,
        _check_snapshots,
        check_trees,
        _check_packs,
        check_document_seals,
        ReceiptCheck(),
    ),
    partition=(
        _check_manifests,
        check_arrays,
        check_slots,
        check_unnamed,
        check_seals,
        check_removal,
        check_journals,
        check_partition_names,
    ),
)
"""All that there is."""


def check_bank(
    objects: ObjectStore,
    *,
    journal_dir: str | Path | None = None,
    deep: bool = True,
    checks: Checks = EVERYTHING,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> FsckReport:
    """Check every reference, every checksum and every journal frame of a bank.

    Nothing is written. A service may be running: what it changes meanwhile is no finding.

    Parameters
    ----------
    objects
        The bank's storage.
    journal_dir
        Directory of the journals, where the service is set to keep them outside of the bank.
    deep
        False to look only whether slots exist, and to leave journalled updates as they are.
    checks
        What to look at.
    on_progress
        Called with the number of objects that were looked at, and of all.

    Returns
    -------
    FsckReport
        What was found.

    Raises
    ------
    NotFoundError
        If there is no bank, not even a damaged one (NOT_A_BANK).
    FailedPreconditionError
        If a newer membank wrote it (FORMAT_TOO_NEW), or the storage refuses to be listed.
    UnavailableError
        If the storage cannot be listed.
    """
    keys = objects.list("")
    log, progress = FindingLog(), _Progress(len(keys), on_progress)
    found = read_spec(objects, keys)
    spec = None if isinstance(found, Finding) else found
    if isinstance(found, Finding):
        log.add(found)
    bank = BankView(
        objects,
        spec,
        deep=deep,
        journal_dir=None if journal_dir is None else Path(journal_dir),
        with_journals={int(m[1]) for key in keys if (m := JOURNAL_KEY.fullmatch(key))},
        looked_at=progress.advance,
    )
    log.extend(check_scratch(objects))
    log.extend(check_names(keys, None if spec is None else spec.num_partitions))
    sizes = _partition_sizes(keys)
    # The names of a large bank's objects are most of what its check would hold in memory.
    del keys
    progress.begin(progress.total - sum(sizes.values()))
    log.merge(_look_twice(bank, partial(_bank_findings, checks)))
    # Without a spec nobody can tell what belongs into a partition.
    for number in range(0 if spec is None else spec.num_partitions):
        progress.begin(sizes[number])
        log.merge(_look_twice(bank, partial(_partition_findings, checks, number)))
    progress.begin(0)
    return _report(bank, log)


def _bank_findings(checks: Checks, bank: BankView) -> Iterator[Finding]:
    for check in checks.bank:
        yield from check(bank)


def _partition_findings(checks: Checks, number: int, bank: BankView) -> Iterator[Finding]:
    assert bank.spec is not None
    view = PartitionView(bank, bank.spec, number)
    for check in checks.partition:
        yield from check(view)


def _look_twice(bank: BankView, look: Callable[[BankView], Iterator[Finding]]) -> FindingLog:
    first = FindingLog()
    first.extend(look(bank))
    suspects = {f.key for f in first.listed if f.severity is not Severity.NOTE}
    if not suspects:
        return first
    second = FindingLog()
    second.extend(look(bank.again(suspects if first.is_complete else None)))
    return first.confirmed_by(second)


def _partition_sizes(keys: list[str]) -> Counter[int]:
    matches = (PARTITION_KEY.match(key) for key in keys)
    return Counter(int(match[1]) for match in matches if match is not None)


def _report(bank: BankView, log: FindingLog) -> FsckReport:
    severities = list(Severity)
    return FsckReport(
        url=bank.objects.url,
        deep=bank.deep,
        revision=bank.chain.latest_commit,
        checked=Checked(num_revisions=len(bank.chain.links), **asdict(bank.tally)),
        findings=tuple(sorted(log.listed, key=lambda f: severities.index(f.severity))),
        counts=dict(log.counts),
    )


class _Progress:
    """Counts objects, part by part; a part ends where its end was expected."""

    def __init__(self, total: int, report: Callable[[int, int], None]) -> None:
        self.total = total
        self._report = report
        self._done = 0
        self._end = 0

    def begin(self, count: int) -> None:
        """Begin a part of `count` objects; the one before is done."""
        self._done = self._end
        self._end += count
        self._report(self._done, self.total)

    def advance(self, count: int) -> None:
        """Note that objects of the part were looked at."""
        # A service may have added some since they were counted.
        self._done = min(self._done + count, self._end)
        self._report(self._done, self.total)
