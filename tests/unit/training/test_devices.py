"""Both stages with the anchor on a GPU and the blocks on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from membank.trainer.corpus import PackedSequences
from membank.trainer.model import Anchor
from membank.trainer.training import (
    AnchorStageConfig,
    InProcessMemory,
    MemoryStageConfig,
    read_losses,
    train_anchor,
    train_memories,
)
from membank.wire.spec import BankSpec


def _losses(path: Path) -> list[float]:
    return [record.loss for record in read_losses(path)]


@pytest.mark.gpu
def test_losses_are_those_of_the_cpu(
    anchor: Anchor, sequences: PackedSequences, spec: BankSpec, tmp_path: Path
) -> None:
    stage_1 = AnchorStageConfig(num_tokens=10 * 4 * 12, batch_size=4)
    stage_2 = MemoryStageConfig(num_tokens=10 * 6 * 12, batch_size=6)
    start = {name: tensor.clone() for name, tensor in anchor.state_dict().items()}
    for device in ("cpu", "cuda"):
        anchor.load_state_dict(start)
        anchor.requires_grad_(True).to(device)
        train_anchor(
            anchor,
            sequences,
            stage_1,
            checkpoint=tmp_path / f"{device}.state",
            losses=tmp_path / f"{device}.1",
        )
        memory = InProcessMemory(spec)
        train_memories(anchor, memory, sequences, stage_2, losses=tmp_path / f"{device}.2")
    for stage in (1, 2):
        torch.testing.assert_close(
            _losses(tmp_path / f"cuda.{stage}"),
            _losses(tmp_path / f"cpu.{stage}"),
            atol=1e-3,
            rtol=1e-3,
        )
