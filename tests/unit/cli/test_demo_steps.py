"""The demo's steps: a run that was stopped goes on as if it had not been."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from membank.cli.demo.operations import Operator
from membank.cli.demo.state import DemoState
from membank.cli.demo.story import Demo, DemoConfig
from membank.client import BankClient
from membank.trainer.run import named_run
from membank.trainer.run.answer import Answerer
from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
)
from membank.wire.spec import BlockRef
from tiny_bank import create_bank, file_bytes

TOPIC = BlockRef(1, 0)


@pytest.fixture
def client() -> Iterator[BankClient]:
    service = FakeService(FakeBank())
    with BankClient.connect(service.endpoint) as client:
        yield client
    service.close()


def test_results_are_the_same_before_and_after_a_stop(tmp_path: Path) -> None:
    fingerprints = {"1/0": ("ACTIVE", 7)}
    state = DemoState(tmp_path / "state.json", {})
    state.finish("before", fingerprints)
    resumed = DemoState(tmp_path / "state.json", {})
    resumed.finish("import", fingerprints)
    assert resumed.result("before") == resumed.result("import")


def test_a_state_of_another_configuration_is_refused(tmp_path: Path) -> None:
    DemoState(tmp_path / "state.json", {"tokens": 1}).finish("prepare", None)
    with pytest.raises(FailedPreconditionError):
        DemoState(tmp_path / "state.json", {"tokens": 2})


def test_times_of_all_attempts_add_up(tmp_path: Path) -> None:
    times = iter([0.0, 2.0, 10.0, 13.0])
    state = DemoState(tmp_path / "state.json", {}, clock=lambda: next(times))
    with pytest.raises(KeyboardInterrupt), state.timed("stage1"):
        raise KeyboardInterrupt
    with state.timed("stage1"):
        pass
    assert state.seconds == {"stage1": 5.0}


def test_operations_begin_again_from_the_same_bank(client: BankClient) -> None:
    operator = Operator(client, cast("Answerer", None))  # nothing is asked
    before = operator.fingerprints()
    operator.pin_or_return("start")
    client.swap({TOPIC: np.zeros(SPEC.block_shape(1), np.float32)})
    assert operator.fingerprints() != before
    operator.pin_or_return("start")
    assert operator.fingerprints() == before


def test_a_bank_of_another_run_is_refused_before_any_work(tmp_path: Path) -> None:
    # Behind a URL there may be anything.
    bank = create_bank(tmp_path / "bank")
    before = file_bytes(tmp_path / "bank")
    config = DemoConfig(out=tmp_path / "run", run=named_run("fast"), bank_url=bank.url)
    with pytest.raises(AlreadyExistsError, match="did not make") as caught:
        Demo(config).tell()
    assert caught.value.reason is Reason.BANK_EXISTS
    assert file_bytes(tmp_path / "bank") == before
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["state.json"]


def test_storage_that_cannot_be_used_is_found_before_any_work(tmp_path: Path) -> None:
    config = DemoConfig(out=tmp_path / "run", run=named_run("fast"), bank_url="nowhere://bank")
    with pytest.raises(InvalidArgumentError, match="nowhere"):
        Demo(config).tell()
