"""Packs in the bank's own store: whole, described, and without anything that was deleted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from membank.bank_service.fsck.manifests import names
from membank.bank_service.fsck.reading import Fault, FaultKind, examine, finding_of
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import CorruptionError, MembankError, Reason
from membank.wire.format.layout import PACKS, pack_key, pack_name, pack_record_key
from membank.wire.format.pack import check_signatures, decode_pack
from membank.wire.format.stored_pack import PackRecord, decode_pack_record
from membank.wire.spec import BlockRef

_REMEDY = "export the topic again, and destroy this one: membank pack delete {name}"


@dataclass(slots=True)
class Packs:
    """The packs that a bank keeps."""

    records: dict[str, PackRecord] = field(default_factory=dict)
    """What is said of each, by name."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong with them."""


def survey_packs(objects: ObjectStore, *, deep: bool) -> Packs:
    """Read what is said of the packs of a bank and, where `deep`, the packs themselves."""
    found = Packs()
    keys = set(objects.list(PACKS))
    for name in sorted({name for key in keys if (name := pack_name(key)) is not None}):
        if pack_record_key(name) not in keys:
            found.findings.append(_unlisted(name))
            continue
        record = examine(objects, pack_record_key(name), partial(_decode, name))
        if isinstance(record, Fault):
            if record.kind is not FaultKind.MISSING:  # else destroyed since it was listed
                found.findings.append(_damaged(record, pack_record_key(name), name))
            continue
        found.records[name] = record
        if pack_key(name) not in keys:
            found.findings.append(_unfinished(name))
        elif deep:
            fault = examine(objects, pack_key(name), partial(_compare, record))
            if isinstance(fault, Fault) and fault.kind is not FaultKind.MISSING:
                found.findings.append(_damaged(fault, pack_key(name), name))
    return found


def packs_holding(
    records: Mapping[str, PackRecord], deleted: frozenset[BlockRef]
) -> Iterator[Finding]:
    """Report packs that tell of blocks which are deleted."""
    for name, record in sorted(records.items()):
        if refs := sorted(deleted & record.refs):
            yield Finding(
                kind=FindingKind.REMOVAL_UNFINISHED,
                key=pack_key(name),
                problem=f"it holds {names(refs)}, which is deleted",
                affects="the deletion: it is in force, but not complete on storage",
                remedy="let the service go on with it; one that is started does so before it serves. "
                f"If the pack is there afterwards: membank pack delete {name}",
            )


def _decode(name: str, data: bytes) -> PackRecord:
    key = pack_record_key(name)
    record = decode_pack_record(data, key=key)
    if record.pack.name != name:
        raise CorruptionError(f"{key} describes {record.pack.name!r}", reason=Reason.SPEC_CORRUPT)
    return record


def _compare(record: PackRecord, data: bytes) -> None:
    try:
        pack = decode_pack(data)
        check_signatures(pack)
    except MembankError as err:
        raise CorruptionError(str(err), reason=Reason.CHECKSUM_MISMATCH) from err
    if (pack.sha256, len(data)) != (record.sha256, record.pack.num_bytes):
        raise CorruptionError("it is another pack than its description says")


def _damaged(fault: Fault, key: str, name: str) -> Finding:
    return finding_of(
        fault,
        key,
        missing=FindingKind.PACK_DAMAGED,
        damaged=FindingKind.PACK_DAMAGED,
        affects=f"pack {name}",
        remedy=_REMEDY.format(name=name),
    )


def _unlisted(name: str) -> Finding:
    return Finding(
        kind=FindingKind.PACK_UNFINISHED,
        key=pack_key(name),
        problem="nothing says what it holds, so it is no pack: its destruction was cut off",
        remedy=f"membank pack delete {name}; the next deletion of a topic removes it as well",
    )


def _unfinished(name: str) -> Finding:
    return Finding(
        kind=FindingKind.PACK_UNFINISHED,
        key=pack_record_key(name),
        problem="its pack is not there: the export or the destruction of it was cut off",
        remedy=f"membank pack delete {name}, or export the topic again under this name",
    )
