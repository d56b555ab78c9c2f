"""One thread, and the tiny world of facts."""

from __future__ import annotations

import pytest
import torch

from tiny_world import World, make_world


@pytest.fixture
def world() -> World:
    torch.set_num_threads(1)
    return make_world()
