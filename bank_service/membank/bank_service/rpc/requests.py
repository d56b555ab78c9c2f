"""What requests of the data path mean, checked; the same for gRPC and for callers on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from membank.v1 import block_service_pb2 as pb
from membank.wire import convert
from membank.wire.codec import Bytes, Take, fetch_codec, fresh, push_codec
from membank.wire.errors import InvalidArgumentError, NotFoundError, Reason
from membank.wire.framing import Payload
from membank.wire.records import Gradient, Update
from membank.wire.spec import DTYPES, BankSpec, BlockRef

MAX_REFS = 65_536
"""Most blocks that one request may name."""


@dataclass(frozen=True, slots=True)
class FetchCall:
    """A fetch as a shard takes it."""

    refs: tuple[BlockRef, ...]
    """The blocks."""
    held: list[int | None]
    """Version that the caller holds of each."""
    dtype: str | None
    """Element type to return; None = as kept."""
    min_revision: int
    """Revision that the shard must have."""
    snapshot: str
    """Snapshot to read; "" = the present state."""
    expected_bytes: int
    """Bytes of the answer, where what the caller holds is unchanged."""


def check_bank(name: str, spec: BankSpec) -> None:
    """Raise `NotFoundError` unless `name` is empty or the name of the served bank."""
    if name and name != spec.name:
        raise NotFoundError(
            f"bank {name!r} is not served here; this service serves {spec.name!r}",
            reason=Reason.UNKNOWN_BANK,
            metadata={"bank": name, "served": spec.name},
        )


def read_fetch(request: pb.FetchBlocksRequest, spec: BankSpec) -> FetchCall:
    """Decode a fetch.

    Raises
    ------
    NotFoundError
        If it is of another bank, or names a block that there is not.
    InvalidArgumentError
        If it names too many blocks, or is malformed.
    """
    check_bank(request.bank, spec)
    refs = _checked_refs(spec, convert.refs_from_pb(request.refs))
    held = _held_versions(request, len(refs))
    dtype = convert.dtype_from_pb(request.dtype)
    if request.layers_per_part and (dtype or spec.dtype) not in DTYPES:
        raise InvalidArgumentError(
            f"{dtype} is not cut by layers; fetch blocks whole in it, or in an element type",
            reason=Reason.BAD_DTYPE,
        )
    # What the caller holds is likely unchanged; asking for a large cache again must be cheap.
    wanted = [ref for ref, version in zip(refs, held, strict=True) if version is None]
    return FetchCall(
        refs=refs,
        held=held,
        dtype=dtype,
        min_revision=request.min_revision,
        snapshot=request.snapshot,
        expected_bytes=_weight_bytes(spec, wanted, dtype),
    )


def read_push(head: pb.PushUpdatesRequest, spec: BankSpec) -> list[Payload]:
    """Check what a push announces, and return the payload of each gradient.

    Raises
    ------
    NotFoundError
        If it is of another bank, or names a block that there is not.
    InvalidArgumentError
        If it names no block, one twice or too many, or is malformed.
    """
    check_bank(head.bank, spec)
    if not head.request_id:
        raise InvalidArgumentError("a push needs a request id (UUID), so that a retry is harmless")
    scale = head.learning_rate_scale
    if not (math.isfinite(scale) and scale >= 0):
        raise InvalidArgumentError(f"learning_rate_scale is {scale}; accepted: finite and >= 0")
    if not head.headers:
        raise InvalidArgumentError("the push names no block in its first message")
    refs = [convert.ref_from_pb(header.ref) for header in head.headers]
    _checked_refs(spec, tuple(refs))
    if len(set(refs)) != len(refs):
        raise InvalidArgumentError("the push names a block twice; add its gradients first")
    return [_payload(header, spec) for header in head.headers]


def push_bytes(head: pb.PushUpdatesRequest, spec: BankSpec) -> int:
    """Return the bytes that a push needs here: what travels, and what is made of it.

    A payload of a few bytes may stand for a whole block, so that those alone bound nothing.
    """
    return sum(header.num_bytes + _decoded_bytes(header, spec) for header in head.headers)


def update_of(
    head: pb.PushUpdatesRequest, buffers: Sequence[Bytes], spec: BankSpec, take: Take = fresh
) -> Update:
    """Return the update that `read_push` has checked, with gradients of one element per parameter.

    Parameters
    ----------
    head
        The push.
    buffers
        Bytes of each gradient, flat uint8, with the CRC that its header has.
    spec
        Spec of the bank.
    take
        Gives the memory of gradients that are decoded.

    Raises
    ------
    InvalidArgumentError
        If a gradient is none that its encoding can stand for.
    """
    return Update(
        request_id=head.request_id,
        step=head.step,
        gradients=tuple(
            _gradient(header, buffer, spec, take)
            for header, buffer in zip(head.headers, buffers, strict=True)
        ),
        learning_rate_scale=(
            head.learning_rate_scale if head.HasField("learning_rate_scale") else 1.0
        ),
    )


def _checked_refs(spec: BankSpec, refs: tuple[BlockRef, ...]) -> tuple[BlockRef, ...]:
    if len(refs) > MAX_REFS:
        raise InvalidArgumentError(
            f"{len(refs)} blocks in one request; at most {MAX_REFS} are accepted",
            reason=Reason.MESSAGE_TOO_LARGE,
        )
    for ref in refs:
        spec.check_ref(ref)
    return refs


def _held_versions(request: pb.FetchBlocksRequest, count: int) -> list[int | None]:
    held = request.held_version_plus_one
    if not held:
        return [None] * count
    if len(held) != count:
        raise InvalidArgumentError(
            f"held_version_plus_one has {len(held)} entries for {count} refs"
        )
    return [value - 1 if value else None for value in held]


def _weight_bytes(spec: BankSpec, refs: Sequence[BlockRef], dtype: str | None) -> int:
    codec = fetch_codec(dtype or spec.dtype)
    return sum(codec.num_bytes(spec.block_params(ref.level)) for ref in refs)


def _payload(header: pb.UpdateHeader, spec: BankSpec) -> Payload:
    ref = convert.ref_from_pb(header.ref)
    codec = push_codec(_gradient_dtype(header))
    sizes = codec.sizes(spec.block_params(ref.level))
    if header.num_bytes not in sizes:
        takes = f"{sizes[0]}" if len(sizes) == 1 else f"up to {sizes[-1]} in steps of {sizes.step}"
        raise InvalidArgumentError(
            f"gradient of block {ref} has {header.num_bytes} bytes; its shape "
            f"{spec.block_shape(ref.level)} takes {takes} as {codec.name}",
            reason=Reason.BAD_SHAPE,
            metadata={"block": str(ref)},
        )
    return Payload(num_bytes=header.num_bytes, crc32c=header.crc32c, what=f"gradient of {ref}")


def _gradient(header: pb.UpdateHeader, buffer: Bytes, spec: BankSpec, take: Take) -> Gradient:
    name = _gradient_dtype(header)
    return Gradient(
        ref=convert.ref_from_pb(header.ref),
        base_version=header.base_version,
        values=push_codec(name).decode(buffer, spec.block_shape(header.ref.level), take),
        # That of an encoded one says nothing of what is made of it.
        crc32c=header.crc32c if name in DTYPES else None,
    )


def _decoded_bytes(header: pb.UpdateHeader, spec: BankSpec) -> int:
    name = _gradient_dtype(header)
    if name in DTYPES:
        return 0
    return spec.block_params(header.ref.level) * push_codec(name).dtype.itemsize


def _gradient_dtype(header: pb.UpdateHeader) -> str:
    dtype = convert.dtype_from_pb(header.dtype)
    if dtype is None:
        raise InvalidArgumentError("a gradient needs its dtype", reason=Reason.BAD_DTYPE)
    return dtype
