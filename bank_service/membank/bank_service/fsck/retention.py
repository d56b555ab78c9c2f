"""What a bank promises to keep, by its own documents: docs/format.md, "What is retained"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from membank.bank_service.fsck.chain import Chain
from membank.bank_service.fsck.manifests import ManifestIndex, Verdict
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.wire.format.layout import manifest_key, revision_key


@dataclass(slots=True)
class Needed:
    """The manifests of one partition that must be there, and what for."""

    current: int = 0
    """Number of the one in force; 0 = none."""
    revisions: dict[int, set[int]] = field(default_factory=dict)
    """By number, there or not: the revisions that begin or end with it."""
    others: dict[int, list[str]] = field(default_factory=dict)
    """By number, there or not: what else it is needed for."""
    ways_back: dict[int, str] = field(default_factory=dict)
    """What a rollback must name to get the state of a manifest, by its number."""

    @property
    def numbers(self) -> set[int]:
        """Every manifest that is needed."""
        return {*self.revisions, *self.others, self.current} - {0}

    def describe(self, numbers: Iterable[int]) -> str:
        """Return what any of `numbers` is needed for; empty = nothing."""
        wanted = [number for number in numbers if number in self.numbers]
        found = ["the present state"] if self.current in wanted else []
        found += dict.fromkeys(use for n in wanted for use in self.others.get(n, []))
        revisions = sorted(set().union(*(self.revisions.get(n, ()) for n in wanted)))
        if revisions:
            more = f" to {revisions[-1]}" if len(revisions) > 1 else ""
            found.append(f"revision{'s' if more else ''} {revisions[0]}{more}")
        return ", ".join(found)


def needed_manifests(chain: Chain, snapshots: Mapping[str, int], index: ManifestIndex) -> Needed:
    """Return what the present, retained revisions and snapshots need of one partition."""
    needed = Needed()
    # What the newest commit names must be there even where no manifest can be read.
    oldest = chain.latest_commit
    if index.current is not None:
        needed.current = index.current.number
        # What is undecided may be in force soon, and its promise with it.
        undecided = (s for s in index.summaries.values() if s.verdict is Verdict.UNDECIDED)
        oldest = min(oldest, index.current.history_from, *(s.history_from for s in undecided))
    for revision in chain.commits_from(oldest):
        _keep(needed, chain, index, revision)
    for name, revision in snapshots.items():
        pinned = min(revision, chain.latest)
        _keep(needed, chain, index, pinned)
        if number := chain.named_manifest(pinned, index.partition):
            needed.others.setdefault(number, []).append(f"snapshot {name}")
            needed.ways_back[number] = f"snapshot {name}"
    for summary in index.summaries.values():
        if summary.verdict is Verdict.UNDECIDED:
            use = f"revision {summary.revision}, if it is committed"
            needed.others.setdefault(summary.number, []).append(use)
    return needed


def _keep(needed: Needed, chain: Chain, index: ManifestIndex, revision: int) -> None:
    """Note the beginning and the end of a revision."""
    # 0 stands for a partition that nobody had changed by then.
    if beginning := chain.named_manifest(revision, index.partition):
        needed.revisions.setdefault(beginning, set()).add(revision)
    if (end := index.newest_until(revision)) is not None:
        needed.revisions.setdefault(end.number, set()).add(revision)
        needed.ways_back.setdefault(end.number, f"revision {revision}")


def missing_manifests(index: ManifestIndex, needed: Needed) -> list[Finding]:
    """Report the manifests that something needs and that are not there."""
    present = {*index.summaries, *index.unreadable}
    return [
        Finding(
            kind=FindingKind.MANIFEST_MISSING,
            key=manifest_key(index.partition, number),
            problem="it is missing",
            affects=needed.describe([number]),
            remedy="restore the file from a copy",
        )
        for number in sorted(needed.numbers - present)
    ]


def lost_records(chain: Chain, index: ManifestIndex) -> list[Finding]:
    """Report that the newest records are gone, to which manifests of the partition belong."""
    counting = max((s.revision for s in index.counting), default=-1)
    prepared = (s.revision for s in index.summaries.values() if s.verdict is Verdict.UNDECIDED)
    # What is prepared waits for the next record; those before it have been there.
    newest = max(counting, max(prepared, default=0) - 1)
    if newest <= chain.latest:
        return []
    return [
        Finding(
            kind=FindingKind.RECORD_MISSING,
            key=revision_key(newest),
            problem=f"it is missing, and manifests of partition {index.partition} belong to it",
            affects=f"revision {newest}; the partition's shard does not start",
            remedy="restore the file from a copy",
        )
    ]
