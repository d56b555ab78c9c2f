"""A small bank that has something of everything, with the state after each journalled update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from membank.bank_service.shard import Durability, Shard, ShardConfig
from membank.bank_service.shard.contract import BlockOperation, Erase, SetContent, SetState
from membank.bank_service.store import Bank, ObjectStore
from membank.bank_service.store.bank import SNAPSHOT_OPERATION
from membank.bank_service.store.journal import LogFile, PosixLogFile
from membank.wire.format import TreeDocument
from membank.wire.records import Snapshot
from membank.wire.spec import BankSpec, BlockRef, BlockState
from tiny_bank import State, UnsyncedObjects, commit_record, full_state, make_update, tiny_spec

A, B, C = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2)
"""Updated at last, and still in the journal: A (swapped before, in partition 0) and B (in 1)."""
HIDDEN, GONE = BlockRef(2, 0), BlockRef(2, 5)
"""Withheld and deleted, both in partition 0."""
SNAPSHOT = "before"
"""Name of the snapshot, at revision 1."""


@dataclass(frozen=True)
class WholeBank:
    """What `make_whole_bank` made."""

    bank: Bank
    """The bank, its shard closed as a killed process leaves it."""
    states: list[State]
    """What it held before the journalled updates, and after each of them."""


def whole_config(journal_dir: Path | None = None, *, durability: str = "process") -> ShardConfig:
    """Return settings by which a journal of three updates has several segments, and none waits."""
    return ShardConfig(
        durability=Durability.of(durability),
        segment_bytes=600,
        journal_dir=None if journal_dir is None else str(journal_dir),
        lease_s=0.0,
    )


def make_whole_bank(
    where: Path | ObjectStore,
    spec: BankSpec | None = None,
    *,
    config: ShardConfig | None = None,
    open_log_file: Callable[[Path], LogFile] = PosixLogFile,
) -> WholeBank:
    """Make a bank: updates, a swap, a snapshot, withheld, deleted, a tree, a journal."""
    objects = UnsyncedObjects(where) if isinstance(where, Path) else where
    tree = TreeDocument(labels={A: "metals", GONE: "halogens"})
    bank = Bank.create(objects, spec or tiny_spec(), tree=tree)
    config = config or whole_config()
    open_shard = partial(Shard.open, bank, config=config, open_log_file=open_log_file)
    shard = open_shard()
    shard.push(make_update(shard, [A, B, HIDDEN, GONE], "u0"))
    swap = SetContent(ref=A, weight=_ones(bank.spec, A))
    take_snapshot(shard, bank, [swap], SNAPSHOT)
    shard.push(make_update(shard, [A, B, C], "u1"))
    commit(shard, bank, [SetState(ref=HIDDEN, state=BlockState.WITHHELD)])
    commit(shard, bank, [Erase(ref=GONE)], tree=tree.without_topic(bank.spec, GONE))
    shard.push(make_update(shard, [C], "u2"))
    shard.close()
    shard = open_shard()
    states = [full_state(shard)]
    for number in range(3):
        shard.push(make_update(shard, [A, B], f"j{number}"))
        states.append(full_state(shard))
    shard.close(consolidate=False)
    return WholeBank(bank, states)


def take_snapshot(
    shard: Shard, bank: Bank, operations: Sequence[BlockOperation], name: str
) -> None:
    """Commit a revision under a name that pins it."""
    revision = bank.latest_number() + 1
    bank.create_snapshot(Snapshot(name=name, revision=revision, create_time_s=0.0))
    commit(
        shard,
        bank,
        operations,
        operation=SNAPSHOT_OPERATION,
        all_partitions=True,
        detail={"snapshot": name},
    )


def commit(
    shard: Shard,
    bank: Bank,
    operations: Sequence[BlockOperation],
    *,
    operation: str = "test",
    all_partitions: bool = False,
    detail: Mapping[str, object] | None = None,
    tree: TreeDocument | None = None,
) -> None:
    """Run one transaction, as a coordinator does it."""
    revision = bank.latest_number() + 1
    prepared = shard.prepare(revision, operations, all_partitions=all_partitions)
    before = bank.latest_commit()
    if tree is not None:
        bank.write_tree(revision, tree)
    record = dataclasses.replace(
        commit_record(bank, revision, prepared),
        operation=operation,
        manifests=prepared.manifests,
        tree_revision=before.tree_revision if tree is None else revision,
        detail=detail or {},
    )
    shard.commit(bank.decide(record))
    if tree is not None:
        bank.objects.delete(f"trees/{before.tree_revision:010d}.safetensors")


def _ones(spec: BankSpec, ref: BlockRef) -> np.ndarray:
    return np.ones(spec.block_shape(ref.level), np.float32).astype(spec.numpy_dtype)
