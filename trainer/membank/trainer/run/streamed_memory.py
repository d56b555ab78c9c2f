"""Memory whose later layers are still on their way while the anchor computes the first ones."""

from __future__ import annotations

import time

import torch

from membank.client import LayeredMemory
from membank.trainer.model import LayerMemory, LevelBlocks, MemoryBatch


class StreamedMemory:
    """The memory of one sequence, as a stream of layers brings it.

    Each layer is waited for when the anchor first comes to it, and kept: a completion runs through
    all layers once per token. The weights are those that a `MemoryBatch` of the whole blocks has,
    bit by bit.

    Parameters
    ----------
    stream : LayeredMemory
        The blocks of its path; must be open until the last layer was asked for.
    """

    def __init__(self, stream: LayeredMemory) -> None:
        self._stream = stream
        self._layers: dict[int, LayerMemory | None] = {}
        self.waited_s = 0.0
        """Seconds that the computation stood still for layers so far."""

    def layer(self, number: int) -> LayerMemory | None:
        """Return the weights that layer ``number`` adds, once they are there; None if there is no block.

        Raises what the stream does where they cannot come.
        """
        if number not in self._layers:
            begin = time.perf_counter()
            blocks = self._stream.layer(number)
            self.waited_s += time.perf_counter() - begin
            levels = [
                LevelBlocks(
                    blocks_KLPRD=torch.tensor(weight_PRD.astype("float32"))[None, None],
                    index_B=torch.zeros(1, dtype=torch.long),
                )
                for weight_PRD in blocks.values()
            ]
            self._layers[number] = MemoryBatch(levels).layer(0)
        return self._layers[number]
