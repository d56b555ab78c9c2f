"""The tiny world, its run on disk, and a served bank that was trained on all of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deletion_rig import DeletionRig, trained_on
from membank.trainer.run import RunDirectory, load_config
from membank.trainer.training import InProcessMemory
from tiny_run import bank_spec, make_tiny_run
from tiny_world import World, make_world


@pytest.fixture(scope="session")
def world() -> World:
    torch.set_num_threads(1)
    return make_world()


@pytest.fixture(scope="session")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> InProcessMemory:
    """Memories that stage 2 trained on every document."""
    run = make_tiny_run(tmp_path_factory.mktemp("trained") / "run", world)
    return trained_on(world, bank_spec(run, load_config(run)), load_config(run).stage2)


@pytest.fixture
def run(world: World, tmp_path: Path) -> RunDirectory:
    return make_tiny_run(tmp_path / "run", world)


@pytest.fixture
def rig(world: World, run: RunDirectory, trained: InProcessMemory) -> Iterator[DeletionRig]:
    with DeletionRig(world, run, trained) as rig:
        yield rig
