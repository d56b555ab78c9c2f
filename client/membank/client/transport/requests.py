"""What the data path's calls say, whichever way they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from membank.client.transport.contract import PushAnswer
from membank.v1 import block_service_pb2 as block_pb
from membank.wire.codec import Encoded, push_codec
from membank.wire.convert import dtype_to_pb, ref_to_pb, result_from_pb
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.records import Gradient, Update
from membank.wire.spec import DTYPES, Array, BlockRef


def fetch_request(
    refs: Sequence[BlockRef],
    *,
    bank: str,
    held_versions: Sequence[int | None] | None,
    dtype: str | None,
    min_revision: int,
    snapshot: str,
    layers_per_part: int = 0,
) -> block_pb.FetchBlocksRequest:
    """Return the request of a fetch; the arguments are those of `BlockTransport.fetch`.

    `layers_per_part` = 0 asks for whole blocks.
    """
    held = [0 if version is None else version + 1 for version in held_versions or ()]
    return block_pb.FetchBlocksRequest(
        bank=bank,
        refs=map(ref_to_pb, refs),
        held_version_plus_one=held,
        dtype=dtype_to_pb(dtype),
        min_revision=min_revision,
        snapshot=snapshot,
        layers_per_part=layers_per_part,
    )


def push_head(update: Update, crcs: Sequence[int], *, bank: str) -> block_pb.PushUpdatesRequest:
    """Return the first message of a push, without data.

    Parameters
    ----------
    update
        The push.
    crcs
        CRC-32C of each of its gradients.
    bank
        Name of the bank; "" = the one that is served.
    """
    headers = [
        block_pb.UpdateHeader(
            ref=ref_to_pb(gradient.ref),
            base_version=gradient.base_version,
            dtype=dtype_to_pb(gradient.encoding or dtype_name(gradient.values)),
            num_bytes=gradient.values.nbytes,
            crc32c=crc,
        )
        for gradient, crc in zip(update.gradients, crcs, strict=True)
    ]
    return block_pb.PushUpdatesRequest(
        bank=bank,
        request_id=update.request_id,
        step=update.step,
        learning_rate_scale=update.learning_rate_scale,
        mode=block_pb.UPDATE_MODE_ASYNC,
        headers=headers,
    )


def push_answer(response: block_pb.PushUpdatesResponse) -> PushAnswer:
    """Return what a shard answers to a push."""
    return PushAnswer(
        results=tuple(map(result_from_pb, response.results)), duplicate=response.duplicate
    )


def gradient_to_send(ref: BlockRef, base_version: int, values: Array | Encoded) -> Gradient:
    """Return a gradient as a push takes it.

    Parameters
    ----------
    ref
        The block.
    base_version
        Version that it was computed on.
    values
        (L, P, R, D), or that encoded.
    """
    if isinstance(values, Encoded):
        return Gradient(
            ref=ref, base_version=base_version, values=values.payload, encoding=values.codec
        )
    return Gradient(ref=ref, base_version=base_version, values=values)


def encoded(gradients: Mapping[BlockRef, Array | Encoded], wire: str) -> dict[BlockRef, Encoded]:
    """Return gradients in the encoding `wire`; those that are in one already stay as they are.

    Raises
    ------
    InvalidArgumentError
        If there is no such encoding (BAD_DTYPE).
    """
    codec = push_codec(wire)
    return {
        ref: values
        if isinstance(values, Encoded)
        else Encoded(wire, codec.encode(np.ascontiguousarray(values)), values.shape)
        for ref, values in gradients.items()
    }


def dtype_name(array: Array) -> str:
    """Return membank's name of the element type of `array`.

    Raises
    ------
    InvalidArgumentError
        If membank has no such element type.
    """
    for name, dtype in DTYPES.items():
        if array.dtype == dtype:
            return name
    raise InvalidArgumentError(
        f"dtype {array.dtype} does not travel; use one of {', '.join(DTYPES)}",
        reason=Reason.BAD_DTYPE,
        metadata={"dtype": str(array.dtype)},
    )
