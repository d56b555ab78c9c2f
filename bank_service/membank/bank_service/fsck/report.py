"""What a check of a bank found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

MAX_LISTED = 50
"""Findings of one kind that are listed; the others are counted."""


class Severity(StrEnum):
    """How bad a finding is."""

    DAMAGE = "damage"
    """Something that was written is missing, or is not what was written."""
    REPAIRABLE = "repairable"
    """Nothing is lost, but something is not as it should be; one step mends it."""
    NOTE = "note"
    """Nothing is wrong: what a killed writer, or one at work, leaves."""


class FindingKind(StrEnum):
    """What was found; `docs/fsck.md` says what each means."""

    SPEC_MISSING = "spec-missing"
    SPEC_DAMAGED = "spec-damaged"
    RECORD_MISSING = "record-missing"
    RECORD_DAMAGED = "record-damaged"
    CHAIN_BROKEN = "chain-broken"
    LOG_CUT_OFF = "log-cut-off"
    HEAD_MISMATCH = "head-mismatch"
    RECEIPT_MISSING = "receipt-missing"
    RECEIPT_DAMAGED = "receipt-damaged"
    RECEIPT_MISMATCH = "receipt-mismatch"
    RECEIPT_UNTRUSTED = "receipt-untrusted"
    RECEIPT_PENDING = "receipt-pending"
    RECEIPT_NEVER_MADE = "receipt-never-made"
    KEY_MISSING = "key-missing"
    KEY_DAMAGED = "key-damaged"
    TREE_MISSING = "tree-missing"
    TREE_DAMAGED = "tree-damaged"
    TREE_SUPERSEDED = "tree-superseded"
    SNAPSHOT_DAMAGED = "snapshot-damaged"
    SNAPSHOT_UNCOMMITTED = "snapshot-uncommitted"
    SNAPSHOT_GIVEN_UP = "snapshot-given-up"
    PACK_DAMAGED = "pack-damaged"
    PACK_UNFINISHED = "pack-unfinished"
    MANIFEST_MISSING = "manifest-missing"
    MANIFEST_DAMAGED = "manifest-damaged"
    MANIFEST_MISPLACED = "manifest-misplaced"
    MANIFEST_DISORDER = "manifest-disorder"
    MANIFEST_INCONSISTENT = "manifest-inconsistent"
    MANIFEST_UNDECIDED = "manifest-undecided"
    MANIFEST_GIVEN_UP = "manifest-given-up"
    RETIREMENT_UNFINISHED = "retirement-unfinished"
    ARRAY_METADATA_MISSING = "array-metadata-missing"
    ARRAY_METADATA_DAMAGED = "array-metadata-damaged"
    ARRAY_TOO_SMALL = "array-too-small"
    SLOT_MISSING = "slot-missing"
    SLOT_DAMAGED = "slot-damaged"
    SLOT_CONFLICT = "slot-conflict"
    SLOT_UNNAMED = "slot-unnamed"
    JOURNAL_MISSING = "journal-missing"
    JOURNAL_DAMAGED = "journal-damaged"
    JOURNAL_GAP = "journal-gap"
    JOURNAL_FOREIGN = "journal-foreign"
    JOURNAL_TORN = "journal-torn"
    JOURNAL_OUTDATED = "journal-outdated"
    JOURNAL_NOT_CHECKED = "journal-not-checked"
    REPLAY_MISMATCH = "replay-mismatch"
    REPLAY_NOT_CHECKED = "replay-not-checked"
    SEAL_KEY_MISSING = "seal-key-missing"
    SEAL_UNFINISHED = "seal-unfinished"
    REMOVAL_UNFINISHED = "removal-unfinished"
    OBJECT_UNREADABLE = "object-unreadable"
    OBJECT_MISNAMED = "object-misnamed"
    OBJECT_UNKNOWN = "object-unknown"
    LEFTOVER = "leftover"

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        if self in _NOTES:
            return Severity.NOTE
        return Severity.REPAIRABLE if self in _REPAIRABLE else Severity.DAMAGE


_NOTES = frozenset(
    {
        FindingKind.RECEIPT_NEVER_MADE,
        FindingKind.TREE_SUPERSEDED,
        FindingKind.SNAPSHOT_UNCOMMITTED,
        FindingKind.SNAPSHOT_GIVEN_UP,
        FindingKind.PACK_UNFINISHED,
        FindingKind.MANIFEST_UNDECIDED,
        FindingKind.MANIFEST_GIVEN_UP,
        FindingKind.RETIREMENT_UNFINISHED,
        FindingKind.SLOT_UNNAMED,
        FindingKind.SEAL_UNFINISHED,
        FindingKind.JOURNAL_TORN,
        FindingKind.JOURNAL_OUTDATED,
        FindingKind.JOURNAL_NOT_CHECKED,
        FindingKind.REPLAY_NOT_CHECKED,
        FindingKind.OBJECT_UNKNOWN,
        FindingKind.LEFTOVER,
    }
)
_REPAIRABLE = frozenset(
    {
        FindingKind.ARRAY_METADATA_MISSING,
        FindingKind.ARRAY_METADATA_DAMAGED,
        FindingKind.ARRAY_TOO_SMALL,
        FindingKind.REMOVAL_UNFINISHED,
        FindingKind.RECEIPT_PENDING,
        FindingKind.OBJECT_MISNAMED,
    }
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is not as a freshly stopped service would have left it."""

    kind: FindingKind
    """What was found."""
    key: str
    """Key of the object in the bank, or path of the file where it is kept outside."""
    offset: int | None = None
    """Byte of the object at which the fault begins; None = no particular one."""
    problem: str
    """What is wrong."""
    affects: str = ""
    """Which blocks or revisions are concerned; empty = none."""
    remedy: str
    """What can be done."""

    @property
    def severity(self) -> Severity:
        """How bad it is."""
        return self.kind.severity

    @property
    def identity(self) -> tuple[FindingKind, str, int | None]:
        """What makes two findings of two looks at a bank the same one."""
        return (self.kind, self.key, self.offset)

    def to_json(self) -> dict[str, object]:
        """Return the finding as JSON-able values."""
        return {
            "severity": self.severity.value,
            "kind": self.kind.value,
            "key": self.key,
            "offset": self.offset,
            "problem": self.problem,
            "affects": self.affects,
            "remedy": self.remedy,
        }


class FindingLog:
    """Collects findings: lists so many of each kind, and counts the rest.

    Parameters
    ----------
    max_listed
        Findings of one kind that are listed.
    """

    def __init__(self, max_listed: int = MAX_LISTED) -> None:
        self._max_listed = max_listed
        self._identities: set[tuple[FindingKind, str, int | None]] = set()
        self.listed: list[Finding] = []
        """What is kept in full, in the order found."""
        self.counts: Counter[FindingKind] = Counter()
        """Findings of each kind, those that are not listed included."""

    def add(self, finding: Finding) -> None:
        """Take note of a finding; one that is listed already counts once."""
        if finding.identity in self._identities:
            return
        if self.counts[finding.kind] < self._max_listed:
            self.listed.append(finding)
            self._identities.add(finding.identity)
        self.counts[finding.kind] += 1

    def extend(self, findings: Iterable[Finding]) -> None:
        """Take note of findings, one at a time."""
        for finding in findings:
            self.add(finding)

    def merge(self, other: FindingLog) -> None:
        """Take note of what another log holds."""
        self.extend(other.listed)
        for kind, count in other.counts.items():
            self.counts[kind] += count - other.num_listed(kind)

    def num_listed(self, kind: FindingKind) -> int:
        """Return how many findings of `kind` are listed."""
        return sum(finding.kind is kind for finding in self.listed)

    def confirmed_by(self, second: FindingLog) -> FindingLog:
        """Return what a second look found too, and the notes of the first."""
        confirmed = FindingLog(self._max_listed)
        for kind, count in self.counts.items():
            found = [finding for finding in self.listed if finding.kind is kind]
            if kind.severity is not Severity.NOTE:
                again = {f.identity: f for f in second.listed if f.kind is kind}
                # Too many to compare one by one: whatever was fleeting, the second look counts.
                is_cut = len(found) < count
                found = (
                    list(again.values())
                    if is_cut
                    else [again[finding.identity] for finding in found if finding.identity in again]
                )
                count = min(count, second.counts[kind]) if is_cut else len(found)
            confirmed.extend(found)
            confirmed.counts[kind] += count - len(found)
        confirmed.counts = +confirmed.counts
        return confirmed

    @property
    def is_complete(self) -> bool:
        """True where every finding is listed."""
        return len(self.listed) == self.counts.total()


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """How much was looked at."""

    num_revisions: int = 0
    """Revision records."""
    num_manifests: int = 0
    """Manifests."""
    num_slots: int = 0
    """Objects of slots, one per slot and role."""
    num_bytes: int = 0
    """Bytes of them that were read; 0 for a quick check."""
    num_frames: int = 0
    """Updates in journals."""
    num_replayed: int = 0
    """Gradients in them that were computed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FsckReport:
    """What a check of a bank found."""

    url: str
    """The bank."""
    deep: bool
    """True where the content of slots was read, and updates were computed again."""
    revision: int
    """Newest committed revision; -1 where that cannot be told."""
    checked: Checked
    """How much was looked at."""
    findings: tuple[Finding, ...]
    """The findings, worst first; of each kind a limited number."""
    counts: Mapping[FindingKind, int]
    """Findings of each kind, those that are not listed included."""

    @property
    def is_clean(self) -> bool:
        """True where there are notes at most."""
        return all(kind.severity is Severity.NOTE for kind in self.counts)

    @property
    def has_damage(self) -> bool:
        """True where something that was written is lost or changed."""
        return self.count(Severity.DAMAGE) > 0

    def count(self, severity: Severity) -> int:
        """Return the number of findings of `severity`."""
        return sum(n for kind, n in self.counts.items() if kind.severity is severity)

    def of(self, kind: FindingKind) -> tuple[Finding, ...]:
        """Return the listed findings of `kind`."""
        return tuple(finding for finding in self.findings if finding.kind is kind)

    def to_json(self) -> dict[str, object]:
        """Return the report as JSON-able values."""
        return {
            "bank": self.url,
            "deep": self.deep,
            "revision": self.revision,
            "clean": self.is_clean,
            "damage": self.count(Severity.DAMAGE),
            "repairable": self.count(Severity.REPAIRABLE),
            "notes": self.count(Severity.NOTE),
            "checked": {name: getattr(self.checked, name) for name in Checked.__slots__},
            "counts": {kind.value: count for kind, count in self.counts.items()},
            "findings": [finding.to_json() for finding in self.findings],
        }
