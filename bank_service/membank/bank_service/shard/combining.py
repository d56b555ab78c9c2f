"""New content of a block, computed from what it holds and from another block."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from membank.bank_service.shard.content import new_array
from membank.bank_service.shard.contract import Combine
from membank.bank_service.shard.optimizer import is_finite
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import Array, BankSpec

_Float32 = npt.NDArray[np.float32]


def combined_weight(spec: BankSpec, operation: Combine, own_weight: Callable[[], Array]) -> Array:
    """Return ``keep * own + add * other`` in the bank's dtype.

    Parameters
    ----------
    spec
        Spec of the bank.
    operation
        What to compute.
    own_weight
        Returns the block's own (L, P, R, D) in the bank's dtype; called where `keep` is not 0.

    Returns
    -------
    Array
        (L, P, R, D) in the bank's dtype, to be kept. It is computed in float32, one rounding for each
        product and for the sum, and rounded once to the bank's dtype; a copy, ``(0, 1)``, is exact,
        signs of zeros included.

    Raises
    ------
    InvalidArgumentError
        If a number of it is not finite (NOT_FINITE).
    """
    result = new_array(spec.block_shape(operation.ref.level), spec.numpy_dtype)
    # What overflows is found below, in the bank's dtype.
    with np.errstate(over="ignore", invalid="ignore"):
        result[...] = _sum(operation, own_weight)
    if not is_finite(result):
        raise InvalidArgumentError(
            f"block {operation.ref}: {operation.keep:g} times its content plus {operation.add:g} "
            f"times the other's is not finite in {spec.dtype}; take smaller factors",
            reason=Reason.NOT_FINITE,
            metadata={"block": str(operation.ref)},
        )
    return result


def _sum(operation: Combine, own_weight: Callable[[], Array]) -> _Float32 | float:
    terms: list[_Float32] = []
    if operation.keep:
        terms.append(_times(operation.keep, own_weight()))
    if operation.add and operation.other is not None:
        terms.append(_times(operation.add, operation.other))
    if not terms:
        return 0.0
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def _times(factor: float, weight: Array) -> _Float32:
    return weight.astype(np.float32, copy=False) * np.float32(factor)
