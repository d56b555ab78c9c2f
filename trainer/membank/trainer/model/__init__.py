"""The anchor, its fetched memories, and the recipes that size them: architecture only."""

from membank.trainer.model.anchor import (
    PADDING_SEGMENT,
    Anchor,
    AnchorConfig,
    next_token_loss,
)
from membank.trainer.model.generate import generate
from membank.trainer.model.memory import (
    NO_BLOCK,
    LayerMemory,
    LevelBlocks,
    MemoryBatch,
    MemoryOfLayers,
    init_block,
)
from membank.trainer.model.recipes import (
    RECIPES,
    MemoryConfig,
    PublicAnchor,
    Recipe,
)
from membank.trainer.model.sizes import BankPlan, LevelPlan, plan

__all__ = [
    "NO_BLOCK",
    "PADDING_SEGMENT",
    "RECIPES",
    "Anchor",
    "AnchorConfig",
    "BankPlan",
    "LayerMemory",
    "LevelBlocks",
    "LevelPlan",
    "MemoryBatch",
    "MemoryConfig",
    "MemoryOfLayers",
    "PublicAnchor",
    "Recipe",
    "generate",
    "init_block",
    "next_token_loss",
    "plan",
]
