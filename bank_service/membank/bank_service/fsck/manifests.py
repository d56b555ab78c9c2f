"""The manifests of one partition, and the slots that they name."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cached_property, partial

from membank.bank_service.fsck.chain import Chain
from membank.bank_service.fsck.reading import Fault, FaultKind, examine, finding_of
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import MembankError
from membank.wire.format import NO_SLOT, Entry, Manifest, decode_manifest
from membank.wire.format.layout import manifest_key, manifest_prefix, numbers_in
from membank.wire.spec import BankSpec, BlockRef, BlockState

SlotName = tuple[int, int]
"""Level and slot."""


class Verdict(Enum):
    """Whether a manifest is part of the bank."""

    COUNTS = auto()
    UNDECIDED = auto()
    """Prepared; nobody has decided its revision."""
    GIVEN_UP = auto()
    """Prepared; its revision was aborted, or does without it."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What is kept of a manifest while its partition is checked."""

    number: int
    """Its number."""
    revision: int
    """Revision that it belongs to."""
    epoch: int
    """Owner that wrote it."""
    history_from: int
    """Oldest revision that it promises to keep."""
    verdict: Verdict
    """Whether it is part of the bank."""

    @property
    def order(self) -> tuple[int, int]:
        """By it the newest manifest is found."""
        return (self.revision, self.number)


@dataclass(slots=True)
class SlotUse:
    """What manifests say of one slot."""

    ref: BlockRef
    """The block whose content it holds."""
    crcs: tuple[int, ...]
    """CRC-32C of each role."""
    named_by: tuple[int, ...]
    """Numbers of the manifests, ascending."""


@dataclass
class ManifestIndex:
    """The manifests of one partition; content of entries is kept of the newest one only."""

    partition: int
    """The partition."""
    summaries: dict[int, Summary] = field(default_factory=dict)
    """Every manifest that is as it was written, by number."""
    unreadable: list[int] = field(default_factory=list)
    """Numbers of the others."""
    current: Manifest | None = None
    """The manifest in force; None = nothing was ever changed, or none can be read."""
    slots: dict[SlotName, SlotUse] = field(default_factory=dict)
    """Every slot that a manifest names which was not given up."""
    given_up: set[SlotName] = field(default_factory=set)
    """Slots that manifests name which were given up; others may name them too."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with the manifests in themselves."""

    @property
    def is_certain(self) -> bool:
        """False where a manifest that cannot be read may be the one in force."""
        newest = 0 if self.current is None else self.current.number
        return all(number < newest for number in self.unreadable)

    @property
    def owner(self) -> str:
        """Owner that wrote the manifest in force; empty where there is none."""
        return "" if self.current is None else self.current.owner

    @property
    def lsn(self) -> int:
        """Update that the manifest in force ends with; 0 where there is none."""
        return 0 if self.current is None else self.current.lsn

    @cached_property
    def counting(self) -> list[Summary]:
        """The manifests that count, in the order in which they were in force."""
        found = [s for s in self.summaries.values() if s.verdict is Verdict.COUNTS]
        return sorted(found, key=lambda summary: summary.order)

    def newest_until(self, revision: int) -> Summary | None:
        """Return the end of `revision`: the newest manifest of it, or of one before."""
        counting = self.counting
        place = bisect_right(counting, revision, key=lambda summary: summary.revision)
        return counting[place - 1] if place else None

    @cached_property
    def deleted(self) -> frozenset[BlockRef]:
        """The blocks that the manifest in force says are deleted."""
        entries = {} if self.current is None else self.current.entries
        return frozenset(r for r, e in entries.items() if e.state is BlockState.DELETED)

    def is_doomed(self, use: SlotUse) -> bool:
        """Say whether a slot is only left of a block that was deleted: it may go at any moment."""
        return use.ref in self.deleted and all(self.is_before_current(n) for n in use.named_by)

    def is_before_current(self, number: int) -> bool:
        """Say whether a manifest is older than the one in force."""
        summary, current = self.summaries[number], self.current
        return current is not None and summary.order < (current.revision, current.number)


def survey_manifests(
    objects: ObjectStore, spec: BankSpec, chain: Chain, partition: int
) -> ManifestIndex:
    """Read the manifests of one partition, one at a time."""
    index = ManifestIndex(partition)
    for number in _stored_numbers(objects, partition):
        key = manifest_key(partition, number)
        found = examine(objects, key, partial(_decode, len(spec.roles), key))
        if isinstance(found, Fault) and found.kind is FaultKind.MISSING:
            continue  # retired since it was listed; whoever needs it misses it by its name
        if isinstance(found, Fault):
            index.unreadable.append(number)
            index.findings.append(_damaged(found, key))
        elif (found.partition, found.number) != (partition, number):
            index.unreadable.append(number)
            index.findings.append(_misplaced(found, key))
        else:
            _take(index, spec, chain, found)
    _check_epochs(index)
    return index


def _decode(num_roles: int, key: str, data: bytes) -> Manifest:
    manifest = decode_manifest(data, num_roles=num_roles, key=key)
    names = ("partition", "number", "revision", "epoch", "lsn", "history_from")
    # The checksum of another writer's nonsense holds too.
    if not all(isinstance(getattr(manifest, name), int) for name in names):
        raise ValueError(f"its head does not have numbers for {', '.join(names)}")
    return manifest


def _stored_numbers(objects: ObjectStore, partition: int) -> list[int]:
    return numbers_in(objects.list(manifest_prefix(partition)), partial(manifest_key, partition))


def _take(index: ManifestIndex, spec: BankSpec, chain: Chain, manifest: Manifest) -> None:
    verdict = _verdict(chain, manifest)
    summary = Summary(
        number=manifest.number,
        revision=manifest.revision,
        epoch=manifest.epoch,
        history_from=manifest.history_from,
        verdict=verdict,
    )
    index.summaries[manifest.number] = summary
    key = manifest_key(index.partition, manifest.number)
    if problem := next(_inconsistencies(spec, manifest), ""):
        index.findings.append(_inconsistent(key, problem))
    if verdict is Verdict.GIVEN_UP:
        index.findings.append(_given_up(key, manifest))
        index.given_up |= {(r.level, e.slot) for r, e in _with_slots(manifest)}
        return
    if verdict is Verdict.UNDECIDED:
        index.findings.append(_undecided(key, manifest))
    elif index.current is None or summary.order > (index.current.revision, index.current.number):
        index.current = manifest
    for ref, entry in _with_slots(manifest):
        _note_use(index, key, manifest.number, ref, entry)


def _verdict(chain: Chain, manifest: Manifest) -> Verdict:
    if not manifest.prepared:
        return Verdict.COUNTS
    link = chain.links.get(manifest.revision)
    if link is None:
        # A record that cannot be read is reported itself; most records are commits.
        is_lost = manifest.revision <= chain.latest
        return Verdict.COUNTS if is_lost else Verdict.UNDECIDED
    is_named = link.committed and link.manifests.get(manifest.partition) == manifest.number
    return Verdict.COUNTS if is_named else Verdict.GIVEN_UP


def _with_slots(manifest: Manifest) -> Iterator[tuple[BlockRef, Entry]]:
    return ((ref, e) for ref, e in manifest.entries.items() if e.slot != NO_SLOT)


def _note_use(index: ManifestIndex, key: str, number: int, ref: BlockRef, entry: Entry) -> None:
    name = (ref.level, entry.slot)
    use = index.slots.get(name)
    if use is None:
        index.slots[name] = SlotUse(ref, entry.crcs, (number,))
    elif (use.ref, use.crcs) == (ref, entry.crcs):
        use.named_by = (*use.named_by, number)
    elif use.named_by[-1] != number:  # within one manifest it is an inconsistency
        index.findings.append(
            Finding(
                kind=FindingKind.SLOT_CONFLICT,
                key=key,
                problem=f"it says that slot {entry.slot} of level {ref.level} holds block {ref}, "
                f"manifest {use.named_by[0]} that it holds other content, of block {use.ref}",
                affects=f"blocks {ref} and {use.ref}: at most one of them is there",
                remedy="compare both manifests with a copy and restore the one that differs",
            )
        )


def _inconsistencies(spec: BankSpec, manifest: Manifest) -> Iterator[str]:
    seen: dict[SlotName, BlockRef] = {}
    for ref, entry in manifest.entries.items():
        try:
            spec.check_ref(ref)
        except MembankError:
            yield f"it names block {ref}, which the bank does not have"
            continue
        if spec.partition_of(ref) != manifest.partition:
            yield f"it names block {ref}, which belongs to partition {spec.partition_of(ref)}"
        if entry.slot == NO_SLOT:
            continue
        if entry.state is BlockState.DELETED:
            yield f"it names slot {entry.slot} for block {ref}, which it says is deleted"
        other = seen.setdefault((ref.level, entry.slot), ref)
        if other != ref:
            yield f"it names slot {entry.slot} of level {ref.level} for blocks {other} and {ref}"


def _check_epochs(index: ManifestIndex) -> None:
    before: Summary | None = None
    for number in sorted(index.summaries):
        summary = index.summaries[number]
        if before is not None and summary.epoch < before.epoch:
            index.findings.append(_disorder(index.partition, before, summary))
        before = summary


def _damaged(fault: Fault, key: str) -> Finding:
    return finding_of(
        fault,
        key,
        missing=FindingKind.MANIFEST_MISSING,
        damaged=FindingKind.MANIFEST_DAMAGED,
        affects="every block of the partition: its shard does not start",
    )


def _misplaced(manifest: Manifest, key: str) -> Finding:
    return Finding(
        kind=FindingKind.MANIFEST_MISPLACED,
        key=key,
        problem=f"it holds manifest {manifest.number} of partition {manifest.partition}",
        affects="every block of the partition: its shard does not start",
        remedy="restore the file from a copy",
    )


def _inconsistent(key: str, problem: str) -> Finding:
    return Finding(
        kind=FindingKind.MANIFEST_INCONSISTENT,
        key=key,
        problem=problem,
        affects="the blocks that it names",
        remedy="restore the file from a copy; its CRC holds, so please report a defect of the writer",
    )


def _disorder(partition: int, before: Summary, after: Summary) -> Finding:
    return Finding(
        kind=FindingKind.MANIFEST_DISORDER,
        key=manifest_key(partition, after.number),
        problem=f"it is of epoch {after.epoch}, manifest {before.number} before it of epoch "
        f"{before.epoch}: an owner that was replaced went on writing",
        affects=f"updates that the owner of epoch {before.epoch} acknowledged",
        remedy="stop every service of the bank; report it with both manifests",
    )


def _undecided(key: str, manifest: Manifest) -> Finding:
    return Finding(
        kind=FindingKind.MANIFEST_UNDECIDED,
        key=key,
        problem=f"it was prepared for revision {manifest.revision}, which nobody has decided",
        remedy="nothing; a running service decides it",
    )


def _given_up(key: str, manifest: Manifest) -> Finding:
    return Finding(
        kind=FindingKind.MANIFEST_GIVEN_UP,
        key=key,
        problem=f"it was prepared for revision {manifest.revision}, which does without it",
        remedy="nothing; the next start of its shard, or `membank gc`, removes it",
    )


def names(refs: Sequence[BlockRef], limit: int = 4) -> str:
    """Return blocks as text, the first few by name."""
    shown = ", ".join(str(ref) for ref in refs[:limit])
    more = f" and {len(refs) - limit} more" if len(refs) > limit else ""
    return f"block{'s' if len(refs) > 1 else ''} {shown}{more}"
