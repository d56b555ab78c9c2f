"""What a shard answers of the blocks that it found."""

from __future__ import annotations

import dataclasses

from membank.bank_service.shard.contract import BlockContent, BlockStatus
from membank.bank_service.shard.optimizer import convert
from membank.bank_service.shard.reader import LoadedBlock
from membank.wire.crc import crc32c
from membank.wire.format import Entry
from membank.wire.records import Block, BlockHeader
from membank.wire.spec import BlockRef, BlockState, Role, dtype_of


def fetched(
    ref: BlockRef, block: LoadedBlock, dtype: str, *, kept_dtype: str, unchanged: bool
) -> Block:
    """Return a block for a reader: its weight in `dtype`, unless the reader holds this version.

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
    weight = convert(block.arrays[Role.WEIGHT], dtype_of(dtype))
    converted = weight is not block.arrays[Role.WEIGHT]
    weight.flags.writeable = False
    return Block(
        header=dataclasses.replace(
            header,
            shape=weight.shape,
            num_bytes=weight.nbytes,
            crc32c=crc32c(weight) if converted else block.weight_crc,
        ),
        weight=weight,
    )


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
