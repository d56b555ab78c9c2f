"""Journal frames of updates: what must be known to apply a push again, and to check that it was.

A payload is ``u32 head length | head (JSON, UTF-8) | arrays``. There are two kinds:

- ``UPDATE`` holds the gradients of the accepted blocks, in the dtype in which they came. It is
  small, and replayed by computing every step again; the CRCs prove that the bits are the same.
- ``IMAGE`` holds what the update made of each block: the arrays of all roles, in their order. It
  is larger, and replayed by any machine, whatever its kernels compute. Journals that another
  machine may have to replay are made of these.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import orjson

from membank.bank_service.store.journal import Checked, Frame, FrameKind
from membank.wire.crc import flat_view
from membank.wire.errors import Reason
from membank.wire.format import NO_SLOT, Entry
from membank.wire.records import Update, UpdateResult
from membank.wire.spec import Array, BankSpec, BlockRef, Role, dtype_of

_U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class AppliedBlock:
    """One block of an update as journalled, or to be journalled."""

    ref: BlockRef
    """The block."""
    after: Entry
    """Its entry after the update; the slot is not meant."""
    gradient: Array | None = None
    """(L, P, R, D), what was applied; None in an ``IMAGE`` frame that was read."""
    gradient_crc: int | None = None
    """CRC-32C of the gradient's bytes, where it is known."""
    arrays: Mapping[Role, Array] | None = None
    """Per role (L, P, R, D) after the update; None in an ``UPDATE`` frame that was read."""


@dataclass(frozen=True, slots=True)
class UpdateFrame:
    """One push to one partition, as journalled."""

    request_id: str
    """Id of the request."""
    learning_rate_scale: float
    """Multiplier of the learning rates."""
    kernel: str
    """Fingerprint of the kernels that were used."""
    results: tuple[UpdateResult, ...]
    """What became of every gradient of the request in this partition."""
    blocks: tuple[AppliedBlock, ...]
    """The accepted ones."""


def encode_update(
    kind: FrameKind,
    update: Update,
    results: Sequence[UpdateResult],
    blocks: Sequence[AppliedBlock],
    kernel: str,
) -> list[bytes | memoryview | Checked]:
    """Return the pieces of a frame's payload; arrays are not copied, and CRCs not computed again.

    Parameters
    ----------
    kind
        ``UPDATE`` or ``IMAGE``: which arrays of `blocks` to write.
    update
        The push.
    results
        What became of every gradient of it in this partition.
    blocks
        The accepted ones, with what `kind` asks for.
    kernel
        Fingerprint of the kernels that were used.
    """
    pieces: list[bytes | memoryview | Checked] = []
    for block in blocks:
        if kind is FrameKind.IMAGE:
            assert block.arrays is not None
            pieces += map(_piece, block.arrays.values(), block.after.crcs)
        else:
            assert block.gradient is not None
            pieces.append(_piece(block.gradient, block.gradient_crc))
    head = {
        "request_id": update.request_id,
        "step": update.step,
        # A number of numpy's is one too, for anybody but orjson.
        "scale": float(update.learning_rate_scale),
        "kernel": kernel,
        "results": [result_to_json(result) for result in results],
        "blocks": [_block_to_json(block) for block in blocks],
    }
    # With the standard library, half the time of a small update's frame goes into this line.
    text = orjson.dumps(head)
    return [_U32.pack(len(text)) + text, *pieces]


def _piece(array: Array, crc: int | None) -> memoryview | Checked:
    data = flat_view(array)
    return data if crc is None else Checked(data, crc)


def decode_update(frame: Frame, spec: BankSpec) -> UpdateFrame:
    """Decode a frame of an update, which the journal has checked."""
    (length,) = _U32.unpack_from(frame.payload)
    start = _U32.size + length
    head = json.loads(bytes(frame.payload[_U32.size : start]))
    data = frame.payload[start:]
    read = _images if frame.kind is FrameKind.IMAGE else _gradients
    return UpdateFrame(
        request_id=head["request_id"],
        learning_rate_scale=head["scale"],
        kernel=head["kernel"],
        results=tuple(result_from_json(item) for item in head["results"]),
        blocks=tuple(read(head["blocks"], data, spec)),
    )


def result_to_json(result: UpdateResult) -> tuple[int, int, bool, int, str]:
    """Return a result as the manifest and the journal hold it."""
    reason = "" if result.reason is None else result.reason.value
    return (*result.ref, result.accepted, result.version, reason)


def result_from_json(item: Sequence[object]) -> UpdateResult:
    """Return what `result_to_json` wrote."""
    level, cluster, accepted, version, reason = item
    return UpdateResult(
        ref=BlockRef(int(str(level)), int(str(cluster))),
        accepted=bool(accepted),
        version=int(str(version)),
        reason=Reason(str(reason)) if reason else None,
    )


def _block_to_json(block: AppliedBlock) -> list[object]:
    after = block.after
    dtype = "" if block.gradient is None else _name_of(block.gradient.dtype)
    return [*block.ref, after.version, after.step, after.updates, dtype, after.crcs]


@cache
def _name_of(dtype: np.dtype[np.generic]) -> str:
    # numpy composes the name anew each time, which takes as long as all the rest of a block.
    return dtype.name


def _block_from_json(item: Sequence[object], spec: BankSpec) -> tuple[AppliedBlock, str]:
    level, cluster, version, step, updates, dtype, crcs = item
    after = Entry(
        slot=NO_SLOT,
        version=int(str(version)),
        step=int(str(step)),
        updates=int(str(updates)),
        crcs=tuple(crcs),  # type: ignore[arg-type]  # from our own JSON
    )
    ref = BlockRef(int(str(level)), int(str(cluster)))
    spec.check_ref(ref)
    return AppliedBlock(ref, after), str(dtype)


def _gradients(
    items: Sequence[Sequence[object]], data: memoryview, spec: BankSpec
) -> Iterator[AppliedBlock]:
    offset = 0
    for item in items:
        block, dtype = _block_from_json(item, spec)
        values = _array(data, offset, dtype_of(dtype), spec.block_shape(block.ref.level))
        offset += values.nbytes
        yield replace(block, gradient=values)


def _images(
    items: Sequence[Sequence[object]], data: memoryview, spec: BankSpec
) -> Iterator[AppliedBlock]:
    offset = 0
    for item in items:
        block, _ = _block_from_json(item, spec)
        arrays: dict[Role, Array] = {}
        for role in spec.roles:
            shape = spec.block_shape(block.ref.level)
            arrays[role] = _array(data, offset, spec.role_dtype(role), shape)
            offset += arrays[role].nbytes
        yield replace(block, arrays=arrays)


def _array(
    data: memoryview, offset: int, dtype: np.dtype[np.generic], shape: tuple[int, ...]
) -> Array:
    count = int(np.prod(shape))
    return np.frombuffer(data, dtype, count=count, offset=offset).reshape(shape)
