"""Initial content of blocks: derived from the seed, so that a bank of any size is created at once.

A block that was never written has version 0 and no slot. Its gate and up parts are truncated
normal, its down part is zero (as in the paper, section 2.2), so that it changes nothing until it
is trained.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from membank.wire.spec import Array, BankSpec, BlockRef

# Acklam's rational approximation of the inverse normal CDF, central region only (relative error
# below 1.2e-9). It needs nothing but + * /, so every IEEE machine yields the same bits; the tails
# would need log and sqrt. The region's edge is therefore where the normal is truncated.
_A = (-3.969683028665376e01, 2.209460984245205e02, -2.759285104469687e02,
      1.383577518672690e02, -3.066479806614716e01, 2.506628277459239e00)  # fmt: skip
_B = (-5.447609879822406e01, 1.615858368580409e02, -1.556989798598866e02,
      6.680131188771972e01, -1.328068155288572e01)  # fmt: skip
_LOW = 0.02425

TRUNCATION = 1.9733
"""Largest magnitude of an initial element, in units of ``init_std``."""


def initial_weight(spec: BankSpec, ref: BlockRef) -> Array:
    """Return the content of `ref` at version 0.

    Parameters
    ----------
    spec
        Spec of the bank; seed and standard deviation are taken from it.
    ref
        A block of the bank.

    Returns
    -------
    Array
        (L, P, R, D) in the bank's dtype, newly allocated. Elements of gate and up parts are
        normal with standard deviation ``init_std`` before truncation at `TRUNCATION` of them.
    """
    shape_LPRD = spec.block_shape(ref.level)
    num_layers, num_parts, block_width, width = shape_LPRD
    weight_LPRD = np.zeros(shape_LPRD, np.float32)
    count = num_layers * (num_parts - 1) * block_width * width
    normal = _truncated_normal(_uniform(spec.init_seed, ref, count)) * spec.init_std
    weight_LPRD[:, :-1] = normal.astype(np.float32).reshape(num_layers, -1, block_width, width)
    return weight_LPRD.astype(spec.numpy_dtype, copy=False)


def _uniform(seed: int, ref: BlockRef, count: int) -> npt.NDArray[np.float64]:
    """Return `count` numbers in (0, 1), a pure function of seed and block."""
    # numpy keeps the raw streams of its bit generators stable (NEP 19), not its distributions.
    key = (seed << 64) | (ref.level << 56) | ref.cluster
    raw = np.random.Philox(key=key).random_raw(count)
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _truncated_normal(uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Map (0, 1) to the standard normal truncated to the central region of the approximation."""
    q = (uniform - 0.5) * (1 - 2 * _LOW)
    r = q * q
    return q * _horner(_A, r) / _horner((*_B, 1.0), r)


def _horner(coefficients: tuple[float, ...], x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total = np.zeros_like(x)
    for coefficient in coefficients:
        total = total * x + coefficient
    return total
