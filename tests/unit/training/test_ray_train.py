"""The settings of a run on Ray Train."""

from __future__ import annotations

from pathlib import Path

from membank.client import ClientConfig
from membank.client.config import RetryConfig
from membank.trainer.training.memory_stage import MemoryStageConfig
from membank.trainer.training.ray_train import ServedTraining


def test_a_shard_may_be_away_as_long_as_the_patience_says() -> None:
    client = ClientConfig(bank="b", retry=RetryConfig(max_attempts=3, max_backoff_s=0.5))
    job = ServedTraining(
        endpoint="localhost:1",
        anchor=Path("a"),
        sequences=Path("s"),
        config=MemoryStageConfig(num_tokens=1),
        run_dir=Path("r"),
        client=client,
        patience_s=600.0,
    )
    patient = job.patient_client
    # Waits are half of the bound on average, so this many attempts outlast the patience.
    assert patient.retry.max_attempts * 0.25 > job.patience_s
    assert (patient.bank, patient.retry.max_backoff_s) == ("b", 0.5)
