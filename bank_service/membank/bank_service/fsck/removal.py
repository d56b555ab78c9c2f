"""Deleted blocks: nothing that is stored holds their content any more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from membank.bank_service.fsck.manifests import names
from membank.bank_service.fsck.packs import packs_holding
from membank.bank_service.fsck.report import Finding, FindingKind
from membank.bank_service.fsck.view import BankView, PartitionView
from membank.wire.format.layout import TREES, manifest_key, number_in, tree_key
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
        yield _still_named(view, number, refs, "which is deleted")


def check_former_removals(view: PartitionView) -> Iterator[Finding]:
    """Report what still names content that any deletion destroyed, though its block is there anew."""
    index = view.manifests
    for revision, link in view.bank.chain.links.items():
        manifest = link.manifests.get(view.number)
        if not link.deleted or manifest is None:
            continue
        deleted = set(link.deleted)
        holding: dict[int, set[BlockRef]] = defaultdict(set)
        for use in index.slots.values():
            if use.ref in deleted:
                for number in use.named_by:
                    if index.summaries[number].order < (revision, manifest):
                        holding[number].add(use.ref)
        for number, refs in sorted(holding.items()):
            yield _still_named(view, number, refs, f"as deleted by revision {revision}")


def check_deleted_trees(bank: BankView) -> Iterator[Finding]:
    """Report tree documents from before a deletion, whose labels and centroids they may hold."""
    deletions = [n for n, link in bank.chain.links.items() if link.deleted]
    for key in bank.objects.list(TREES):
        number = number_in(key, tree_key)
        if number is None:
            continue
        later = [n for n in deletions if n > number and bank.chain.links[n].tree_revision == n]
        if later:
            yield Finding(
                kind=FindingKind.REMOVAL_UNFINISHED,
                key=key,
                problem=f"it is from before revision {min(later)}, which deleted topics",
                affects="the deletion: labels and centroids of the topics are still there",
                remedy=REMOVAL_REMEDY,
            )


def _still_named(view: PartitionView, number: int, refs: set[BlockRef], why: str) -> Finding:
    return Finding(
        kind=FindingKind.REMOVAL_UNFINISHED,
        key=manifest_key(view.number, number),
        problem=f"it still names slots of {names(sorted(refs))}, {why}",
        affects="the deletion: it is in force, but not complete on storage",
        remedy=REMOVAL_REMEDY,
    )
