"""Stage 2 on the Ray of a whole service, while a shard actor of it is killed."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from membank.bank_service.cluster import UpConfig, down, status, up
from membank.client import BankClient
from membank.trainer.training import MemoryStageConfig, Progress, save_anchor, save_sequences
from membank.trainer.training.ray_train import ServedTraining, train_served
from tiny_training import expected_versions, tiny_anchor, tiny_sequences, tiny_spec

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    # Ray warns of its own deprecated names when it copies its own settings.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
NUM_WORKERS = 2
# Long enough to be killed in the midst: 600 steps may be over before it is known which process to kill.
CONFIG = MemoryStageConfig(num_tokens=2_400 * 6 * 12, batch_size=6, run_length=2)


def test_training_goes_on_and_every_update_is_applied_once(tmp_path: Path) -> None:
    spec = replace(tiny_spec(), max_staleness=10_000)
    save_anchor(tmp_path / "anchor.safetensors", tiny_anchor(spec))
    save_sequences(tmp_path / "sequences.safetensors", tiny_sequences(spec))
    runtime_dir = tmp_path / "runtime"
    endpoint = up(UpConfig(bank_url=str(tmp_path / "bank"), port=0, runtime_dir=runtime_dir))
    killed: list[int] = []

    def kill(progress: Progress) -> None:
        if not killed and progress.fraction > 0.2:
            killed.append(status(runtime_dir=runtime_dir).shards[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    try:
        with BankClient.connect(endpoint.address) as client:
            client.create_bank(spec)
            job = ServedTraining(
                endpoint=endpoint.address,
                anchor=tmp_path / "anchor.safetensors",
                sequences=tmp_path / "sequences.safetensors",
                config=CONFIG,
                run_dir=tmp_path / "run",
                num_workers=NUM_WORKERS,
                ray_address=endpoint.ray_address,
            )
            result = train_served(job, on_progress=kill)
            versions = client.fetch_blocks(list(spec.blocks())).versions
            (shard, _) = status(runtime_dir=runtime_dir).shards
    finally:
        down(runtime_dir=runtime_dir)
    assert killed
    assert shard.pid != killed[0]
    # The workers waited for the shard; none of them was started again.
    assert result.num_restarts == 0
    assert result.num_refused == 0
    assert versions == expected_versions(spec, CONFIG, NUM_WORKERS)
