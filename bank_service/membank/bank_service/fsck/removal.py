"""Deleted blocks: nothing that is stored holds their content any more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from membank.bank_service.fsck.manifests import names
from membank.bank_service.fsck.packs import packs_holding
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.fsck.view import PartitionView
from membank.wire.format.layout import manifest_key
from membank.wire.spec import BlockRef

REMOVAL_REMEDY = "let the service go on with it; one that is started does so before it serves"
"""What makes a deletion complete."""


def check_removal(view: PartitionView) -> Iterator[Finding]:
    """Report what still holds, or names, content of blocks that are deleted."""
    index = view.manifests
    if not index.deleted or not index.is_certain:
        return
    yield from packs_holding(view.bank.packs.records, index.deleted)
    holding: dict[int, set[BlockRef]] = defaultdict(set)
    for use in index.slots.values():
        if use.ref in index.deleted:
            for number in use.named_by:
                # A later one may create the block anew.
                if index.is_before_current(number):
                    holding[number].add(use.ref)
    for number, refs in sorted(holding.items()):
        yield Finding(
            kind=FindingKind.REMOVAL_UNFINISHED,
            key=manifest_key(view.number, number),
            problem=f"it still names slots of {names(sorted(refs))}, which is deleted",
            affects="the deletion: it is in force, but not complete on storage",
            remedy=REMOVAL_REMEDY,
        )
