"""Mappings of blocks and of what is known of a bank."""

from __future__ import annotations

from collections.abc import Iterable

from membank.v1 import block_service_pb2 as block_pb
from membank.v1 import types_pb2 as types_pb
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.records import (
    BankInfo,
    BlockEvent,
    BlockHeader,
    PartitionOwner,
    Placement,
    UpdateResult,
)
from membank.wire.spec import (
    BankSpec,
    BlockRef,
    BlockState,
    Durability,
    LevelSpec,
    OptimizerSpec,
)

_DTYPE_TO_PB = {
    "float32": types_pb.DATA_TYPE_FLOAT32,
    "bfloat16": types_pb.DATA_TYPE_BFLOAT16,
    "float16": types_pb.DATA_TYPE_FLOAT16,
    # No elements of a bank: what travels so is decoded first (membank.wire.codec).
    "int8": types_pb.DATA_TYPE_INT8,
    "sparse": types_pb.DATA_TYPE_SPARSE,
}
_DTYPE_FROM_PB = {value: name for name, value in _DTYPE_TO_PB.items()}


def dtype_to_pb(name: str | None) -> types_pb.DataType.ValueType:
    """Encode an element type; None = unspecified."""
    return types_pb.DATA_TYPE_UNSPECIFIED if name is None else _DTYPE_TO_PB[name]


def dtype_from_pb(value: types_pb.DataType.ValueType) -> str | None:
    """Decode an element type; None = unspecified.

    Raises
    ------
    InvalidArgumentError
        If it is none that this side knows.
    """
    if value == types_pb.DATA_TYPE_UNSPECIFIED:
        return None
    try:
        return _DTYPE_FROM_PB[value]
    except KeyError:
        raise InvalidArgumentError(
            f"element type {value} is not known here", reason=Reason.BAD_DTYPE
        ) from None


def ref_to_pb(ref: BlockRef) -> types_pb.BlockRef:
    """Encode a block reference."""
    return types_pb.BlockRef(level=ref.level, cluster=ref.cluster)


def ref_from_pb(message: types_pb.BlockRef) -> BlockRef:
    """Decode a block reference."""
    return BlockRef(message.level, message.cluster)


def state_from_pb(value: types_pb.BlockState.ValueType) -> BlockState:
    """Decode a state; the numbers are the same on purpose."""
    return BlockState(value)


def state_to_pb(state: BlockState) -> types_pb.BlockState.ValueType:
    """Encode a state."""
    return types_pb.BlockState.ValueType(state)


def spec_to_pb(spec: BankSpec) -> types_pb.BankSpec:
    """Encode a bank's spec."""
    optimizer = types_pb.OptimizerSpec(
        kind=spec.optimizer.kind.value,
        beta1=spec.optimizer.beta1,
        beta2=spec.optimizer.beta2,
        eps=spec.optimizer.eps,
        weight_decay=spec.optimizer.weight_decay,
    )
    levels = [
        types_pb.LevelSpec(
            fan_out=level.fan_out,
            block_width=level.block_width,
            learning_rate=level.learning_rate,
        )
        for level in spec.levels
    ]
    return types_pb.BankSpec(
        name=spec.name,
        bank_id=spec.bank_id,
        num_layers=spec.num_layers,
        width=spec.width,
        levels=levels,
        dtype=dtype_to_pb(spec.dtype),
        optimizer=optimizer,
        num_partitions=spec.num_partitions,
        partition_level=spec.partition_level,
        init_seed=spec.init_seed,
        init_std=spec.init_std,
        max_staleness=spec.max_staleness,
        fingerprint=spec.fingerprint,
    )


def spec_from_pb(message: types_pb.BankSpec) -> BankSpec:
    """Decode a bank's spec.

    Raises
    ------
    InvalidArgumentError
        If a field is out of range.
    """
    return BankSpec(
        name=message.name,
        bank_id=message.bank_id,
        num_layers=message.num_layers,
        width=message.width,
        levels=tuple(
            LevelSpec(
                fan_out=level.fan_out,
                block_width=level.block_width,
                learning_rate=level.learning_rate,
            )
            for level in message.levels
        ),
        dtype=dtype_from_pb(message.dtype) or "float32",
        optimizer=OptimizerSpec(
            kind=message.optimizer.kind,  # type: ignore[arg-type]  # checked by OptimizerSpec
            beta1=message.optimizer.beta1,
            beta2=message.optimizer.beta2,
            eps=message.optimizer.eps,
            weight_decay=message.optimizer.weight_decay,
        ),
        num_partitions=message.num_partitions,
        partition_level=message.partition_level,
        init_seed=message.init_seed,
        init_std=message.init_std,
        max_staleness=message.max_staleness,
        fingerprint=message.fingerprint,
    )


def header_to_pb(header: BlockHeader) -> types_pb.BlockHeader:
    """Encode the header of a block."""
    return types_pb.BlockHeader(
        ref=ref_to_pb(header.ref),
        version=header.version,
        state=state_to_pb(header.state),
        dtype=dtype_to_pb(header.dtype),
        shape=header.shape,
        num_bytes=header.num_bytes,
        crc32c=header.crc32c,
        unchanged=header.unchanged,
        first_layer=header.first_layer,
        num_layers=header.num_layers,
    )


def header_from_pb(message: types_pb.BlockHeader) -> BlockHeader:
    """Decode the header of a block."""
    return BlockHeader(
        ref=ref_from_pb(message.ref),
        version=message.version,
        state=state_from_pb(message.state),
        dtype=dtype_from_pb(message.dtype) or "float32",
        shape=tuple(message.shape),
        num_bytes=message.num_bytes,
        crc32c=message.crc32c,
        unchanged=message.unchanged,
        first_layer=message.first_layer,
        num_layers=message.num_layers,
    )


def placement_to_pb(placement: Placement) -> types_pb.Placement:
    """Encode a placement."""
    return types_pb.Placement(
        generation=placement.generation,
        owners=[
            types_pb.PartitionOwner(
                partition=owner.partition, shard_id=owner.shard_id, endpoint=owner.endpoint
            )
            for owner in placement.owners
        ],
    )


def placement_from_pb(message: types_pb.Placement) -> Placement:
    """Decode a placement."""
    return Placement(
        generation=message.generation,
        owners=tuple(
            PartitionOwner(
                partition=owner.partition, shard_id=owner.shard_id, endpoint=owner.endpoint
            )
            for owner in message.owners
        ),
    )


_DURABILITY_TO_PB = {
    Durability.PROCESS: types_pb.DURABILITY_PROCESS,
    Durability.HOST: types_pb.DURABILITY_HOST,
    Durability.STORE: types_pb.DURABILITY_STORE,
}
_DURABILITY_FROM_PB = {number: kind for kind, number in _DURABILITY_TO_PB.items()}


def info_to_pb(info: BankInfo) -> block_pb.GetBankResponse:
    """Encode a bank's description."""
    return block_pb.GetBankResponse(
        spec=spec_to_pb(info.spec),
        revision=info.revision,
        placement=placement_to_pb(info.placement),
        server_version=info.server_version,
        tree_revision=info.tree_revision,
        removal_revision=info.removal_revision,
        durability=_DURABILITY_TO_PB[info.durability],
        ship_every_s=info.ship_every_s,
    )


def info_from_pb(message: block_pb.GetBankResponse) -> BankInfo:
    """Decode a bank's description."""
    return BankInfo(
        spec=spec_from_pb(message.spec),
        revision=message.revision,
        placement=placement_from_pb(message.placement),
        tree_revision=message.tree_revision,
        removal_revision=message.removal_revision,
        server_version=message.server_version,
        # An older server promises the least.
        durability=_DURABILITY_FROM_PB.get(message.durability, Durability.PROCESS),
        ship_every_s=message.ship_every_s,
    )


def result_to_pb(result: UpdateResult) -> block_pb.UpdateResult:
    """Encode what became of a gradient."""
    return block_pb.UpdateResult(
        ref=ref_to_pb(result.ref),
        accepted=result.accepted,
        version=result.version,
        reason="" if result.reason is None else result.reason.value,
    )


def result_from_pb(message: block_pb.UpdateResult) -> UpdateResult:
    """Decode what became of a gradient."""
    return UpdateResult(
        ref=ref_from_pb(message.ref),
        accepted=message.accepted,
        version=message.version,
        reason=reason_from_text(message.reason),
    )


def reason_from_text(text: str) -> Reason | None:
    """Decode a reason; None for "", UNEXPECTED for one that only a newer peer knows."""
    if not text:
        return None
    return Reason(text) if text in Reason.__members__ else Reason.UNEXPECTED


def event_to_pb(event: BlockEvent) -> block_pb.BlockEvent:
    """Encode a change of a block."""
    return block_pb.BlockEvent(
        ref=ref_to_pb(event.ref),
        version=event.version,
        state=state_to_pb(event.state),
        revision=event.revision,
    )


def event_from_pb(message: block_pb.BlockEvent) -> BlockEvent:
    """Decode a change of a block."""
    return BlockEvent(
        ref=ref_from_pb(message.ref),
        version=message.version,
        state=state_from_pb(message.state),
        revision=message.revision,
    )


def refs_from_pb(messages: Iterable[types_pb.BlockRef]) -> tuple[BlockRef, ...]:
    """Decode many block references."""
    return tuple(ref_from_pb(message) for message in messages)
