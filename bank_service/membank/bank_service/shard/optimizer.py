"""Optimizers on blocks: torch's fused kernels on the arrays of one block at a time.

The kernels are elementwise and fused, so a result depends neither on the number of threads nor on
which other blocks are updated, and replaying a journal yields the same bits. Weights in bfloat16
or float16 are widened to float32, updated, and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch.optim.adagrad import adagrad
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd
from torch.utils.dlpack import from_dlpack

from membank.bank_service.shard.content import new_array
from membank.wire.spec import Array, BankSpec, OptimizerKind, Role

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""torch's element types by membank's names."""

_FLOAT32 = np.dtype(np.float32)


def kernel_fingerprint() -> str:
    """Return what decides the bits that a kernel yields: torch's version and vector unit."""
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"


class BlockOptimizer:
    """Applies gradients as the bank's spec says.

    Parameters
    ----------
    spec
        Spec of the bank: optimizer, learning rate per level, dtype.
    """

    def __init__(self, spec: BankSpec) -> None:
        self._spec = spec

    def apply(
        self,
        level: int,
        before: Mapping[Role, Array],
        step: int,
        gradient: Array,
        learning_rate_scale: float,
    ) -> dict[Role, Array] | None:
        """Return weight and optimizer state after one gradient; `before` stays as it is.

        Parameters
        ----------
        level
            Level of the block; it decides the learning rate.
        before
            Present weight and optimizer state.
        step
            Gradient steps taken before this one.
        gradient
            (L, P, R, D), C-contiguous, float32, bfloat16 or float16; not retained.
        learning_rate_scale
            Multiplies the level's learning rate.

        Returns
        -------
        dict[Role, Array] or None
            In fresh arrays; None where the result would hold a number that is not finite.
        """
        spec = self._spec
        rate = spec.levels[level - 1].learning_rate * learning_rate_scale
        # Not clones made by torch: its allocator's memory fits nothing else (see `new_array`).
        arrays = {role: _copied(before[role], _FLOAT32) for role in spec.roles}
        weight, *state = map(as_tensor, arrays.values())
        self._step(weight, as_tensor(gradient).to(torch.float32), state, step, rate)
        if spec.numpy_dtype != _FLOAT32:
            arrays[Role.WEIGHT] = _copied(arrays[Role.WEIGHT], spec.numpy_dtype)
        # A gradient that is not finite leaves its mark in the weight or the state, so that
        # looking at the results is enough, and finds overflow too.
        if not all(_is_finite(as_tensor(array)) for array in arrays.values()):
            return None
        return arrays

    def _step(
        self,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: list[torch.Tensor],
        step: int,
        rate: float,
    ) -> None:
        """Update `weight` and `state` in place; all float32 and of one shape."""
        optimizer = self._spec.optimizer
        steps = [torch.tensor(float(step))]
        match optimizer.kind:
            case OptimizerKind.ADAMW:
                adamw(
                    [weight], [gradient], [state[0]], [state[1]], [], steps,
                    fused=True, amsgrad=False, beta1=optimizer.beta1, beta2=optimizer.beta2,
                    lr=rate, weight_decay=optimizer.weight_decay, eps=optimizer.eps,
                    maximize=False,
                )  # fmt: skip
            case OptimizerKind.ADAGRAD:
                adagrad(
                    [weight], [gradient], [state[0]], steps,
                    fused=True, lr=rate, weight_decay=optimizer.weight_decay, lr_decay=0.0,
                    eps=optimizer.eps, maximize=False,
                )  # fmt: skip
            case OptimizerKind.SGD:
                # Momentum from a buffer of zeros is torch's first step, which copies the gradient.
                sgd(
                    [weight], [gradient], [state[0] if state else None],
                    fused=True, weight_decay=optimizer.weight_decay, momentum=optimizer.beta1,
                    lr=rate, dampening=0.0, nesterov=False, maximize=False,
                )  # fmt: skip


def as_tensor(array: Array) -> torch.Tensor:
    """View a block's array as a tensor; no copy. Whoever views a read-only array only reads."""
    # from_numpy would warn of read-only arrays.
    if array.dtype.name == "bfloat16":
        return from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return from_dlpack(array)


def _copied(array: Array, dtype: np.dtype[np.generic]) -> Array:
    """Return `array` in `dtype`, rounded if need be, in memory of its own."""
    copy = new_array(array.shape, dtype)
    as_tensor(copy).copy_(as_tensor(array))
    return copy


def as_array(tensor: torch.Tensor, dtype: np.dtype[np.generic]) -> Array:
    """View a tensor as an array of `dtype`; no copy."""
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(dtype)
    return tensor.numpy()


def convert(array: Array, dtype: np.dtype[np.generic]) -> Array:
    """Return `array` rounded to `dtype`, in a new array unless it has that already."""
    if array.dtype == dtype:
        return array
    return as_array(as_tensor(array).to(TORCH_DTYPES[dtype.name]), dtype)


def _is_finite(tensor: torch.Tensor) -> bool:
    # One pass without a temporary; 15 times faster than isfinite().all().
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())
