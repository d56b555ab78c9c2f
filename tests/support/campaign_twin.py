"""What a block must be: the optimizer's own code, on a block that nobody kills."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from campaign_bank import SPEC, Image
from membank.bank_service.shard.content import initial_content, zero_state
from membank.bank_service.shard.optimizer import BlockOptimizer
from membank.wire.spec import Array, BlockRef, BlockState, Role
from tiny_bank import gradient_for


class Twin:
    """Applies numbered gradients."""

    def __init__(self) -> None:
        self._optimizer = BlockOptimizer(SPEC)

    def trained(self, ref: BlockRef, image: Image, number: int) -> Image:
        """Return what the gradient of `number` makes of a block."""
        shape = SPEC.block_shape(ref.level)
        arrays = {
            role: np.frombuffer(data, SPEC.role_dtype(role)).reshape(shape)
            for role, data in zip(SPEC.roles, image.arrays, strict=True)
        }
        gradient = gradient_for(SPEC, ref, number)
        after = self._optimizer.apply(ref.level, arrays, image.step, gradient, 1.0)
        assert after is not None
        return Image(state=image.state, step=image.step + 1, arrays=_bytes(after))


def initial_image(ref: BlockRef) -> Image:
    """Return a block that was never changed."""
    arrays = {**initial_content(SPEC, ref).arrays, **zero_state(SPEC, ref)}
    return Image(state=BlockState.ACTIVE, step=0, arrays=_bytes(arrays))


def fresh_image(weight: Array) -> Image:
    """Return a block with content that was swapped in."""
    zeros = bytes(4 * weight.size)
    others = (zeros,) * (len(SPEC.roles) - 1)
    return Image(state=BlockState.ACTIVE, step=0, arrays=(weight.tobytes(), *others))


def in_state(image: Image, state: BlockState) -> Image:
    """Return the same content in another state."""
    return Image(state=state, step=image.step, arrays=image.arrays)


def numbers_in(weight: bytes) -> tuple[float, ...]:
    """Return the distinct numbers in the weight of a block."""
    return tuple(np.unique(np.frombuffer(weight, np.float32)).tolist())


def _bytes(arrays: Mapping[Role, Array]) -> tuple[bytes, ...]:
    return tuple(arrays[role].tobytes() for role in SPEC.roles)
