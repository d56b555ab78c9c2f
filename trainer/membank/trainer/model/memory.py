"""Feed-forward memories: blocks of extra SwiGLU columns, chosen per sequence.

A block of one cluster is an array of shape (layers, 3, r, d). The parts are the gate M1, the up
projection M2 and the down projection M3, the last stored transposed so that one row of each belongs
to the same hidden unit. A layer adds ``M3(SiLU(M1 x) * M2 x)`` for every level of the path. SwiGLU
works unit by unit, so the sum over levels equals one memory whose levels are concatenated along r.

The paper does not say which of M1 and M2 is the gate; here it is M1.

Shape suffixes: B sequences, T tokens, K distinct blocks of a level, L layers, P the three parts,
R block width r, D model width, G groups of sequences that share a path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

NUM_PARTS = 3
GATE, UP, DOWN = range(NUM_PARTS)
NO_BLOCK = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelBlocks:
    """Hold the distinct blocks of one level and say which sequence uses which.

    Raises
    ------
    ValueError
        If a shape is wrong or an index names no block.
    """

    blocks_KLPRD: Tensor
    """(K, L, 3, R, D), floating point, on the device of the anchor. Its gradient is per distinct
    block: the sum over the sequences that use it."""
    index_B: Tensor
    """(B,) int64: the row of ``blocks_KLPRD`` for each sequence, or -1 where the sequence has no
    block at this level (a shorter path, a withheld or a deleted topic)."""

    def __post_init__(self) -> None:
        if self.blocks_KLPRD.dim() != 5 or self.blocks_KLPRD.shape[2] != NUM_PARTS:
            shape = tuple(self.blocks_KLPRD.shape)
            raise ValueError(f"blocks have shape {shape}; it must be (K, layers, 3, r, d)")
        if self.index_B.dim() != 1:
            raise ValueError(f"index has {self.index_B.dim()} dimensions; it must have 1")
        low, high = (int(x) for x in self.index_B.aminmax()) if len(self.index_B) else (0, -1)
        if low < NO_BLOCK or high >= len(self.blocks_KLPRD):
            limit = len(self.blocks_KLPRD) - 1
            raise ValueError(f"index spans {low}..{high}; it must lie in -1..{limit}")


class MemoryOfLayers(Protocol):
    """Memory that the anchor asks for layer by layer, such as a `MemoryBatch`."""

    def layer(self, number: int) -> LayerMemory | None:
        """Return the weights that layer ``number`` adds; None if no sequence has any block.

        May wait for them: they are asked for when the layer is about to be computed.
        """


class MemoryBatch:
    """Hold the fetched memory of a batch: for each level its blocks and who uses them.

    Sequences with the same path are computed together: if the whole batch has one path, or all
    paths occur equally often in runs, the weights are read once per path and not once per sequence.

    Parameters
    ----------
    levels : sequence of LevelBlocks
        Coarsest first. All have the same B, L and D; widths R may differ. Levels in which no
        sequence has a block are left out of the computation.

    Raises
    ------
    ValueError
        If the levels disagree on B, L or D.
    """

    def __init__(self, levels: Sequence[LevelBlocks]) -> None:
        shapes = {
            (len(x.index_B), x.blocks_KLPRD.shape[1], x.blocks_KLPRD.shape[4]) for x in levels
        }
        if len(shapes) > 1:
            raise ValueError(f"levels disagree on (sequences, layers, width): {sorted(shapes)}")
        self.levels = tuple(levels)
        self._active = [x for x in levels if bool((x.index_B != NO_BLOCK).any())]
        # All layers at once: the gradient of a single one, `[:, number]`, is as large as all of them,
        # zeros but for that layer, and as many of these as there are layers would be added up.
        self._layers = [x.blocks_KLPRD.unbind(1) for x in self._active]
        self._paths_GK, self._group_size = _runs([x.index_B for x in self._active])

    def layer(self, number: int) -> LayerMemory | None:
        """Return the weights that layer ``number`` adds, or None if no sequence has any block."""
        if not self._active:
            return None
        parts = [
            _select(layers[number], rows_G)
            for layers, rows_G in zip(self._layers, self._paths_GK.unbind(1), strict=True)
        ]
        weights_GPRD = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return LayerMemory(weights_GPRD=weights_GPRD, group_size=self._group_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerMemory:
    """Hold the memory weights of one layer, the levels joined along r."""

    weights_GPRD: Tensor
    """(G, 3, R, D): gate, up and transposed down projection of each group of sequences."""
    group_size: int
    """Consecutive sequences that share one set of weights; G * group_size = B."""


def add_memory(x_BTD: Tensor, memory: LayerMemory) -> Tensor:
    """Return what the memory adds to the output of a feed-forward network with input ``x_BTD``.

    Parameters
    ----------
    x_BTD : Tensor
        (B, T, D) normalised input of the feed-forward network.
    memory : LayerMemory
        Weights for B sequences.

    Returns
    -------
    Tensor
        (B, T, D); exactly zero for sequences without a block.
    """
    gate_GRD, up_GRD, down_GRD = memory.weights_GPRD.unbind(1)
    if len(gate_GRD) == 1:
        hidden = functional.silu(functional.linear(x_BTD, gate_GRD[0]))
        return (hidden * functional.linear(x_BTD, up_GRD[0])) @ down_GRD[0]
    x_GSD = x_BTD.reshape(len(gate_GRD), -1, x_BTD.shape[2])
    hidden = functional.silu(x_GSD @ gate_GRD.mT) * (x_GSD @ up_GRD.mT)
    return (hidden @ down_GRD).view_as(x_BTD)


def init_block(
    num_layers: int,
    block_width: int,
    width: int,
    *,
    generator: torch.Generator | None = None,
    std: float = 0.02,
) -> Tensor:
    """Return a new block that has no effect until it is trained.

    Parameters
    ----------
    num_layers, block_width, width : int
        L, r and d of the block.
    generator : torch.Generator, optional
        Source of randomness; None is torch's global one.
    std : float
        Standard deviation of the truncated normal of gate and up.

    Returns
    -------
    Tensor
        (L, 3, r, d) float32 on the CPU: gate and up from a normal cut at three deviations, down
        zero.
    """
    block_LPRD = torch.zeros(num_layers, NUM_PARTS, block_width, width)
    nn.init.trunc_normal_(block_LPRD[:, :DOWN], std=std, a=-3 * std, b=3 * std, generator=generator)
    return block_LPRD


def _runs(indices: list[Tensor]) -> tuple[Tensor, int]:
    # Returns the path of each group (one column per level) and the number of sequences per group.
    if not indices:
        return torch.zeros(0, 0, dtype=torch.int64), 1
    paths_BK = torch.stack(indices, dim=1)
    groups_GK, counts_G = torch.unique_consecutive(paths_BK, dim=0, return_counts=True)
    size = int(counts_G[0])
    return (groups_GK, size) if bool((counts_G == size).all()) else (paths_BK, 1)


def _select(blocks_KPRD: Tensor, rows_G: Tensor) -> Tensor:
    if len(blocks_KPRD) == len(rows_G) == 1:
        return blocks_KPRD  # this level is active, so its only row is a block: nothing to gather
    weights_GPRD = blocks_KPRD.index_select(0, rows_G.clamp_min(0))
    if bool((rows_G == NO_BLOCK).any()):
        # A zeroed copy of some block: it adds exactly nothing, and no gradient reaches its source.
        present_G111 = (rows_G != NO_BLOCK)[:, None, None, None]
        weights_GPRD = torch.where(present_G111, weights_GPRD, 0.0)
    return weights_GPRD
