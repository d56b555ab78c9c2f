"""Metadata of the zarr arrays: there, and large enough for every slot that a manifest names."""

from __future__ import annotations

from collections.abc import Iterator

from membank.bank_service.fsck.reading import first_clause, unreadable
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.fsck.view import PartitionView
from membank.bank_service.store.arrays import SlotArrays
from membank.wire.errors import CorruptionError, MembankError
from membank.wire.format.layout import array_prefix
from membank.wire.spec import Role


def check_arrays(view: PartitionView) -> Iterator[Finding]:
    """Check the metadata of every array that holds, or may hold, slots."""
    largest: dict[int, int] = {}
    for (level, slot), use in view.manifests.slots.items():
        if not view.manifests.is_doomed(use):
            largest[level] = max(largest.get(level, -1), slot)
    arrays = SlotArrays(view.bank.objects, view.spec, view.number)
    for level in range(1, view.spec.num_levels + 1):
        for role in view.spec.roles:
            key = f"{array_prefix(view.number, level, role)}/zarr.json"
            view.bank.looked_at(key in view.keys)
            if level not in largest and key not in view.keys:
                continue
            finding = _check(arrays, key, level, role, largest.get(level, -1))
            if finding is not None:
                yield finding


def _check(arrays: SlotArrays, key: str, level: int, role: Role, largest: int) -> Finding | None:
    try:
        capacity = arrays.read_capacity(level, role)
    except CorruptionError as err:
        return _damaged(key, first_clause(err))
    except MembankError as err:
        return unreadable(key, first_clause(err), _affects(level))
    except Exception as err:  # a check must outlive any bytes
        return _damaged(key, f"it does not decode ({type(err).__name__}: {err})")
    return _too_small(key, capacity, level, largest) if capacity <= largest else None


def _damaged(key: str, problem: str) -> Finding:
    return Finding(
        kind=FindingKind.ARRAY_METADATA_DAMAGED,
        key=key,
        problem=problem,
        affects="the whole partition: its shard does not start",
        remedy="remove the file and start the shard, which writes it anew; or restore it",
    )


def _too_small(key: str, capacity: int, level: int, largest: int) -> Finding:
    if not capacity:
        kind, problem = FindingKind.ARRAY_METADATA_MISSING, "it is missing"
    else:
        kind = FindingKind.ARRAY_TOO_SMALL
        problem = f"it declares {capacity} slots, and a manifest names slot {largest}"
    return Finding(
        kind=kind,
        key=key,
        problem=problem,
        affects=_affects(level),
        remedy="start the shard, which writes it anew",
    )


def _affects(level: int) -> str:
    return f"readers of level {level} other than membank"
