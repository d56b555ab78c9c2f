"""The chain of revision records: numbers without gaps, each linked to the one before."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

from membank.bank_service.fsck.reading import Fault, FaultKind, examine_each, finding_of
from membank.bank_service.fsck.report import MAX_LISTED, Finding, FindingKind
from membank.bank_service.store.bank import SNAPSHOT_OPERATION, UNPIN_OPERATION
from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import CorruptionError, Reason
from membank.wire.format import RevisionRecord, decode_revision, encode_revision
from membank.wire.format.layout import REVISIONS, numbers_in, revision_key
from membank.wire.format.receipt import DELETION, SIGNING_KEY
from membank.wire.format.revision import record_sha256
from membank.wire.spec import BlockRef, BlockState


@dataclass(frozen=True, slots=True)
class Link:
    """What the other checks need of one revision record; a bank may have very many."""

    committed: bool
    """False for a transaction that was given up."""
    manifests: Mapping[int, int]
    """Manifest of each partition that it changed."""
    tree_revision: int
    """Revision whose tree document is in force."""
    operation: str
    """What was done."""
    snapshot: str
    """Snapshot that its detail names; empty = none."""
    sha256: str
    """Of the object's bytes."""
    previous_sha256: str
    """Of those of the record before, as this record has it."""
    deleted: tuple[BlockRef, ...] = ()
    """Blocks that it deleted."""
    owes_receipt: bool = False
    """Whether it says what it destroyed, so that a receipt of it can be made."""
    signing_key: str = ""
    """Public key that it vouches for, in base64; empty = none."""

    def makes(self, operation: str, snapshot: str) -> bool:
        """Say whether it committed `operation` for a snapshot."""
        return self.committed and (self.operation, self.snapshot) == (operation, snapshot)


@dataclass(slots=True)
class Chain:
    """The revision records of a bank."""

    links: dict[int, Link] = field(default_factory=dict)
    """Every record that is as it was written."""
    latest: int = -1
    """Greatest number that is stored; -1 = none."""
    bad: list[int] = field(default_factory=list)
    """Numbers whose record is missing or damaged, ascending."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with them."""
    _naming: dict[int, list[tuple[int, int]]] | None = None

    @property
    def latest_commit(self) -> int:
        """Newest revision that is known to be committed; -1 = none."""
        return max((n for n, link in self.links.items() if link.committed), default=-1)

    def is_commit(self, revision: int) -> bool:
        """Say whether `revision` is known to be committed."""
        link = self.links.get(revision)
        return link is not None and link.committed

    def commits_from(self, revision: int) -> list[int]:
        """Return the committed revisions from `revision` on, ascending."""
        return sorted(n for n, link in self.links.items() if n >= revision and link.committed)

    def makes_snapshot(self, name: str, revision: int) -> bool:
        """Say whether `revision` is a commit that made the snapshot `name`."""
        link = self.links.get(revision)
        return link is not None and link.makes(SNAPSHOT_OPERATION, name)

    def gives_up_snapshot(self, name: str, revision: int) -> bool:
        """Say whether a commit after `revision` gave the snapshot `name` up."""
        later = (link for number, link in self.links.items() if number > revision)
        return any(link.makes(UNPIN_OPERATION, name) for link in later)

    def named_manifest(self, revision: int, partition: int) -> int | None:
        """Return the manifest that `revision` consists of; 0 = as initialised, None = unknown.

        It is unknown where a record that may name another one cannot be read.
        """
        naming = self._names_of(partition)
        position = bisect_right(naming, (revision, 1 << 62)) - 1
        named_at, number = naming[position] if position >= 0 else (-1, 0)
        is_certain = bisect_right(self.bad, revision) == bisect_right(self.bad, named_at)
        return number if is_certain else None

    def _names_of(self, partition: int) -> list[tuple[int, int]]:
        if self._naming is None:
            naming: dict[int, list[tuple[int, int]]] = defaultdict(list)
            for revision, link in sorted(self.links.items()):
                if link.committed:
                    for part, number in link.manifests.items():
                        naming[part].append((revision, number))
            self._naming = dict(naming)
        return self._naming.get(partition, [])


def survey_chain(objects: ObjectStore, known: Mapping[int, Link] | None = None) -> Chain:
    """Read the records of a bank.

    Parameters
    ----------
    objects
        The bank's storage.
    known
        Records that were read before and were in order; they never change, so they are not read
        again.
    """
    known = known or {}
    stored = numbers_in(objects.list(REVISIONS), revision_key)
    chain = Chain(latest=max(stored, default=-1))
    # Revision 0 is the creation: no bank is without.
    for before, number in pairwise([-1, *(stored or [0])]):
        if number > before + 1:
            _note_missing(chain, before + 1, number - 1)
    chain.links |= {number: known[number] for number in stored if number in known}
    unread = [number for number in stored or [0] if number not in known]
    jobs = ((number, revision_key(number), partial(_decode, number)) for number in unread)
    for number, _, found in examine_each(objects, jobs):
        if isinstance(found, Fault):
            chain.bad.append(number)
            chain.findings.append(_faulty(found, number))
        else:
            chain.links[number] = found
    chain.bad.sort()
    chain.findings += _broken_links(chain.links)
    return chain


def _note_missing(chain: Chain, first: int, last: int) -> None:
    # A stray number may leave a gap of billions: its first records stand for all of it.
    for number in range(first, min(last, first + MAX_LISTED) + 1):
        chain.bad.append(number)
        fault = Fault(FaultKind.MISSING, f"it is missing, and record {last + 1} is there")
        chain.findings.append(_faulty(fault, number))


def _faulty(fault: Fault, number: int) -> Finding:
    return finding_of(
        fault,
        revision_key(number),
        missing=FindingKind.RECORD_MISSING,
        damaged=FindingKind.RECORD_DAMAGED,
        affects=f"whether revision {number} is in force; the bank does not open",
    )


def _decode(number: int, data: bytes) -> Link:
    key = revision_key(number)
    record = decode_revision(data, key=key)
    if record.revision != number:
        raise CorruptionError(
            f"{key} holds the record of revision {record.revision}",
            reason=Reason.MANIFEST_CORRUPT,
        )
    if encode_revision(record) != data:
        # Of the newest one, no other record has the digest.
        raise CorruptionError(
            f"{key} is not in the form in which it was written", reason=Reason.MANIFEST_CORRUPT
        )
    named = {*record.manifests, *record.manifests.values(), record.tree_revision}
    # The digest of another writer's nonsense holds too.
    if not all(isinstance(value, int) for value in named):
        raise ValueError("it names manifests or a tree by something that is no number")
    snapshot = record.detail.get("snapshot")
    deletion = record.detail.get(DELETION)
    body = deletion if isinstance(deletion, Mapping) else {}
    key_text = record.detail.get(SIGNING_KEY, body.get("public_key"))
    return Link(
        committed=bool(record.committed),
        manifests=dict(record.manifests),
        tree_revision=record.tree_revision,
        operation=str(record.operation),
        snapshot=snapshot if isinstance(snapshot, str) else "",
        sha256=record_sha256(data),
        previous_sha256=record.previous_sha256,
        deleted=_deleted(record),
        owes_receipt=bool(deletion),
        signing_key=key_text if isinstance(key_text, str) else "",
    )


def _deleted(record: RevisionRecord) -> tuple[BlockRef, ...]:
    changes = record.detail.get("changes")
    return tuple(
        BlockRef(int(level), int(cluster))
        for level, cluster, _, _, _, state_after, _ in (
            changes if isinstance(changes, list) else ()
        )
        if record.committed and state_after == BlockState.DELETED
    )


def _broken_links(links: Mapping[int, Link]) -> Iterable[Finding]:
    for number, link in links.items():
        if number == 0:
            expected = ""
        elif number - 1 in links:
            expected = links[number - 1].sha256
        else:
            continue  # what it links to is reported already
        if link.previous_sha256 != expected:
            before = revision_key(number - 1) if number else "nothing"
            yield Finding(
                kind=FindingKind.CHAIN_BROKEN,
                key=revision_key(number),
                problem=f"it follows another record than {before}: one of them was replaced",
                affects=f"the audit log up to revision {number} proves nothing",
                remedy="compare both with a copy, and restore the one that differs",
            )
