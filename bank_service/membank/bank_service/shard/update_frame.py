"""Journal frames of updates: what must be known to apply a push again, and to check that it was.

A payload is ``u32 head length | head (JSON, UTF-8) | gradients``, the gradients of the accepted
blocks one after the other, in the order of the head and in the dtype in which they came.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from membank.wire.crc import as_uint8
from membank.wire.errors import Reason
from membank.wire.records import Update, UpdateResult
from membank.wire.spec import Array, BankSpec, BlockRef, dtype_of

_U32 = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class AppliedGradient:
    """A gradient that was accepted, as journalled."""

    ref: BlockRef
    """The block."""
    version: int
    """Version after it."""
    crcs: tuple[int, ...]
    """CRC-32C of each role after it."""
    values: Array
    """(L, P, R, D), read-only."""


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
    gradients: tuple[AppliedGradient, ...]
    """The accepted ones."""


def encode_update(
    update: Update,
    results: Sequence[UpdateResult],
    gradients: Sequence[AppliedGradient],
    kernel: str,
) -> list[bytes | memoryview]:
    """Return the pieces of a frame's payload; the gradients are not copied."""
    head = {
        "request_id": update.request_id,
        "step": update.step,
        "scale": update.learning_rate_scale,
        "kernel": kernel,
        "results": [result_to_json(result) for result in results],
        "gradients": [[*g.ref, g.version, g.values.dtype.name, g.crcs] for g in gradients],
    }
    text = json.dumps(head, separators=(",", ":")).encode()
    return [_U32.pack(len(text)), text, *(as_uint8(g.values).data for g in gradients)]


def decode_update(payload: memoryview, spec: BankSpec) -> UpdateFrame:
    """Decode a frame's payload, which the journal has checked."""
    (length,) = _U32.unpack_from(payload)
    start = _U32.size + length
    head = json.loads(bytes(payload[_U32.size : start]))
    return UpdateFrame(
        request_id=head["request_id"],
        learning_rate_scale=head["scale"],
        kernel=head["kernel"],
        results=tuple(result_from_json(item) for item in head["results"]),
        gradients=tuple(_gradients(head["gradients"], payload[start:], spec)),
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


def _gradients(
    items: Sequence[Sequence[object]], data: memoryview, spec: BankSpec
) -> Iterator[AppliedGradient]:
    offset = 0
    for level, cluster, version, dtype_name, crcs in items:
        ref = BlockRef(level, cluster)  # type: ignore[arg-type]  # from our own JSON
        dtype = dtype_of(str(dtype_name))
        shape = spec.block_shape(ref.level)
        count = int(np.prod(shape))
        values = np.frombuffer(data, dtype, count=count, offset=offset).reshape(shape)
        offset += values.nbytes
        yield AppliedGradient(ref, version, tuple(crcs), values)  # type: ignore[arg-type]
