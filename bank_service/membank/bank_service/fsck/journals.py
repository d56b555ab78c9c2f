"""Journals: whether they go on where the manifest in force ends, and what they should not hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from membank.bank_service.fsck.manifests import ManifestIndex, names
from membank.bank_service.fsck.removal import REMOVAL_REMEDY
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.fsck.segments import JournalledUpdate, JournalScan
from membank.wire.format.layout import log_prefix, manifest_prefix


def check_continuity(
    index: ManifestIndex, journals: Sequence[JournalScan], place: str, *, is_elsewhere: bool
) -> Iterator[Finding]:
    """Check that a journal continues the manifest in force.

    Parameters
    ----------
    index
        The manifests of the partition.
    journals
        Its journals; one place is in use, others may be left from former settings.
    place
        Where a local journal should be; empty = nobody said.
    is_elsewhere
        True where that is outside of the bank, so that another machine may have had it meanwhile.
    """
    for journal in journals:
        yield from journal.findings
    if not index.is_certain or not all(journal.is_sound for journal in journals):
        return
    continuing = [journal for journal in journals if _continues(journal, index)]
    newer = [journal for journal in journals if _is_newer(journal, index)]
    for journal in journals:
        if journal.ownership is None or journal in (*continuing, *newer):
            continue
        if is_elsewhere or continuing:
            yield _outdated(journal, index)
    if newer and not continuing:
        yield _onto_nothing(newer[0], index)
    elif continuing:
        _, covered = updates_since(index, journals)
        if beyond := [journal for journal in continuing if journal.base > covered]:
            yield _gap(beyond[0], index)
    elif index.current is not None and index.current.durability == "store":
        yield _missing(log_prefix(index.partition), index)
    elif index.owner and not place:
        yield _elsewhere()
    elif index.owner and not is_elsewhere:
        yield _missing(place, index)
    elif index.owner and not any(journal.segments for journal in journals):
        yield _nothing_there(place)


def updates_since(
    index: ManifestIndex, journals: Sequence[JournalScan]
) -> tuple[list[tuple[JournalScan, JournalledUpdate]], int]:
    """Return the updates after the manifest in force, and the LSN up to which they are there.

    Notes
    -----
    There may be two journals: a local one that is shipped to the bank's storage, or one that was
    begun where the settings changed. The one that reaches furthest goes on where another ends.
    """
    found: list[tuple[JournalScan, JournalledUpdate]] = []
    covered = index.lsn
    usable = [j for j in journals if j.is_sound and _continues(j, index)]
    while joining := [j for j in usable if j.base <= covered < j.last]:
        journal = max(joining, key=lambda joined: joined.last)
        found += [(journal, update) for update in journal.after(covered)]
        covered = journal.last
    return found, covered


def _continues(journal: JournalScan, index: ManifestIndex) -> bool:
    found, current = journal.ownership, index.current
    if found is None:
        return False
    if current is None:
        return found.is_current(0, "", "")
    return found.is_current(current.epoch, current.owner, current.nonce)


def _is_newer(journal: JournalScan, index: ManifestIndex) -> bool:
    """Say whether a journal belongs to a manifest that is newer than any that is stored."""
    found = journal.ownership
    epoch = 0 if index.current is None else index.current.epoch
    return found is not None and found.epoch > epoch and not _continues(journal, index)


def check_deleted(index: ManifestIndex, journal: JournalScan) -> Iterator[Finding]:
    """Report segments that hold gradients of blocks that are deleted."""
    held: dict[str, list[JournalledUpdate]] = {}
    for update in journal.updates:
        if update.ref in index.deleted:
            held.setdefault(update.frame.key, []).append(update)
    for key, updates in held.items():
        refs = sorted({update.ref for update in updates})
        yield Finding(
            kind=FindingKind.REMOVAL_UNFINISHED,
            key=journal.name(key),
            offset=updates[0].frame.offset,
            problem=f"it holds updates of {names(refs)}, deleted since",
            affects="the deletion: it is in force, but not complete on storage",
            remedy=REMOVAL_REMEDY,
        )


def _onto_nothing(journal: JournalScan, index: ManifestIndex) -> Finding:
    return Finding(
        kind=FindingKind.MANIFEST_MISSING,
        key=manifest_prefix(index.partition),
        problem=f"the journal {journal.segments[-1].name} was begun onto a manifest that is missing",
        affects=f"partition {index.partition}: its shard does not start",
        remedy="restore the newest manifests from a copy",
    )


def _gap(journal: JournalScan, index: ManifestIndex) -> Finding:
    return Finding(
        kind=FindingKind.JOURNAL_GAP,
        key=journal.segments[0].name,
        problem=f"the journal begins after update {journal.base}, and the newest manifest ends "
        f"with update {index.lsn}",
        affects=f"updates {index.lsn + 1} to {journal.base} of partition {index.partition}: its "
        "shard does not start",
        remedy="restore the newest manifest, or the older segments, from a copy",
    )


def _missing(place: str, index: ManifestIndex) -> Finding:
    return Finding(
        kind=FindingKind.JOURNAL_MISSING,
        key=place,
        problem="the owner of the newest manifest began a journal, and it is missing, or its last "
        "segment is",
        affects=f"updates of partition {index.partition} after update {index.lsn}, if there were "
        "any; its shard does not start",
        remedy="restore it from a copy; or say where it is kept (--journal-dir)",
    )


def _outdated(journal: JournalScan, index: ManifestIndex) -> Finding:
    last = max(segment.last for segment in journal.segments)
    lost = f"; its updates {index.lsn + 1} to {last} are no part of the bank"
    return Finding(
        kind=FindingKind.JOURNAL_OUTDATED,
        key=journal.segments[-1].name,
        problem=f"another owner went on without this journal{lost if last > index.lsn else ''}",
        remedy="nothing; a shard that opens the partition there leaves it out",
    )


def _nothing_there(place: str) -> Finding:
    return Finding(
        kind=FindingKind.JOURNAL_NOT_CHECKED,
        key=place,
        problem="no journal is there, so updates that are not in slots yet were not checked",
        remedy="nothing, if the owner before was on another machine; else check --journal-dir",
    )


def _elsewhere() -> Finding:
    return Finding(
        kind=FindingKind.JOURNAL_NOT_CHECKED,
        key="partitions",
        problem="the journals are not in the bank, so updates that are not in slots yet were not "
        "checked",
        remedy="say where they are (--journal-dir), on the machine that holds them",
    )
