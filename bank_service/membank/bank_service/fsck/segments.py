"""Segments of journals: every frame of them, and whether they continue each other."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from membank.bank_service.fsck.reading import Fault, FaultKind, examine, first_clause, unreadable
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.shard.update_frame import AppliedBlock, UpdateFrame, decode_update
from membank.bank_service.store.journal.contract import CONTENT_KINDS, Frame, Ownership
from membank.bank_service.store.journal.frames import (
    HEADER_BYTES,
    SegmentScan,
    check_chain,
    corrupt,
    read_frames,
    scan,
)
from membank.bank_service.store.journal.object_chain import check_object_chain, require_object
from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import CorruptionError, FailedPreconditionError, MembankError, Reason
from membank.wire.format import Entry
from membank.wire.format.layout import log_key, numbers_in
from membank.wire.spec import Array, BankSpec, BlockRef

_LOCAL_NAME = re.compile(r"(\d{20,})-(\d{10,})\.log")
_LATER = "updates from there on: the shard of the partition does not start"
_RESTORE = "restore the file from a copy, or give the updates in it up (docs/fsck.md)"


@dataclass(frozen=True, slots=True)
class JournalledFrame:
    """One push to the partition, without its arrays."""

    lsn: int
    """Its number."""
    key: str
    """The segment that holds it."""
    segment: int
    """Place of the segment among those of its journal."""
    offset: int
    """Where the frame begins in it."""
    request_id: str
    """Id of the push."""
    scale: float
    """Multiplier of the learning rates."""
    kernel: str
    """Fingerprint of the kernels that were used."""


@dataclass(frozen=True, slots=True)
class JournalledUpdate:
    """What a push did to one block, and where its arrays are."""

    frame: JournalledFrame
    """The push."""
    ref: BlockRef
    """The block."""
    after: Entry
    """Its entry after it."""
    dtype: str
    """Element type of the gradient; empty where the arrays are those of an image."""
    start: int
    """Where the arrays begin in the segment."""
    num_bytes: int
    """Their length."""


@dataclass(slots=True)
class JournalScan:
    """What one place holds of the journal of a partition."""

    objects: ObjectStore
    """What serves the segments."""
    place: str = ""
    """What their keys are below, for people; empty = keys of the bank."""
    scan: Callable[[str, bytes], SegmentScan] = scan
    """Checks the bytes of one."""
    segments: list[SegmentScan] = field(default_factory=list)
    """Those that are in order, oldest first."""
    updates: list[JournalledUpdate] = field(default_factory=list)
    """What they hold, in the order in which it happened."""
    num_frames: int = 0
    """Frames of updates in them."""
    base: int = 0
    """LSN after which the log begins."""
    is_sound: bool = True
    """False where frames are damaged or missing."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with the segments in themselves."""

    @property
    def last(self) -> int:
        """LSN of the last frame."""
        return self.segments[-1].last if self.segments else 0

    @property
    def ownership(self) -> Ownership | None:
        """Who wrote the newest segment; None = there is none."""
        heads = [s.head for s in self.segments if s.head is not None]
        return heads[-1].ownership if heads else None

    def after(self, lsn: int) -> list[JournalledUpdate]:
        """Return the updates after `lsn`, without those that an owner gave up."""
        heads = [segment.head for segment in self.segments]
        anew = [i for i, head in enumerate(heads) if head and head.follows != head.base]
        first = anew[-1] if anew else 0
        return [u for u in self.updates if u.frame.lsn > lsn and u.frame.segment >= first]

    def name(self, key: str) -> str:
        """Return what findings call a segment."""
        return f"{self.place}/{key}" if self.place else key


ChainCheck = Callable[[Sequence[SegmentScan]], int]
"""Raises where segments do not continue each other; returns the LSN after which the log begins."""


def local_order(keys: Iterable[str]) -> list[str]:
    """Return the segments among the files of a local journal, oldest first."""
    matches = ((_LOCAL_NAME.fullmatch(key.rsplit("/", 1)[-1]), key) for key in keys)
    ranked = ((int(match[2]), int(match[1]), key) for match, key in matches if match is not None)
    return [key for _, _, key in sorted(ranked)]


def is_local_segment(key: str) -> bool:
    """Say whether a file of a local journal has the name of a segment."""
    return bool(local_order([key]))


def check_local_chain(identity: str, scans: Sequence[SegmentScan]) -> int:
    """Check that the segments of a local journal continue each other, under their own names."""
    for segment in scans:
        head = segment.head
        if head is None:
            continue
        name = f"{head.base:020d}-{head.ownership.epoch:010d}.log"
        if segment.name.rsplit("/", 1)[-1] != name:
            raise corrupt(segment.name, 0, f"it holds the segment {name}")
    return _base(scans[check_chain(scans, identity) :])


def stored_order(keys: Iterable[str], number: int) -> list[str]:
    """Return the objects of the journal of partition `number` that is kept with the bank."""
    key_of = partial(log_key, number)
    return list(map(key_of, numbers_in(keys, key_of)))


def check_stored_chain(identity: str, scans: Sequence[SegmentScan]) -> int:
    """Check that the objects of a journal with the bank continue each other."""
    return _base(scans[check_object_chain(scans, identity) :])


def _base(scans: Sequence[SegmentScan]) -> int:
    heads = [segment.head for segment in scans if segment.head is not None]
    return heads[0].base if heads else 0


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
        found.base = check(found.segments)
    except MembankError as err:
        found.is_sound = False
        found.findings.append(_chain_finding(err, found))
    else:
        if found.segments and (torn := found.segments[-1].torn) is not None:
            found.findings.append(_torn(torn.file, torn.offset, torn.num_bytes))
    return found


def scan_object(name: str, data: bytes) -> SegmentScan:
    """Check a segment that is an object, and therefore there whole or not at all."""
    found = scan(name, data)
    require_object(found)
    return found


def _survey_segment(found: JournalScan, key: str, spec: BankSpec) -> None:
    name = found.name(key)
    fault = examine(found.objects, key, partial(_take, found, key, spec))
    if not isinstance(fault, Fault) or fault.kind is FaultKind.MISSING:
        return  # trimmed since it was listed, if it is missing
    found.is_sound = False
    if fault.kind is FaultKind.UNREADABLE:
        found.findings.append(unreadable(name, fault.problem, _LATER))
    elif isinstance(fault.cause, FailedPreconditionError):
        found.findings.append(_not_checked(name, fault.problem))
    else:
        found.findings.append(_damaged(name, fault))


def _take(found: JournalScan, key: str, spec: BankSpec, data: bytes) -> None:
    """Take note of a segment and of what it holds."""
    name, offset = found.name(key), 0
    found.segments.append(found.scan(name, data))
    segment = len(found.segments) - 1
    for frame in read_frames(name, data):
        end = offset + HEADER_BYTES + len(frame.payload)
        if frame.kind in CONTENT_KINDS:
            found.num_frames += 1
            try:
                found.updates += _updates(frame, decode_update(frame, spec), key, segment, offset)
            except Exception as err:
                raise corrupt(name, offset, f"an update does not decode ({err!r})") from err
        offset = end


def _updates(
    frame: Frame, decoded: UpdateFrame, key: str, segment: int, offset: int
) -> list[JournalledUpdate]:
    push = JournalledFrame(
        lsn=frame.lsn,
        key=key,
        segment=segment,
        offset=offset,
        request_id=decoded.request_id,
        scale=float(decoded.learning_rate_scale),
        kernel=decoded.kernel,
    )
    sizes = [sum(array.nbytes for array in _arrays(block)) for block in decoded.blocks]
    # The arrays follow each other, in the order of the blocks, up to the end of the frame.
    start = offset + HEADER_BYTES + len(frame.payload) - sum(sizes)
    found = []
    for block, size in zip(decoded.blocks, sizes, strict=True):
        dtype = "" if block.gradient is None else block.gradient.dtype.name
        found.append(JournalledUpdate(push, block.ref, block.after, dtype, start, size))
        start += size
    return found


def _arrays(block: AppliedBlock) -> list[Array]:
    return [block.gradient] if block.gradient is not None else list((block.arrays or {}).values())


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


def _chain_finding(err: MembankError, found: JournalScan) -> Finding:
    name = err.metadata.get("file", found.segments[-1].name if found.segments else found.place)
    problem, offset = first_clause(err), int(err.metadata.get("offset", 0))
    problem = problem.removeprefix(f"journal {name}, offset {offset}: ")
    name = name.removeprefix(f"{found.objects.url}/") if not found.place else name
    if isinstance(err, FailedPreconditionError) and err.reason is not Reason.FORMAT_TOO_NEW:
        return Finding(
            kind=FindingKind.JOURNAL_FOREIGN,
            key=name,
            problem=problem,
            affects="the shard of the partition: it does not start",
            remedy="put the journal of this bank in its place",
        )
    return Finding(
        kind=FindingKind.JOURNAL_GAP,
        key=name,
        offset=offset,
        problem=problem,
        affects=_LATER,
        remedy=_RESTORE,
    )


def _torn(name: str, offset: int, num_bytes: int) -> Finding:
    return Finding(
        kind=FindingKind.JOURNAL_TORN,
        key=name,
        offset=offset,
        problem=f"{num_bytes} bytes of a write that was not finished; nobody was told that it was",
        remedy="nothing; the next start cuts them off",
    )


def _not_checked(name: str, problem: str) -> Finding:
    return Finding(
        kind=FindingKind.JOURNAL_NOT_CHECKED, key=name, problem=problem, remedy="update membank"
    )
