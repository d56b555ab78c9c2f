"""A block in memory: what the table of a partition holds."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from membank.bank_service.store.block_memory import new_memory
from membank.wire.crc import crc32c, zeros_crc32c
from membank.wire.format import NO_SLOT, Entry, initial_weight
from membank.wire.format.slot import TRAILER_BYTES
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState, Role

INITIAL_ENTRY = Entry(slot=NO_SLOT, version=0)
"""Entry of a block that was never changed."""


@dataclass(frozen=True, slots=True)
class Content:
    """Weight and optimizer state of one version of a block; never changed in place."""

    arrays: dict[Role, Array] = field(repr=False)
    """Per role (L, P, R, D); the weight always, the optimizer state or none of it."""
    weight_crc: int
    """CRC-32C of the weight."""

    @property
    def weight(self) -> Array:
        """(L, P, R, D) in the bank's dtype."""
        return self.arrays[Role.WEIGHT]

    @property
    def num_bytes(self) -> int:
        """Bytes in memory."""
        return sum(array.nbytes for array in self.arrays.values())

    def wipe(self) -> None:
        """Overwrite with zeros what no reader holds, and let go of everything.

        A reader that still sends an array keeps it, unchanged, until it is done.
        """
        for role in list(self.arrays):
            array = self.arrays.pop(role)
            # Two references: the variable and the argument. A view would be a third, unless the
            # array is a view itself: numpy lets views of views refer to what is under both.
            is_alone = sys.getrefcount(array) == _OWN_REFERENCES
            below = array.base
            if isinstance(below, np.ndarray):
                is_alone &= sys.getrefcount(below) == _OWN_REFERENCES + 1  # and that of the array
            if is_alone and array.flags.writeable:
                array.fill(0)


_OWN_REFERENCES = 2
_STATE_DTYPE = np.dtype(np.float32)


def new_array(shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> Array:
    """Return an array of any content, to be filled and kept.

    Notes
    -----
    It takes as much memory as a slot that was read, so that each fits exactly where the other was.
    With sizes that differ by a few bytes the holes that evicted blocks leave are not filled again.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    return new_memory(num_bytes + TRAILER_BYTES)[:num_bytes].view(dtype).reshape(shape)


def kept(array: Array) -> Array:
    """Return a copy to keep, in a `new_array`."""
    copy = new_array(array.shape, array.dtype)
    copy[...] = array
    return copy


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What a partition knows of one block."""

    entry: Entry
    """Version, state and, where the content is in a slot, the slot."""
    content: Content | None = None
    """The content, where it is resident."""

    @property
    def is_dirty(self) -> bool:
        """True where the content exists only in memory and in the journal."""
        return self.entry.slot == NO_SLOT and bool(self.entry.crcs)

    @property
    def is_initial(self) -> bool:
        """True where the content is the one derived from the bank's seed."""
        entry = self.entry
        return entry.slot == NO_SLOT and not entry.crcs and entry.state is not BlockState.DELETED


def initial_content(spec: BankSpec, ref: BlockRef) -> Content:
    """Return the content that `ref` has before it is ever written, without optimizer state."""
    weight = kept(initial_weight(spec, ref))
    return Content({Role.WEIGHT: weight}, crc32c(weight))


def zero_state(spec: BankSpec, ref: BlockRef) -> dict[Role, Array]:
    """Return the optimizer state of a block that took no step."""
    shape = spec.block_shape(ref.level)
    return {role: np.zeros(shape, _STATE_DTYPE) for role in spec.optimizer.state_roles}


def content_crcs(spec: BankSpec, arrays: Mapping[Role, Array]) -> tuple[int, ...]:
    """Return the CRC-32C of each role, in the order of the spec's roles.

    Optimizer state that is not there counts as zeros.
    """
    state_bytes = arrays[Role.WEIGHT].size * _STATE_DTYPE.itemsize
    return tuple(
        crc32c(arrays[role]) if role in arrays else zeros_crc32c(state_bytes) for role in spec.roles
    )


def read_only(array: Array) -> Array:
    """Return a read-only view."""
    view = array.view()
    view.flags.writeable = False
    return view
