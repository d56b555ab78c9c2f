"""What a shard answers of the blocks that it found."""

from __future__ import annotations

import dataclasses

from membank.bank_service.shard.contract import BlockContent, BlockStatus
from membank.bank_service.shard.optimizer import convert
from membank.bank_service.shard.reader import LoadedBlock
from membank.bank_service.store.block_memory import new_memory
from membank.wire.codec import fetch_codec
from membank.wire.crc import crc32c
from membank.wire.format import Entry
from membank.wire.records import Block, BlockHeader
from membank.wire.spec import DTYPES, Array, BlockRef, BlockState, Role, dtype_of


def fetched(
    ref: BlockRef, block: LoadedBlock, dtype: str, *, kept_dtype: str, unchanged: bool
) -> Block:
    """Return a block for a reader: its weight as `dtype`, unless the reader holds this version.

    The weight of an encoding that is no element type of a bank is its payload, (num_bytes,) uint8.
    An unchanged one has the CRC that is known without reading it, in the dtype in which it is kept:
    a version number counts again what a lost machine had counted, and only the CRC tells them apart.
    """
    entry = block.entry
    header = BlockHeader(
        ref=ref,
        version=entry.version,
        state=entry.state,
        dtype=dtype,
        unchanged=unchanged and entry.state is BlockState.ACTIVE,
    )
    if not block.arrays:
        if header.unchanged and dtype == kept_dtype and entry.crcs:
            header = dataclasses.replace(header, crc32c=entry.crcs[0])
        return Block(header=header, weight=None)
    kept = block.arrays[Role.WEIGHT]
    weight = _as_travels(kept, dtype)
    weight.flags.writeable = False
    return Block(
        header=dataclasses.replace(
            header,
            shape=kept.shape,
            num_bytes=weight.nbytes,
            crc32c=block.weight_crc if weight is kept else crc32c(weight),
        ),
        weight=weight,
    )


def _as_travels(weight: Array, dtype: str) -> Array:
    if dtype in DTYPES:
        return convert(weight, dtype_of(dtype))
    # In memory that callers on this machine see: there it is read where it lies.
    return fetch_codec(dtype).encode(weight, new_memory)


def described(ref: BlockRef, entry: Entry) -> BlockStatus:
    """Return what an entry says."""
    return BlockStatus(
        ref=ref,
        version=entry.version,
        state=entry.state,
        step=entry.step,
        crc32c=entry.crcs[0] if entry.crcs else 0,
    )


def exported(ref: BlockRef, block: LoadedBlock) -> BlockContent:
    """Return a block with its optimizer state."""
    state = dict(block.arrays)
    weight = state.pop(Role.WEIGHT)
    return BlockContent(
        ref=ref,
        version=block.entry.version,
        step=block.entry.step,
        weight=weight,
        optimizer_state=state,
    )
