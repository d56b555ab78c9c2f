"""One thread, and the tiny world of facts with memories that have learnt it."""

from __future__ import annotations

import pytest
import torch

from membank.trainer.training import (
    InProcessMemory,
    MemoryStageConfig,
    PrefetchConfig,
    train_memories,
)
from tiny_world import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    torch.set_num_threads(1)
    return make_world()


@pytest.fixture(scope="session")
def trained(world: World) -> InProcessMemory:
    """Memories that were trained on every document of the world."""
    memory = InProcessMemory(world.spec)
    config = MemoryStageConfig(
        num_tokens=60 * 8 * 24, batch_size=8, run_length=2, prefetch=PrefetchConfig(depth=0)
    )
    train_memories(world.anchor, memory, world.sequences, config)
    return memory
