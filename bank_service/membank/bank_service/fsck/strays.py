"""Objects that belong to nothing: leftovers of probes and scratch files, unknown and misnamed keys."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.fsck.segments import is_local_segment
from membank.bank_service.fsck.slots import slot_of
from membank.bank_service.fsck.view import PartitionView
from membank.bank_service.store.journal.spares import SPARE_SUFFIX
from membank.bank_service.store.objects import PROBES, ObjectStore, directory_of
from membank.wire.format.layout import (
    SPEC_KEY,
    array_prefix,
    claim_key,
    key_id_in,
    log_key,
    log_prefix,
    manifest_key,
    number_in,
    pack_name,
    partition_prefix,
    receipt_key,
    revision_key,
    snapshot_name,
    tree_key,
)

PARTITION_KEY = re.compile(r"partitions/(\d+)/")
"""Begins every key of a partition."""
JOURNAL_KEY = re.compile(r"partitions/(\d+)/journal/([^/]+)")
"""A file of a local journal beside the blocks."""


def check_scratch(objects: ObjectStore) -> Iterator[Finding]:
    """Report scratch files of a bank in a directory."""
    if (directory := directory_of(objects)) is None:
        return
    # The store's listings leave them out; only looking at names is sure to disturb no writer.
    folders = [path for path in _children(directory / ".tmp") if path.is_dir()]
    count = sum(1 for folder in folders for path in _children(folder) if path.name != "lock")
    if count:
        yield _leftover(
            ".tmp",
            f"{count} scratch files of writers at work, or of killed ones",
            "nothing; the next writer removes those of killed ones",
        )


def check_names(keys: Collection[str], num_partitions: int | None) -> Iterator[Finding]:
    """Report objects outside of the partitions that the bank has no use for."""
    for key in keys:
        if (match := PARTITION_KEY.match(key)) is not None:
            number = int(match[1])
            if num_partitions is None or (
                number < num_partitions and key.startswith(f"{partition_prefix(number)}/")
            ):
                continue
            yield _unknown(key)
        elif key.startswith(f"{PROBES}/"):
            yield _leftover(
                key,
                "it was made to try the storage out, by a start that was cut short",
                "nothing; `membank gc` removes it",
            )
        elif key != SPEC_KEY and number_in(key, claim_key) is None and not _is_document(key):
            yield _unknown(key)


def check_partition_names(view: PartitionView) -> Iterator[Finding]:
    """Report objects of a partition that the bank has no use for."""
    arrays = {
        f"{array_prefix(view.number, level, role)}/zarr.json"
        for level in range(1, view.spec.num_levels + 1)
        for role in view.spec.roles
    }
    log = f"{log_prefix(view.number)}/"
    for key in sorted(view.keys):
        if key in arrays or slot_of(view.spec, view.number, key) is not None:
            continue
        if number_in(key, partial(manifest_key, view.number)) is not None:
            continue
        if key.startswith(log):
            if number_in(key, partial(log_key, view.number)) is None:
                yield _misnamed(key)
        elif (match := JOURNAL_KEY.fullmatch(key)) is not None:
            yield from _check_journal_name(key, match[2])
        else:
            yield _unknown(key)


def _check_journal_name(key: str, name: str) -> Iterator[Finding]:
    if name == "lock" or is_local_segment(name) or name.endswith(SPARE_SUFFIX):
        return
    yield _misnamed(key) if name.endswith(".log") else _unknown(key)


def _is_document(key: str) -> bool:
    numbered = (revision_key, tree_key, receipt_key)
    is_numbered = any(number_in(key, key_of) is not None for key_of in numbered)
    named = (snapshot_name, pack_name, key_id_in)
    return is_numbered or any(name_in(key) is not None for name_in in named)


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []  # it went away: scratch does


def _leftover(key: str, problem: str, remedy: str) -> Finding:
    return Finding(kind=FindingKind.LEFTOVER, key=key, problem=problem, remedy=remedy)


def _unknown(key: str) -> Finding:
    return Finding(
        kind=FindingKind.OBJECT_UNKNOWN,
        key=key,
        problem="it is no part of a bank of this format",
        remedy="nothing; remove it if you know it",
    )


def _misnamed(key: str) -> Finding:
    return Finding(
        kind=FindingKind.OBJECT_MISNAMED,
        key=key,
        problem="the parts of a journal have another form of name: none may be overlooked",
        affects="the start of the service",
        remedy="move the file out of the bank",
    )
