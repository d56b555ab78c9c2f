"""What a recipe costs: parameters and bytes of anchor, fetch, bank and optimizer, side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from membank.trainer.model.memory import NUM_PARTS
from membank.trainer.model.recipes import Recipe

OptimizerName = Literal["sgd", "adagrad", "adamw"]

_DTYPE_BYTES = {"bfloat16": 2, "float32": 4}
# Moments are kept in float32 whatever the blocks are stored in.
_OPTIMIZER_BYTES_PER_PARAM = {"sgd": 0, "adagrad": 4, "adamw": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class LevelPlan:
    """Give the sizes of one level of a bank."""

    level: int
    """Level, 1 is the coarsest."""
    block_width: int
    """r; 0 if the level has no blocks."""
    num_blocks: int
    """Blocks of a full tree; 0 if the level has none."""
    block_params: int
    """Parameters of one block, 3 * r * layers * width."""
    block_bytes: int
    """Stored bytes of one block."""
    level_params: int
    """Parameters of all blocks."""
    level_bytes: int
    """Stored bytes of all blocks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BankPlan:
    """Give the sizes of a recipe; bytes are of payload, without headers or free slots."""

    recipe: str
    """Name of the recipe."""
    dtype: str
    """Type of stored weights; anchor and fetch are counted in it too."""
    optimizer: str
    """Optimizer whose state is counted."""
    anchor_params: int
    """Parameters of the anchor."""
    anchor_bytes: int
    """Bytes of the anchor."""
    fetch_params: int
    """Parameters fetched for one context: one block per level."""
    fetch_bytes: int
    """Bytes fetched for one context."""
    resident_bytes: int
    """Bytes a device holds to answer one context: anchor and one fetch."""
    bank_params: int
    """Parameters of all blocks of a full tree."""
    bank_bytes: int
    """Stored bytes of all blocks."""
    optimizer_bytes: int
    """Bytes of optimizer state when every block has been trained."""
    total_params: int
    """Anchor and bank together, so that total capacity is never hidden."""
    levels: tuple[LevelPlan, ...]
    """One row per level, coarsest first."""


def plan(recipe: Recipe, *, optimizer: OptimizerName = "adamw") -> BankPlan:
    """Return the sizes of a recipe.

    Parameters
    ----------
    recipe : Recipe
        What to size; nothing is allocated.
    optimizer : {"sgd", "adagrad", "adamw"}
        Optimizer of the blocks: 0, 1 or 2 float32 moments per parameter.

    Returns
    -------
    BankPlan
        Sizes of a full tree (every node has all its children).
    """
    memory = recipe.memory
    item_bytes = _DTYPE_BYTES[memory.dtype]
    unit_params = NUM_PARTS * recipe.anchor.num_layers * recipe.anchor.width
    levels = tuple(
        _level(number, width, math.prod(memory.fan_outs[:number]), unit_params, item_bytes)
        for number, width in enumerate(memory.block_widths, start=1)
    )
    anchor_params = recipe.anchor.num_params
    fetch_params = sum(level.block_params for level in levels)
    bank_params = sum(level.level_params for level in levels)
    return BankPlan(
        recipe=recipe.name,
        dtype=memory.dtype,
        optimizer=optimizer,
        anchor_params=anchor_params,
        anchor_bytes=anchor_params * item_bytes,
        fetch_params=fetch_params,
        fetch_bytes=fetch_params * item_bytes,
        resident_bytes=(anchor_params + fetch_params) * item_bytes,
        bank_params=bank_params,
        bank_bytes=bank_params * item_bytes,
        optimizer_bytes=bank_params * _OPTIMIZER_BYTES_PER_PARAM[optimizer],
        total_params=anchor_params + bank_params,
        levels=levels,
    )


def _level(
    number: int, block_width: int, num_clusters: int, unit_params: int, item_bytes: int
) -> LevelPlan:
    block_params = unit_params * block_width
    num_blocks = num_clusters if block_width else 0
    return LevelPlan(
        level=number,
        block_width=block_width,
        num_blocks=num_blocks,
        block_params=block_params,
        block_bytes=block_params * item_bytes,
        level_params=num_blocks * block_params,
        level_bytes=num_blocks * block_params * item_bytes,
    )
