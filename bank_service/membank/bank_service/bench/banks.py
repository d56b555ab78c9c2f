"""Banks to measure with, made quickly by the code that makes any bank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from membank.bank_service.shard.content import BlockRecord, Content, content_crcs
from membank.bank_service.shard.partition_store import PartitionStore
from membank.bank_service.store.bank import Bank
from membank.bank_service.store.local_objects import LocalObjects
from membank.bank_service.store.objects import ObjectStore
from membank.wire.crc import crc32c
from membank.wire.format import NO_SLOT, Entry, Manifest
from membank.wire.records import Gradient, Update
from membank.wire.spec import (
    Array,
    BankSpec,
    BlockRef,
    LevelSpec,
    OptimizerKind,
    OptimizerSpec,
    Role,
)

PLAIN_SGD = OptimizerSpec(kind=OptimizerKind.SGD, beta1=0.0)
"""An optimizer without state: a block is one file."""
ADAMW = OptimizerSpec()
"""The default: a block is three files."""


_BATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class BlockSize:
    """Dimensions of blocks; a block holds ``8 * 3 * block_width * width`` float32 numbers."""

    label: str
    """Name in rows."""
    block_width: int
    """R."""
    width: int
    """D."""


BLOCK_16MB = BlockSize("16mb", 256, 680)
"""16,711,680 bytes of weight."""
BLOCK_4MB = BlockSize("4mb", 64, 680)
"""4,177,920 bytes of weight."""
BLOCK_128KB = BlockSize("128kb", 2, 680)
"""130,560 bytes of weight."""
BLOCK_3KB = BlockSize("3kb", 1, 32)
"""3,072 bytes of weight; what a bank of tens of thousands of blocks is quickly made of."""


def flat_spec(
    size: BlockSize, num_blocks: int, *, optimizer: OptimizerSpec, num_partitions: int = 4
) -> BankSpec:
    """Return a bank of one level of `num_blocks` blocks."""
    return BankSpec(
        name="bench",
        num_layers=8,
        width=size.width,
        levels=(LevelSpec(fan_out=num_blocks, block_width=size.block_width),),
        optimizer=optimizer,
        num_partitions=num_partitions,
    )


@dataclass(frozen=True, slots=True)
class WrittenBank:
    """A bank whose blocks are all in slots."""

    bank: Bank
    """The bank."""
    records: dict[BlockRef, BlockRecord]
    """Every block, not resident."""
    stores: dict[int, PartitionStore]
    """Slots and manifests, by partition."""

    def read(self, ref: BlockRef, role: Role = Role.WEIGHT) -> Array:
        """Return one role of a block as a fetch of a block that is not resident does."""
        store = self.stores[self.bank.spec.partition_of(ref)]
        return store.load_content(ref, self.records[ref], (role,)).arrays[role]


def written_bank(where: Path | ObjectStore, spec: BankSpec) -> WrittenBank:
    """Create a bank and write each of its blocks to a slot, as a consolidation would.

    Content and manifests are those that a training would leave; only the syncing of slots, which
    nothing here relies on, is left out.
    """
    bank = Bank.create(_UnsyncedObjects(where) if isinstance(where, Path) else where, spec)
    stores = {number: PartitionStore(bank, number) for number in range(spec.num_partitions)}
    records: dict[BlockRef, BlockRecord] = {}
    entries: dict[int, dict[BlockRef, Entry]] = {number: {} for number in stores}
    rng = np.random.default_rng(0)
    for refs in _batches(spec):
        written: dict[int, dict[BlockRef, BlockRecord]] = {}
        for ref in refs:
            written.setdefault(spec.partition_of(ref), {})[ref] = _written(spec, ref, rng)
        for number, some in written.items():
            for ref, slot in stores[number].write_blocks(some).items():
                entries[number][ref] = replace(some[ref].entry, slot=slot)
                records[ref] = BlockRecord(entries[number][ref])
    for number, store in stores.items():
        store.publish(_manifest(number, entries[number]))
    return WrittenBank(bank, records, stores)


class _UnsyncedObjects(LocalObjects):
    def sync(self, keys: Sequence[str]) -> None:
        # docstring inherited
        del keys


def _batches(spec: BankSpec) -> Iterator[list[BlockRef]]:
    """Yield the blocks, as many at a time as memory takes gladly."""
    count = max(1, _BATCH_BYTES // (spec.weight_bytes(1) + spec.optimizer_bytes(1)))
    blocks = iter(spec.blocks())
    while batch := list(islice(blocks, count)):
        yield batch


def _written(spec: BankSpec, ref: BlockRef, rng: np.random.Generator) -> BlockRecord:
    shape = spec.block_shape(ref.level)
    arrays: dict[Role, Array] = {
        role: rng.standard_normal(shape, np.float32).astype(spec.role_dtype(role), copy=False)
        for role in spec.roles
    }
    crcs = content_crcs(spec, arrays)
    entry = Entry(slot=NO_SLOT, version=1, step=1, updates=1, crcs=crcs)
    return BlockRecord(entry, Content(arrays, crcs[0]))


class Shelf:
    """Banks of small blocks, each made when it is first asked for and shared from then on.

    Parameters
    ----------
    folder
        Where they are made.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._banks: dict[int, Bank] = {}

    def bank(self, num_blocks: int) -> Bank:
        """Return a bank of `num_blocks` blocks of 3 KB, all written."""
        if num_blocks not in self._banks:
            spec = flat_spec(BLOCK_3KB, num_blocks, optimizer=PLAIN_SGD)
            where = self._folder / f"bank-of-{num_blocks}"
            self._banks[num_blocks] = written_bank(where, spec).bank
        return self._banks[num_blocks]


def update_of(request_id: str, ref: BlockRef, base_version: int, values: Array) -> Update:
    """Return a push of one gradient as a server has it, its bytes checked on arrival."""
    gradient = Gradient(ref=ref, base_version=base_version, values=values, crc32c=crc32c(values))
    return Update(request_id=request_id, step=1, gradients=(gradient,))


def _manifest(number: int, entries: dict[BlockRef, Entry]) -> Manifest:
    # Epoch 0: nobody owns the partition yet, so that there is no journal that could be missing.
    return Manifest(
        partition=number, number=0, revision=0, epoch=0, nonce="", lsn=0, entries=entries
    )
