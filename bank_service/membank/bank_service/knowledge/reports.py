"""Reports of transactions: of what shards prepared, into a record, and out of one for a retry."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from membank.bank_service.shard.contract import Prepared
from membank.wire.format import RevisionRecord
from membank.wire.records import BlockChange, CentroidChange, TransactionReport, TreeChange
from membank.wire.spec import BlockRef, BlockState


def report_of(record: RevisionRecord) -> TransactionReport:
    """Return the report of a committed transaction, from its record."""
    changes = record.detail.get("changes")
    destroyed = record.detail.get("num_slots_destroyed")
    tree = record.detail.get("tree_changes")
    packs = record.detail.get("packs")
    return TransactionReport(
        revision=record.revision,
        changes=tuple(
            BlockChange(
                ref=BlockRef(level, cluster),
                version_before=version_before,
                version_after=version_after,
                state_before=BlockState(state_before),
                state_after=BlockState(state_after),
                num_bytes=num_bytes,
            )
            for (
                level,
                cluster,
                version_before,
                version_after,
                state_before,
                state_after,
                num_bytes,
            ) in (changes if isinstance(changes, list) else ())
        ),
        num_slots_destroyed=destroyed if isinstance(destroyed, int) else 0,
        tree_changes=tuple(
            TreeChange(
                topic=BlockRef(level, cluster),
                changes_label=bool(label),
                changes_num_documents=bool(count),
                centroid_change=CentroidChange(centroid),
            )
            for level, cluster, label, count, centroid in (tree if isinstance(tree, list) else ())
        ),
        packs=tuple(packs) if isinstance(packs, list) else (),
    )


def report_on(
    revision: int,
    prepared: Sequence[Prepared],
    tree_changes: tuple[TreeChange, ...],
    *,
    packs_holding: Callable[[frozenset[BlockRef]], tuple[str, ...]],
    dry_run: bool = False,
) -> TransactionReport:
    """Return the report of what shards have prepared.

    Parameters
    ----------
    revision
        What the report gives as the revision of the bank.
    prepared
        What they have prepared.
    tree_changes
        What changes in the tree.
    packs_holding
        Returns the names of stored packs that go with deleted blocks.
    dry_run
        Whether nothing is to come of it.
    """
    changes = sorted(
        (change for part in prepared for change in part.changes), key=lambda change: change.ref
    )
    return TransactionReport(
        revision=revision,
        changes=tuple(changes),
        dry_run=dry_run,
        num_slots_destroyed=sum(part.num_slots_destroyed for part in prepared),
        tree_changes=tree_changes,
        packs=packs_holding(
            frozenset(c.ref for c in changes if c.state_after is BlockState.DELETED)
        ),
    )


def change_row(change: BlockChange) -> list[int]:
    """Return what a record says of a change."""
    return [
        *change.ref,
        change.version_before,
        change.version_after,
        int(change.state_before),
        int(change.state_after),
        change.num_bytes,
    ]


def tree_change_row(change: TreeChange) -> list[int]:
    """Return what a record says of a change of the tree."""
    return [
        *change.topic,
        int(change.changes_label),
        int(change.changes_num_documents),
        int(change.centroid_change),
    ]
