"""Snapshots: names for revisions that are kept."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial

from membank.bank_service.fsck.chain import Chain
from membank.bank_service.fsck.reading import Fault, FaultKind, examine, finding_of
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import CorruptionError, Reason
from membank.wire.format import decode_snapshot
from membank.wire.format.layout import FORMAT_VERSION, SNAPSHOTS, snapshot_key, snapshot_name
from membank.wire.records import Snapshot


@dataclass(slots=True)
class Snapshots:
    """The snapshots of a bank."""

    revisions: dict[str, int] = field(default_factory=dict)
    """Revision that each pins, by name."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with them."""


def survey_snapshots(objects: ObjectStore, chain: Chain) -> Snapshots:
    """Read the snapshots of a bank, and compare them with the commits that made them."""
    found = Snapshots()
    for key in objects.list(SNAPSHOTS):
        if (name := snapshot_name(key)) is None:
            continue
        snapshot = examine(objects, key, partial(_decode, key))
        if isinstance(snapshot, Fault) and snapshot.kind is FaultKind.MISSING:
            continue  # removed since it was listed
        if isinstance(snapshot, Fault):
            found.findings.append(
                finding_of(
                    snapshot,
                    key,
                    missing=FindingKind.SNAPSHOT_DAMAGED,
                    damaged=FindingKind.SNAPSHOT_DAMAGED,
                    affects=f"snapshot {name}, and every listing of snapshots",
                    remedy="restore the file from a copy, or remove it to give the snapshot up",
                )
            )
            continue
        found.revisions[name] = snapshot.revision
        # A damaged record may be the commit; it is reported itself.
        if snapshot.revision in chain.bad:
            continue
        if not chain.makes_snapshot(name, snapshot.revision):
            found.findings.append(_uncommitted(key, snapshot))
        elif chain.gives_up_snapshot(name, snapshot.revision):
            found.findings.append(_given_up(key))
    return found


def _decode(key: str, data: bytes) -> Snapshot:
    snapshot = decode_snapshot(data, key=key)
    # The checksum does not cover it.
    if json.loads(data).get("format") != FORMAT_VERSION:
        raise CorruptionError(f"{key} does not say its format", reason=Reason.SPEC_CORRUPT)
    if not isinstance(snapshot.revision, int):
        raise TypeError("it names a revision by something that is no number")
    if snapshot_key(snapshot.name) != key:
        raise CorruptionError(f"{key} holds snapshot {snapshot.name!r}", reason=Reason.SPEC_CORRUPT)
    return snapshot


def _uncommitted(key: str, snapshot: Snapshot) -> Finding:
    return Finding(
        kind=FindingKind.SNAPSHOT_UNCOMMITTED,
        key=key,
        problem=f"revision {snapshot.revision} is no commit that made it, so it is no snapshot",
        remedy="nothing; `membank gc` removes it",
    )


def _given_up(key: str) -> Finding:
    return Finding(
        kind=FindingKind.SNAPSHOT_GIVEN_UP,
        key=key,
        problem="a commit gave the snapshot up, and its name is still there",
        remedy="nothing; the next start of the service removes it",
    )
