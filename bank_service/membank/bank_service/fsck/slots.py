"""Slots: every one that a manifest names is there, in every role, with the content it names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from membank.bank_service.fsck.manifests import SlotName, SlotUse
from membank.bank_service.fsck.reading import Fault, FaultKind, examine_each, finding_of
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.fsck.view import PartitionView
from membank.bank_service.store.arrays import is_zero_state
from membank.wire.format import decode_slot
from membank.wire.format.layout import manifest_key, partition_prefix, slot_key
from membank.wire.spec import BankSpec, Role


@dataclass(frozen=True, slots=True)
class _Place:
    """One role of a slot that a manifest names."""

    key: str
    level: int
    role: Role
    crc: int
    use: SlotUse


def check_slots(view: PartitionView) -> Iterator[Finding]:
    """Check the slots that manifests name."""
    index = view.manifests
    num_stored = 0
    retiring: Counter[int] = Counter()
    for place in _places(view):
        is_stored = place.key in view.keys
        if not is_stored and is_zero_state(view.spec, place.level, place.role, place.crc):
            continue
        view.bank.tally.num_slots += 1
        if is_stored:
            num_stored += 1
        elif view.needed.describe(place.use.named_by):
            yield _finding(view, Fault(FaultKind.MISSING, "it is missing"), place)
        else:
            # What nothing needs goes slots first, so that a crash leaves the manifest.
            retiring.update(place.use.named_by)
    for number in sorted(retiring):
        yield _retiring(index.partition, number, retiring[number])
    if view.bank.deep:
        yield from _check_contents(view)
    else:
        view.bank.looked_at(num_stored)


def _check_contents(view: PartitionView) -> Iterator[Finding]:
    bank = view.bank
    jobs = (
        (place, place.key, partial(_decode, view.spec, place))
        for place in _places(view)
        if place.key in view.keys and (bank.suspects is None or place.key in bank.suspects)
    )
    for place, _, found in examine_each(bank.objects, jobs):
        bank.looked_at(1)
        if isinstance(found, Fault):
            yield _finding(view, found, place)
        else:
            bank.tally.num_bytes += found


def check_unnamed(view: PartitionView) -> Iterator[Finding]:
    """Report slots that no manifest names."""
    index = view.manifests
    if index.unreadable or view.needed.numbers - index.summaries.keys():
        return  # a manifest that cannot be read may name them
    unnamed: dict[int, set[int]] = defaultdict(set)
    for key in view.keys:
        found = slot_of(view.spec, view.number, key)
        if found is not None and found not in index.slots and found not in index.given_up:
            unnamed[found[0]].add(found[1])
    for level, slots in sorted(unnamed.items()):
        yield Finding(
            kind=FindingKind.SLOT_UNNAMED,
            key=f"{partition_prefix(view.number)}/level-{level}",
            problem=f"no manifest names {_numbered(sorted(slots))}: a writer at work, or one that "
            "was killed",
            remedy="nothing, where no damage is found: `membank gc` removes them",
        )


def slot_of(spec: BankSpec, partition: int, key: str) -> SlotName | None:
    """Return level and slot of the chunk whose key this is; None = it is none's."""
    parts = key.split("/")
    if len(parts) != 5 or not parts[4].startswith("c."):
        return None
    try:
        level, slot, role = (
            int(parts[2].removeprefix("level-")),
            int(parts[4].split(".")[1]),
            parts[3],
        )
        known = slot_key(partition, level, Role(role), slot) == key and Role(role) in spec.roles
    except ValueError:
        return None
    return (level, slot) if known and 1 <= level <= spec.num_levels else None


def _places(view: PartitionView) -> Iterator[_Place]:
    index = view.manifests
    for (level, slot), use in sorted(index.slots.items()):
        if not index.is_doomed(use):
            for role, crc in zip(view.spec.roles, use.crcs, strict=True):
                yield _Place(slot_key(view.number, level, role, slot), level, role, crc, use)


def _decode(spec: BankSpec, place: _Place, chunk: bytes) -> int:
    """Check a chunk and return its length."""
    dtype, shape = spec.role_dtype(place.role), spec.block_shape(place.level)
    decode_slot(chunk, dtype=dtype, shape=shape, crc=place.crc, key=place.key)
    return len(chunk)


def _finding(view: PartitionView, fault: Fault, place: _Place) -> Finding:
    uses = view.needed.describe(place.use.named_by) or "nothing that is retained"
    return finding_of(
        fault,
        place.key,
        missing=FindingKind.SLOT_MISSING,
        damaged=FindingKind.SLOT_DAMAGED,
        affects=f"block {place.use.ref}: {uses}",
        remedy=_remedy(view, place.use),
    )


def _remedy(view: PartitionView, use: SlotUse) -> str:
    restore = "restore the file from a copy"
    if view.needed.current not in use.named_by:
        return f"{restore}, or do not return block {use.ref} to that state"
    for number, state in sorted(view.needed.ways_back.items(), reverse=True):
        if number not in use.named_by and _has_other(view, use, number):
            return f"{restore}, or roll block {use.ref} back to {state}, or swap it"
    return f"{restore}, or swap block {use.ref} (no other state of it is retained)"


def _has_other(view: PartitionView, use: SlotUse, number: int) -> bool:
    """Say whether a manifest names another slot of the same block that is there."""
    return any(
        other.ref == use.ref
        and number in other.named_by
        and all(
            slot_key(view.number, level, role, slot) in view.keys
            or is_zero_state(view.spec, level, role, crc)
            for role, crc in zip(view.spec.roles, other.crcs, strict=True)
        )
        for (level, slot), other in view.manifests.slots.items()
    )


def _retiring(partition: int, number: int, count: int) -> Finding:
    return Finding(
        kind=FindingKind.RETIREMENT_UNFINISHED,
        key=manifest_key(partition, number),
        problem=f"{count} objects of slots that it names are gone, and nothing needs it: its "
        "removal is under way, or was cut short",
        remedy="nothing; the next start of its shard, or `membank gc`, goes on",
    )


def _numbered(slots: list[int], limit: int = 4) -> str:
    shown = ", ".join(str(slot) for slot in slots[:limit])
    more = f" and {len(slots) - limit} more" if len(slots) > limit else ""
    return f"slot{'s' if len(slots) > 1 else ''} {shown}{more}"
