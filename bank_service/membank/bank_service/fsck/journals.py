"""Journals: every frame of every segment, and whether they continue the manifest in force."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from membank.bank_service.fsck.manifests import ManifestIndex, names
from membank.bank_service.fsck.reading import Fault, FaultKind, examine, first_clause, unreadable
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.shard.update_frame import decode_update
from membank.bank_service.store.journal.contract import CONTENT_KINDS, Frame, Ownership
from membank.bank_service.store.journal.frames import (
    HEADER_BYTES,
    SegmentScan,
    check_chain,
    corrupt,
    read_frames,
    scan,
)
from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import CorruptionError, FailedPreconditionError, MembankError, Reason
from membank.wire.spec import BankSpec, BlockRef

_LOCAL_NAME = re.compile(r"(\d{20,})-(\d{10,})\.log")
_RESTORE = "restore the file from a copy, or give the updates in it up (docs/fsck.md)"


@dataclass(frozen=True, slots=True)
class JournalledUpdate:
    """Where a journal says what became of one block."""

    ref: BlockRef
    """The block."""
    key: str
    """The segment that holds it."""
    offset: int
    """Where its frame begins."""
    num_bytes: int
    """Length of the frame."""
    lsn: int
    """Number of the frame."""


@dataclass(slots=True)
class JournalScan:
    """What one place holds of the journal of a partition."""

    objects: ObjectStore
    """What serves the segments."""
    place: str
    """What their keys are below, for people; empty = keys of the bank."""
    segments: list[SegmentScan] = field(default_factory=list)
    """Those that are in order, oldest first."""
    updates: list[JournalledUpdate] = field(default_factory=list)
    """What they hold, in the order in which it happened."""
    num_frames: int = 0
    """Frames of updates in them."""
    is_sound: bool = True
    """False where frames are damaged or missing."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with the segments in themselves."""

    @property
    def base(self) -> int:
        """LSN after which the log begins."""
        starts = [s.head for s in self.segments if s.head is not None]
        # Segments before one that starts anew were given up.
        anew = [index for index, head in enumerate(starts) if head.follows != head.base]
        return starts[anew[-1] if anew else 0].base if starts else 0

    @property
    def ownership(self) -> Ownership | None:
        """Who wrote the newest segment; None = there is none."""
        heads = [s.head for s in self.segments if s.head is not None]
        return heads[-1].ownership if heads else None

    def name(self, key: str) -> str:
        """Return what findings call a segment."""
        return f"{self.place}/{key}" if self.place else key


ChainCheck = Callable[[Sequence[SegmentScan]], object]
"""Raises where segments do not continue each other."""


def local_order(keys: Iterable[str]) -> list[str]:
    """Return the segments among the files of a local journal, oldest first."""
    matches = ((_LOCAL_NAME.fullmatch(key.rsplit("/", 1)[-1]), key) for key in keys)
    ranked = ((int(match[2]), int(match[1]), key) for match, key in matches if match is not None)
    return [key for _, _, key in sorted(ranked)]


def is_local_segment(key: str) -> bool:
    """Say whether a file of a local journal has the name of a segment."""
    return bool(local_order([key]))


def check_local_chain(identity: str, scans: Sequence[SegmentScan]) -> None:
    """Raise unless the segments of a local journal continue each other, under their own names."""
    for segment in scans:
        head = segment.head
        if head is None:
            continue
        name = f"{head.base:020d}-{head.ownership.epoch:010d}.log"
        if segment.name.rsplit("/", 1)[-1] != name:
            raise corrupt(segment.name, 0, f"it holds the segment {name}")
    check_chain(scans, identity)


def survey_journal(
    found: JournalScan, keys: Sequence[str], spec: BankSpec, check: ChainCheck
) -> JournalScan:
    """Read segments, one at a time, into `found`, and return it.

    Parameters
    ----------
    found
        Where they are.
    keys
        The segments, oldest first.
    spec
        Spec of the bank.
    check
        Raises where they do not continue each other.
    """
    for key in keys:
        _survey_segment(found, key, spec)
    if not found.is_sound:
        return found
    try:
        check(found.segments)
    except MembankError as err:
        found.is_sound = False
        found.findings.append(_chain_finding(err, found.name(keys[-1] if keys else "")))
    else:
        if found.segments and (torn := found.segments[-1].torn) is not None:
            found.findings.append(_torn(torn.file, torn.offset, torn.num_bytes))
    return found


def _survey_segment(found: JournalScan, key: str, spec: BankSpec) -> None:
    name = found.name(key)
    segment = examine(found.objects, key, partial(scan, name))
    if isinstance(segment, SegmentScan):
        found.segments.append(segment)
        # Read a second time, so that no more than one segment is in memory at any time.
        fault = examine(found.objects, key, partial(_note_updates, found, key, spec))
    else:
        fault = segment
    if not isinstance(fault, Fault) or fault.kind is FaultKind.MISSING:
        return  # trimmed since it was listed, if it is missing
    found.is_sound = False
    if fault.kind is FaultKind.UNREADABLE:
        found.findings.append(unreadable(name, fault.problem, _LATER))
    elif isinstance(fault.cause, FailedPreconditionError):
        found.findings.append(_not_checked(name, fault.problem))
    else:
        found.findings.append(_damaged(name, fault))


def _note_updates(found: JournalScan, key: str, spec: BankSpec, data: bytes) -> None:
    offset = 0
    for frame in read_frames(found.name(key), data):
        num_bytes = HEADER_BYTES + len(frame.payload)
        if frame.kind in CONTENT_KINDS:
            found.num_frames += 1
            for ref in _refs(found.name(key), offset, frame, spec):
                update = JournalledUpdate(ref, key, offset, num_bytes, frame.lsn)
                found.updates.append(update)
        offset += num_bytes


def _refs(name: str, offset: int, frame: Frame, spec: BankSpec) -> list[BlockRef]:
    try:
        return [block.ref for block in decode_update(frame, spec).blocks]
    except Exception as err:
        raise corrupt(name, offset, f"an update does not decode ({err!r})") from err


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
        Where the journal should be; empty = nobody said.
    is_elsewhere
        True where that is outside of the bank, so that another machine may have had it meanwhile.
    """
    for journal in journals:
        yield from journal.findings
    if not index.is_certain or not all(journal.is_sound for journal in journals):
        return
    continuing = [journal for journal in journals if _continues(journal, index)]
    for journal in journals:
        if journal.segments and journal not in continuing and (is_elsewhere or continuing):
            yield _outdated(journal, index)
    if continuing:
        if current_journal(index, journals) is None:
            yield _gap(continuing[0], index)
    elif index.owner and not place:
        yield _elsewhere()
    elif index.owner and not is_elsewhere:
        yield _missing(place, index)


def current_journal(index: ManifestIndex, journals: Sequence[JournalScan]) -> JournalScan | None:
    """Return the journal that goes on where the manifest in force ends; None = none does."""
    for journal in journals:
        if journal.is_sound and _continues(journal, index) and journal.base <= index.lsn:
            return journal
    return None


def _continues(journal: JournalScan, index: ManifestIndex) -> bool:
    found, current = journal.ownership, index.current
    if found is None:
        return False
    if current is None:
        return found.is_current(0, "", "")
    return found.is_current(current.epoch, current.owner, current.nonce)


def check_deleted(index: ManifestIndex, journal: JournalScan) -> Iterator[Finding]:
    """Report segments that hold gradients of blocks that are deleted."""
    for key in dict.fromkeys(update.key for update in journal.updates):
        held = [u for u in journal.updates if u.key == key and u.ref in index.deleted]
        if held:
            yield Finding(
                kind=FindingKind.REMOVAL_UNFINISHED,
                key=journal.name(key),
                offset=held[0].offset,
                problem=f"it holds updates of {names(sorted({u.ref for u in held}))}, deleted since",
                affects="the deletion: it is in force, but not complete on storage",
                remedy="start the service: a shard goes on with the removal before it serves",
            )


_LATER = "updates from there on: the shard of the partition does not start"


def _damaged(name: str, fault: Fault) -> Finding:
    problem, offset = fault.problem, 0
    if isinstance(fault.cause, CorruptionError) and "offset" in fault.cause.metadata:
        offset = int(fault.cause.metadata["offset"])
        problem = problem.removeprefix(f"journal {name}, offset {offset}: ")
    return Finding(
        kind=FindingKind.JOURNAL_DAMAGED,
        key=name,
        offset=offset,
        problem=problem,
        affects=_LATER,
        remedy=_RESTORE,
    )


def _chain_finding(err: MembankError, name: str) -> Finding:
    name = err.metadata.get("file", name)
    offset = int(err.metadata.get("offset", 0))
    if isinstance(err, FailedPreconditionError) and err.reason is not Reason.FORMAT_TOO_NEW:
        return Finding(
            kind=FindingKind.JOURNAL_FOREIGN,
            key=name,
            problem=first_clause(err),
            affects="the shard of the partition: it does not start",
            remedy="put the journal of this bank in its place",
        )
    return Finding(
        kind=FindingKind.JOURNAL_GAP,
        key=name,
        offset=offset,
        problem=first_clause(err).removeprefix(f"journal {name}, offset {offset}: "),
        affects=_LATER,
        remedy=_RESTORE,
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


def _torn(name: str, offset: int, num_bytes: int) -> Finding:
    return Finding(
        kind=FindingKind.JOURNAL_TORN,
        key=name,
        offset=offset,
        problem=f"{num_bytes} bytes of a write that was not finished; nobody was told that it was",
        remedy="nothing; the next start cuts them off",
    )


def _elsewhere() -> Finding:
    return Finding(
        kind=FindingKind.JOURNAL_NOT_CHECKED,
        key="partitions",
        problem="the journals are not in the bank, so updates that are not in slots yet were not "
        "checked",
        remedy="say where they are (--journal-dir), on the machine that holds them",
    )


def _not_checked(name: str, problem: str) -> Finding:
    return Finding(
        kind=FindingKind.JOURNAL_NOT_CHECKED, key=name, problem=problem, remedy="update membank"
    )
