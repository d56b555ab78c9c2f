"""Optimizers on blocks: torch's fused kernels, tile by tile, on the arrays of one block at a time.

The kernels are elementwise and fused, so a result depends neither on the number of threads, nor on
the tiles, nor on which other blocks are updated, and replaying a journal yields the same bits.
Weights in bfloat16 or float16 are widened to float32, updated, and rounded once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from membank.bank_service.shard.content import new_array
from membank.wire.crc import crc32c, flat_view, join_crc32c
from membank.wire.spec import Array, BankSpec, OptimizerKind, OptimizerSpec, Role

TORCH_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""torch's element types by membank's names."""

TILE = 1 << 18
"""Elements that are copied, updated, looked through and checksummed before the next ones are.

What a tile touches, seven arrays of a megabyte at most, stays in the processor's cache from
the first pass to the last; one pass after the other over a whole block fetches it from memory each
time. Smaller tiles spend more in the calls than they gain. A multiple of every vector's length, so
that the kernels' loops for vectors and for the rest meet the same elements with and without tiles.
"""

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

    def begin(
        self,
        level: int,
        before: Mapping[Role, Array],
        step: int,
        gradient: Array,
        learning_rate_scale: float,
    ) -> BlockStep:
        """Return the step that `gradient` makes, of which nothing is done yet.

        Parameters
        ----------
        level
            Level of the block; it decides the learning rate.
        before
            Present weight and optimizer state, (L, P, R, D) each; never written to.
        step
            Gradient steps taken before this one.
        gradient
            (L, P, R, D), C-contiguous, float32, bfloat16 or float16; needed until the step is done.
        learning_rate_scale
            Multiplies the level's learning rate.
        """
        spec = self._spec
        rate = spec.levels[level - 1].learning_rate * learning_rate_scale
        arrays = {role: new_array(before[role].shape, spec.role_dtype(role)) for role in spec.roles}
        return BlockStep(
            arrays,
            [before[role] for role in spec.roles],
            gradient,
            _Kernel(spec.optimizer, step, rate),
        )

    def apply(
        self,
        level: int,
        before: Mapping[Role, Array],
        step: int,
        gradient: Array,
        learning_rate_scale: float,
    ) -> dict[Role, Array] | None:
        """Do at once the step that `begin` returns, and return the arrays; None: see `BlockStep`."""
        begun = self.begin(level, before, step, gradient, learning_rate_scale)
        for tile in range(begun.num_tiles):
            begun.run(tile)
        return begun.arrays if begun.is_finite else None


class BlockStep:
    """One gradient step on one block: as many tiles, which any threads may do, each one once.

    Parameters
    ----------
    arrays
        (L, P, R, D) per role, the weight first: where the result goes, in memory of its own.
    before
        What they hold before the step, in the same order.
    gradient
        (L, P, R, D), float32, bfloat16 or float16.
    kernel
        Updates elements.
    """

    def __init__(
        self,
        arrays: dict[Role, Array],
        before: Sequence[Array],
        gradient: Array,
        kernel: _Kernel,
    ) -> None:
        self.arrays = arrays
        """(L, P, R, D) per role after the step; of no use before every tile is done."""
        self.is_finite = True
        """False as soon as a number of the result is found to be none, or infinite."""
        self._kernel = kernel
        # Tiles are taken from lists made here: to slice a tensor costs as much as to sum a tile.
        self._before = [_tiles(array) for array in before]
        self._after = [_tiles(array) for array in arrays.values()]
        self._gradient = _tiles(gradient)
        self._bytes = [(flat_view(array), TILE * array.itemsize) for array in arrays.values()]
        self._crcs: list[tuple[int, ...]] = [()] * self.num_tiles

    @property
    def num_tiles(self) -> int:
        """How many tiles it has."""
        return len(self._gradient)

    def run(self, tile: int) -> None:
        """Do one tile."""
        if not self.is_finite:
            return  # nobody needs the rest
        before = [tiles[tile] for tiles in self._before]
        after = [tiles[tile] for tiles in self._after]
        weight, *state = after
        wide = weight if weight.dtype is torch.float32 else _SCRATCH.weight(weight)
        torch._foreach_copy_([wide, *state], before)
        self._kernel.update(wide, _SCRATCH.widened(self._gradient[tile]), state)
        if wide is not weight:
            weight.copy_(wide)
        # A gradient that is not finite leaves its mark in the weight or the state, so that
        # looking at the results is enough, and finds overflow too.
        if not all(map(_is_finite, after)):
            self.is_finite = False
            return
        self._crcs[tile] = tuple(
            crc32c(data[tile * size : (tile + 1) * size]) for data, size in self._bytes
        )

    def crcs(self) -> tuple[int, ...]:
        """Return the CRC-32C of each array, once every tile is done and all is finite."""
        joined = []
        for index, (data, size) in enumerate(self._bytes):
            crc = self._crcs[0][index]
            for tile in range(1, self.num_tiles):
                part = data[tile * size : (tile + 1) * size]
                crc = join_crc32c(crc, part, self._crcs[tile][index])
            joined.append(crc)
        return tuple(joined)


class _Kernel:
    """Updates elements in place, whichever they are.

    Parameters
    ----------
    optimizer
        The optimizer.
    step
        Gradient steps taken before this one.
    rate
        Learning rate.
    """

    # What torch's functional optimizers call in the end. To get there takes them longer than the
    # kernel needs for a small block, all of it with the interpreter's lock held; torch's version
    # is pinned, as replaying a journal needs that anyway.

    def __init__(self, optimizer: OptimizerSpec, step: int, rate: float) -> None:
        self._optimizer = optimizer
        self._rate = rate
        self._steps = [_after_steps(step)]

    def update(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: Sequence[torch.Tensor]
    ) -> None:
        """Update `weight` and `state`; all float32 and of one shape."""
        optimizer = self._optimizer
        match optimizer.kind:
            case OptimizerKind.ADAMW:
                torch._fused_adamw_(
                    [weight], [gradient], [state[0]], [state[1]], [], self._steps,
                    lr=self._rate, beta1=optimizer.beta1, beta2=optimizer.beta2,
                    weight_decay=optimizer.weight_decay, eps=optimizer.eps,
                    amsgrad=False, maximize=False,
                )  # fmt: skip
            case OptimizerKind.ADAGRAD:
                torch._fused_adagrad_(
                    [weight], [gradient], [state[0]], self._steps,
                    lr=self._rate, lr_decay=0.0, weight_decay=optimizer.weight_decay,
                    eps=optimizer.eps, maximize=False,
                )  # fmt: skip
            case OptimizerKind.SGD:
                # Momentum from a buffer of zeros is torch's first step, which copies the gradient.
                torch._fused_sgd_(
                    [weight], [gradient], list(state),
                    weight_decay=optimizer.weight_decay, momentum=optimizer.beta1, lr=self._rate,
                    dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
                )  # fmt: skip


@lru_cache(maxsize=256)
def _after_steps(step: int) -> torch.Tensor:
    """Return the count of steps after `step` of them; kernels only read it."""
    # By float32 arithmetic, as torch's optimizers count.
    return torch.tensor(float(step), dtype=torch.float32, device="cpu") + 1


class _Scratch(threading.local):
    """A thread's own memory for one tile in float32, used again and again."""

    def __init__(self) -> None:
        self._weight = _wide(0)
        self._gradient = _wide(0)

    def weight(self, like: torch.Tensor) -> torch.Tensor:
        """Return as many elements as `like` has, of any content."""
        if len(self._weight) < len(like):
            self._weight = _wide(len(like))
        return self._weight[: len(like)]

    def widened(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return `gradient` in float32."""
        if gradient.dtype is torch.float32:
            return gradient
        if len(self._gradient) < len(gradient):
            self._gradient = _wide(len(gradient))
        return self._gradient[: len(gradient)].copy_(gradient)


def _wide(count: int) -> torch.Tensor:
    # Said in full: the program around a shard may have made others torch's defaults.
    return torch.empty(count, dtype=torch.float32, device="cpu")


_SCRATCH = _Scratch()


def _tiles(array: Array) -> Sequence[torch.Tensor]:
    flat = as_tensor(array.reshape(-1))  # by numpy: torch takes ten times as long to view it
    # Most blocks of most banks are one tile, and to split nothing takes a while too.
    return [flat] if array.size <= TILE else flat.split(TILE)


def as_tensor(array: Array) -> torch.Tensor:
    """View a block's array as a tensor; no copy. Whoever views a read-only array only reads."""
    # from_numpy would warn of read-only arrays.
    # The dtype's name is composed anew each time, and views are made of one block after the other.
    if array.dtype != _FLOAT32 and array.dtype.name == "bfloat16":
        return from_dlpack(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array) if array.flags.writeable else from_dlpack(array)


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


def is_finite(array: Array) -> bool:
    """Say whether every number of a block's array is finite; looks without a copy."""
    return _is_finite(as_tensor(array.reshape(-1)))


def _is_finite(tensor: torch.Tensor) -> bool:
    # No sum of a number that is infinite, or none, is finite again, and to add is what a processor
    # does fastest. A sum may also overflow, or its type be too narrow: then each has to be looked at.
    if tensor.dtype is torch.float32 and math.isfinite(tensor.sum().item()):
        return True
    # One pass without a temporary; 15 times faster than isfinite().all().
    low, high = torch.aminmax(tensor)
    return math.isfinite(low.item()) and math.isfinite(high.item())
