"""Checks of what a caller hands over, made before anything is sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from membank.client.transport.requests import dtype_name
from membank.wire.codec import Encoded, fetch_codec
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import Array, BankSpec, BlockRef


def check_arrays(
    spec: BankSpec, arrays: Mapping[BlockRef, Array | Encoded], *, what: str, max_bytes: int
) -> None:
    """Raise unless each array fits its block.

    A push is refused here as a whole, where its shards would each decide on their part.

    Raises
    ------
    NotFoundError
        If a block is none of the bank.
    InvalidArgumentError
        If a shape or dtype is wrong, or all together have more than `max_bytes`.
    """
    for ref, array in arrays.items():
        spec.check_ref(ref)
        if not isinstance(array, Encoded):
            dtype_name(array)
        expected = spec.block_shape(ref.level)
        if array.shape != expected:
            raise InvalidArgumentError(
                f"{what} of block {ref} has shape {array.shape}; a block of level {ref.level} of "
                f"bank {spec.name} has {expected}",
                reason=Reason.BAD_SHAPE,
                metadata={"block": str(ref), "shape": str(array.shape)},
            )
    total = sum(array.nbytes for array in arrays.values())
    if total > max_bytes:
        raise InvalidArgumentError(
            f"{total} bytes of {what} in one request; at most {max_bytes} are sent: split it",
            reason=Reason.MESSAGE_TOO_LARGE,
            metadata={"num_bytes": str(total), "max_bytes": str(max_bytes)},
        )


def check_answer_bytes(
    spec: BankSpec, refs: Sequence[BlockRef], dtype: str, *, max_bytes: int
) -> None:
    """Raise unless the weights of `refs`, as a fetch in `dtype` gives them, fit into a bound.

    Raises
    ------
    InvalidArgumentError
        If they have more bytes than `max_bytes`, or the dtype is unknown.
    """
    itemsize = fetch_codec(dtype).dtype.itemsize
    total = sum(spec.block_params(ref.level) for ref in refs) * itemsize
    if total > max_bytes:
        raise InvalidArgumentError(
            f"{len(refs)} blocks have {total} bytes, more than max_answer_bytes, {max_bytes}; "
            "fetch fewer at a time",
            reason=Reason.MESSAGE_TOO_LARGE,
            metadata={"num_bytes": str(total), "max_bytes": str(max_bytes)},
        )


def check_bases(arrays: Mapping[BlockRef, object], base: Mapping[BlockRef, int]) -> None:
    """Raise `InvalidArgumentError` unless `base` has a version for each array."""
    missing = [ref for ref in arrays if ref not in base]
    if missing:
        raise InvalidArgumentError(
            f"no base version for block {missing[0]}; give the version that the gradient was "
            "computed on, such as memory.versions",
            metadata={"block": str(missing[0])},
        )


def check_scale(learning_rate_scale: float) -> None:
    """Raise `InvalidArgumentError` unless the scale is finite and not negative."""
    if not 0 <= learning_rate_scale < math.inf:
        raise InvalidArgumentError(
            f"learning_rate_scale is {learning_rate_scale!r}; accepted: finite, >= 0"
        )
