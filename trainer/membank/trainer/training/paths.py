"""From the paths of a batch to the memory that the anchor takes, and back to gradients per block.

Shape suffixes: B sequences, K distinct blocks of a level, L layers, P parts, R block width, D
model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from membank.trainer.model import NO_BLOCK, LevelBlocks, MemoryBatch
from membank.trainer.training.source import Fetched
from membank.wire.spec import BankSpec, BlockRef, Path


def leaf_path(spec: BankSpec, leaf: int) -> Path:
    """Return the path from level 1 to cluster `leaf` of the last level.

    A bank with one leaf, such as a generic memory, gives the same path for every `leaf`.
    """
    one_leaf = spec.num_clusters(spec.num_levels) == 1
    return spec.path_to(BlockRef(spec.num_levels, 0 if one_leaf else leaf))


def distinct_blocks(paths: Iterable[Path]) -> tuple[BlockRef, ...]:
    """Return every block of some paths once, by level, then by cluster."""
    return tuple(sorted({ref for path in paths for ref in path}))


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchMemory:
    """The memory of one batch, with the names of its distinct blocks."""

    memory: MemoryBatch
    """What the anchor takes."""
    refs: tuple[tuple[BlockRef, ...], ...]
    """Per level, the block in each row of ``blocks``."""
    blocks: tuple[Tensor, ...]
    """Per level, (K, L, P, R, D) float32: copies, each distinct block once. Leaves of autograd
    where the memory is trained."""

    def gradients(self) -> dict[BlockRef, Tensor]:
        """Return the gradient of each distinct block, (L, P, R, D) on the CPU.

        A block that several sequences share has the sum over them: autograd accumulates it where
        the block is gathered per sequence.
        """
        return {
            ref: gradient
            for refs, blocks in zip(self.refs, self.blocks, strict=True)
            if blocks.grad is not None
            for ref, gradient in zip(refs, blocks.grad.cpu(), strict=True)
        }


def join(
    spec: BankSpec,
    paths: Sequence[Path],
    fetched: Fetched,
    *,
    trained: bool = False,
    device: torch.device | None = None,
) -> BatchMemory:
    """Put fetched blocks together for a batch.

    Parameters
    ----------
    spec
        What the bank is.
    paths
        Path of each of the B sequences; may be shorter than the bank has levels, or empty.
    fetched
        Every block of the paths. A path ends at its first absent block: nothing is rerouted.
    trained
        True where gradients are wanted.
    device
        Where the anchor is; None is the CPU.

    Returns
    -------
    BatchMemory
        Memory with copies of the blocks.
    """
    usable = [_until_absent(path, fetched) for path in paths]
    levels: list[LevelBlocks] = []
    refs_of_level: list[tuple[BlockRef, ...]] = []
    for number in range(1, spec.num_levels + 1):
        used_B = [path[number - 1] if len(path) >= number else None for path in usable]
        refs = tuple(sorted({ref for ref in used_B if ref is not None}))
        row_of = {ref: row for row, ref in enumerate(refs)}
        index_B = [NO_BLOCK if ref is None else row_of[ref] for ref in used_B]
        if refs:
            blocks_KLPRD = torch.stack([fetched.weights[ref] for ref in refs])
        else:
            blocks_KLPRD = torch.zeros(0, *spec.block_shape(number))
        blocks_KLPRD.requires_grad_(trained)
        levels.append(
            LevelBlocks(blocks_KLPRD=blocks_KLPRD, index_B=torch.tensor(index_B, dtype=torch.int64))
        )
        refs_of_level.append(refs)
    return BatchMemory(
        memory=MemoryBatch(levels),
        refs=tuple(refs_of_level),
        blocks=tuple(level.blocks_KLPRD for level in levels),
    )


def _until_absent(path: Path, fetched: Fetched) -> Path:
    for depth, ref in enumerate(path):
        if ref in fetched.absent:
            return path[:depth]
    return path
