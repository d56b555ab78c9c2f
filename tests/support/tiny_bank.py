"""A bank of a few hundred parameters on disk, and the steps that tests of shards share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from membank.bank_service.shard import Shard
from membank.bank_service.shard.contract import BlockOperation, Prepared
from membank.bank_service.store import Bank, Data, LocalObjects
from membank.wire.format import RevisionRecord
from membank.wire.records import Gradient, Update
from membank.wire.spec import (
    Array,
    BankSpec,
    BlockRef,
    BlockState,
    LevelSpec,
    OptimizerKind,
    OptimizerSpec,
    Role,
)


def tiny_spec(
    *,
    dtype: str = "float32",
    optimizer: OptimizerKind = OptimizerKind.ADAMW,
    num_partitions: int = 2,
    max_staleness: int = 16,
) -> BankSpec:
    """Return 3 + 6 blocks on two levels; level-1 cluster 0 and 2 share partition 0."""
    return BankSpec(
        name="tiny",
        num_layers=2,
        width=8,
        levels=(
            LevelSpec(fan_out=3, block_width=2, learning_rate=0.1),
            LevelSpec(fan_out=2, block_width=1, learning_rate=0.05),
        ),
        dtype=dtype,
        optimizer=OptimizerSpec(kind=optimizer),
        num_partitions=num_partitions,
        max_staleness=max_staleness,
        init_seed=7,
    )


class UnsyncedObjects(LocalObjects):
    """A directory that is not told to survive a loss of power; tests lose none, and are quicker."""

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        del durable
        super().put(key, data)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        del durable
        super().put_if_absent(key, data)

    def sync(self, keys: Sequence[str]) -> None:
        del keys

    def delete_durably(self, key: str) -> None:
        self.delete(key)


def create_bank(root: Path, spec: BankSpec | None = None) -> Bank:
    """Create a bank in `root`."""
    return Bank.create(UnsyncedObjects(root), spec or tiny_spec())


def gradient_for(spec: BankSpec, ref: BlockRef, seed: int, dtype: str = "float32") -> Array:
    """Return a gradient that depends on block and seed alone."""
    rng = np.random.default_rng((seed, *ref))
    values = rng.standard_normal(spec.block_shape(ref.level)).astype(np.float32)
    return values.astype(np.dtype(dtype))


def make_update(
    shard: Shard,
    refs: Sequence[BlockRef],
    request_id: str,
    *,
    bases: Mapping[BlockRef, int] | None = None,
    seed: int | None = None,
) -> Update:
    """Return an update of `refs`, based on their present versions unless `bases` says otherwise."""
    present = {status.ref: status.version for status in shard.describe(refs)}
    number = sum(request_id.encode()) if seed is None else seed
    return Update(
        request_id=request_id,
        step=1,
        gradients=tuple(
            Gradient(
                ref=ref,
                base_version=(bases or present)[ref],
                values=gradient_for(shard.spec, ref, number),
            )
            for ref in refs
        ),
    )


def transact(
    shard: Shard,
    bank: Bank,
    operations: Sequence[BlockOperation],
    *,
    all_partitions: bool = False,
) -> Prepared:
    """Run one transaction from prepare to commit on one shard."""
    revision = bank.latest_number() + 1
    prepared = shard.prepare(revision, operations, all_partitions=all_partitions)
    shard.commit(bank.decide(commit_record(bank, revision, prepared)))
    return prepared


def commit_record(bank: Bank, revision: int, prepared: Prepared) -> RevisionRecord:
    """Return the record that commits what was prepared."""
    previous = bank.latest_commit()
    removes = any(change.state_after is not BlockState.ACTIVE for change in prepared.changes)
    return RevisionRecord(
        revision=revision,
        committed=True,
        nonce="",
        previous_sha256="",
        operation="test",
        principal="tester",
        request_id=f"revision-{revision}",
        time_s=0.0,
        manifests={**previous.manifests, **prepared.manifests},
        removal_revision=revision if removes else previous.removal_revision,
    )


State = dict[BlockRef, tuple[int, int, int, dict[Role, bytes]]]
"""Per block: version, state, step, bytes per role (none for a deleted block)."""


def full_state(shard: Shard) -> State:
    """Return everything that a shard knows of its blocks, bytes included."""
    refs = [ref for ref in shard.spec.blocks() if shard.spec.partition_of(ref) in shard.partitions]
    contents = {
        content.ref: {
            Role.WEIGHT: content.weight.tobytes(),
            **{role: array.tobytes() for role, array in content.optimizer_state.items()},
        }
        for content in shard.read(refs)
    }
    return {
        status.ref: (
            status.version,
            int(status.state),
            status.step,
            contents.get(status.ref, {}),
        )
        for status in shard.describe(refs)
    }


def file_bytes(root: Path) -> dict[str, bytes]:
    """Return the content of every file under `root`."""
    found = {}
    # os.walk, unlike rglob, bears with a scratch folder that goes away meanwhile.
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder) / name
            with suppress(FileNotFoundError):
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found
