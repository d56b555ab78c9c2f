"""A listener that notes the layers it hears of, as they are at that moment."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from membank.wire.records import Block
from membank.wire.spec import Array, BlockRef


@dataclass(frozen=True, slots=True)
class Note:
    """What was told once."""

    revision: int
    ref: BlockRef
    version: int
    num_layers: int
    """How many layers are said to be there."""
    layers: Array | None
    """Copy of these."""


class LayerNotes:
    """Hears of layers."""

    def __init__(self) -> None:
        self.notes: list[Note] = []
        self.blocks: dict[BlockRef, Block] = {}
        self.num_restarts = 0

    def restart(self) -> None:
        """Begin anew."""
        self.num_restarts += 1
        self.notes.clear()

    def take(self, revision: int, block: Block, num_layers: int) -> None:
        """Note a block, and check that it is the one that was told of before."""
        known = self.blocks.setdefault(block.ref, block)
        assert block.weight is known.weight
        layers = None if block.weight is None else np.array(block.weight[:num_layers])
        self.notes.append(Note(revision, block.ref, block.version, num_layers, layers))

    def counts(self, ref: BlockRef) -> list[int]:
        """Return how many layers of a block were there, each time it was told of."""
        return [note.num_layers for note in self.notes if note.ref == ref]
