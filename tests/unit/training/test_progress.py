"""Progress, loss files and results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from membank.trainer.training import LossLog, LossRecord, Progress, read_losses
from membank.trainer.training.progress import Meter
from membank.trainer.training.schedule import cosine_scale
from membank.wire.errors import CorruptionError


def _record(step: int, loss: float = 1.0) -> LossRecord:
    return LossRecord(step=step, loss=loss, num_tokens=7, time_s=0.5)


def test_a_resumed_log_keeps_the_first_record_of_each_step(tmp_path: Path) -> None:
    path = tmp_path / "run" / "losses.jsonl"
    with LossLog(path) as log:
        for step in range(5):
            log.add(_record(step, loss=step))
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # the process died here
    with LossLog(path, first_step=3) as log:
        for step in range(3, 8):
            log.add(_record(step, loss=10 * step))
    assert [record.loss for record in read_losses(path)] == [0, 1, 2, 3, 4, 50, 60, 70]
    with LossLog(path) as log:
        log.add(_record(0))
    assert len(read_losses(path)) == 1


def test_damage_inside_a_log_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    with LossLog(path) as log:
        for step in range(3):
            log.add(_record(step))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "garbage", lines[2]]))
    with pytest.raises(CorruptionError, match="line 2"):
        read_losses(path)


def test_progress_is_told_now_and_then_and_at_the_end() -> None:
    now = [0.0]
    told: list[Progress] = []
    meter = Meter(
        "anchor",
        first_step=10,
        num_steps=30,
        callback=told.append,
        every_s=3,
        clock=lambda: now[0],
    )
    for step in range(10, 30):
        now[0] += 1
        meter.add(step, loss=2.0, num_tokens=100)
    assert [progress.step for progress in told] == [11, 14, 17, 20, 23, 26, 29, 30]
    assert told[3].left_s == pytest.approx(10)
    assert told[3].tokens_per_s == pytest.approx(100)
    assert told[-1].fraction == 1
    result = meter.result({"STALE_VERSION": 2})
    assert (result.num_tokens, result.seconds, result.num_refused) == (2000, 20, 2)
    assert json.loads(json.dumps(result.to_json()))["refused"] == {"STALE_VERSION": 2}


def test_a_result_without_steps_is_json_too() -> None:
    meter = Meter("anchor", first_step=5, num_steps=5, callback=None)
    result = meter.result()
    assert math.isnan(result.final_loss)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["final_loss"] is None


def test_the_schedule_warms_up_and_comes_down() -> None:
    scales = [cosine_scale(s, 100, warmup_fraction=0.1, final_scale=0.2) for s in range(100)]
    assert scales[0] > 0
    assert scales[:11] == sorted(scales[:11])
    assert max(scales) == pytest.approx(1.0)
    assert scales[10:] == sorted(scales[10:], reverse=True)
    assert scales[-1] == pytest.approx(0.2, abs=1e-3)
    assert cosine_scale(0, 1, warmup_fraction=0, final_scale=0.1) == 1.0
