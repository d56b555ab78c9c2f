"""Banks to measure with: blocks of a round size, or a model of the paper with its real sizes.

A bank costs nothing until it is written to: content that was never changed is computed from the
seed. So every preset is the whole bank, and only what a run touches takes memory.
"""

from __future__ import annotations

from membank.cli.extras import needs_extra
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import BankSpec, LevelSpec

SCRATCH_NAME = "membank-bench"
"""Name of the banks that are made to be measured with, and that pushes may change unasked."""

_NUM_LAYERS = 8
_WIDTH = 512
_FAN_OUTS = (16, 16, 16)
_NUM_PARTITIONS = 8
# Clients remember the versions of their own pushes; among several clients they lag behind, and a
# refused push would be measured as if it had been applied.
_MAX_STALENESS = 1 << 30

# A block has 8 * 3 * 512 * 4 bytes = 48 KiB per column.
_BLOCK_WIDTHS = {"100kb": 2, "1mb": 20, "4mb": 81, "8mb": 163, "16mb": 326, "40mb": 814}

BLOCK_PRESETS = tuple(_BLOCK_WIDTHS)
"""Presets that are named for the size of a block."""

PAPER_PRESETS = (
    "paper_160m", "paper_410m", "paper_1_4b", "gemma3_270m", "qwen2_5_0_5b", "llama3_2_1b",
)  # fmt: skip
"""Presets with the blocks of Pouransari et al., arXiv 2510.02375, tables 1 and 2."""


def preset_spec(name: str) -> BankSpec:
    """Return the bank called `name`.

    Parameters
    ----------
    name
        One of `BLOCK_PRESETS`: three levels of 16 children each, float32, every block of that
        size. Or one of `PAPER_PRESETS`: the tree, block widths and dtype (bfloat16) of the recipe
        of that name; `membank plan` shows its sizes.

    Returns
    -------
    BankSpec
        With AdamW, in 8 partitions, accepting gradients however old.

    Raises
    ------
    InvalidArgumentError
        If there is none.
    FailedPreconditionError
        If a recipe is asked for and the trainer is not installed.
    """
    if name in _BLOCK_WIDTHS:
        levels = tuple(
            LevelSpec(fan_out=fan_out, block_width=_BLOCK_WIDTHS[name]) for fan_out in _FAN_OUTS
        )
        return _scratch_spec(levels, num_layers=_NUM_LAYERS, width=_WIDTH, dtype="float32")
    if name in PAPER_PRESETS:
        return _paper_spec(name)
    raise InvalidArgumentError(
        f"there is no preset {name!r}; accepted: {', '.join((*BLOCK_PRESETS, *PAPER_PRESETS))}",
        reason=Reason.BAD_CONFIG,
    )


def two_level_spec(fan_out: int, *, block_width: int, width: int) -> BankSpec:
    """Return a bank of ``fan_out ** 2`` leaves in two levels, for comparing banks by size."""
    levels = (LevelSpec(fan_out=fan_out, block_width=block_width),) * 2
    return _scratch_spec(levels, num_layers=_NUM_LAYERS, width=width, dtype="float32")


def _paper_spec(name: str) -> BankSpec:
    with needs_extra("trainer"):
        from membank.trainer.model import RECIPES
    recipe = RECIPES[name]()
    # The paper's trees have a fourth level, for which none of these models has blocks.
    levels = tuple(
        LevelSpec(fan_out=fan_out, block_width=block_width)
        for fan_out, block_width in zip(
            recipe.memory.fan_outs, recipe.memory.block_widths, strict=True
        )
        if block_width
    )
    return _scratch_spec(
        levels,
        num_layers=recipe.anchor.num_layers,
        width=recipe.anchor.width,
        dtype=recipe.memory.dtype,
    )


def _scratch_spec(
    levels: tuple[LevelSpec, ...], *, num_layers: int, width: int, dtype: str
) -> BankSpec:
    return BankSpec(
        name=SCRATCH_NAME,
        num_layers=num_layers,
        width=width,
        levels=levels,
        dtype=dtype,
        num_partitions=_NUM_PARTITIONS,
        # As runs make their banks: one busy topic is not one busy shard.
        partition_level=min(2, len(levels)),
        max_staleness=_MAX_STALENESS,
    )
