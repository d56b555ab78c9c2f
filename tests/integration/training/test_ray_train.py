"""Ray Train workers against real shards: Ctrl-C, a killed worker and a restarted shard."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from membank.client import BankClient
from membank.trainer.training import (
    MemoryStageConfig,
    Progress,
    read_losses,
    save_anchor,
    save_sequences,
)
from membank.trainer.training.ray_train import ServedTraining, train_served
from membank.wire.errors import NotFoundError
from served_bank import ServedBank
from tiny_training import expected_versions, tiny_anchor, tiny_sequences, tiny_spec

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    # Ray warns of its own deprecated names when it copies its own settings.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
NUM_WORKERS = 2
CONFIG = MemoryStageConfig(num_tokens=800 * 6 * 12, batch_size=6, run_length=2)


@pytest.fixture
def _ray() -> Iterator[None]:
    """One Ray for both runs of a test, as where the service's own is joined."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture
def job(tmp_path: Path) -> ServedTraining:
    spec = tiny_spec()
    save_anchor(tmp_path / "anchor.safetensors", tiny_anchor(spec))
    save_sequences(tmp_path / "sequences.safetensors", tiny_sequences(spec))
    return ServedTraining(
        endpoint="",
        anchor=tmp_path / "anchor.safetensors",
        sequences=tmp_path / "sequences.safetensors",
        config=CONFIG,
        run_dir=tmp_path / "run",
        num_workers=NUM_WORKERS,
    )


@pytest.mark.usefixtures("_ray")
def test_every_update_is_applied_once_whoever_is_stopped_in_between(
    job: ServedTraining, tmp_path: Path
) -> None:
    # Workers may be any number of versions apart here: a refusal would hide a lost update.
    spec = replace(tiny_spec(), max_staleness=10_000)
    num_steps = CONFIG.num_steps(tiny_sequences(spec).seq_len, NUM_WORKERS)
    told: list[Progress] = []
    killed: list[int] = []
    handler = signal.getsignal(signal.SIGINT)
    with ServedBank(tmp_path / "bank", spec) as bank:
        job = replace(job, endpoint=bank.endpoint)

        def interrupt(progress: Progress) -> None:
            if progress.fraction > 0.1:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            train_served(job, on_progress=interrupt)
        assert signal.getsignal(signal.SIGINT) is handler

        def disturb(progress: Progress) -> None:
            told.append(progress)
            if not killed and progress.fraction > 0.4:
                position = json.loads(job.position_path(1).read_text())
                killed.append(position["pid"])
                os.kill(position["pid"], signal.SIGKILL)
                bank.restart(1)

        result = train_served(job, on_progress=disturb)
        with BankClient.connect(bank.endpoint) as client:
            versions = client.fetch_blocks(list(spec.blocks())).versions
    assert killed
    assert killed[0] != os.getpid()
    assert result.num_restarts == 1
    assert result.num_refused == 0
    assert versions == expected_versions(spec, CONFIG, NUM_WORKERS)
    for rank in range(NUM_WORKERS):
        records = read_losses(job.losses_path(rank))
        assert [record.step for record in records] == list(range(num_steps))
        assert records[-1].loss < records[0].loss
    assert 0 < result.workers[1].first_step < num_steps
    assert told[-1].fraction == 1
    assert {progress.num_steps for progress in told} == {NUM_WORKERS * num_steps}


def test_a_missing_file_is_an_error_of_the_caller(job: ServedTraining) -> None:
    with pytest.raises(NotFoundError, match="missing"):
        train_served(replace(job, anchor=Path("missing")))
