"""A command that is told to end by SIGTERM gives back what it has started."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from membank.bank_service.cluster.local_ray import marked_processes
from membank.bank_service.cluster.state import list_running
from membank.cli.ending import ended_by_sigterm

SERVING = """
import pathlib, signal, sys
from membank.cli.bench.own_service import own_service
from membank.wire.spec import BankSpec, LevelSpec

levels = (LevelSpec(fan_out=4, block_width=2),)
spec = BankSpec(name="tiny", num_layers=1, width=4, levels=levels)

with own_service(pathlib.Path(sys.argv[1]), spec, num_shards=1, resident_bytes=1 << 28):
    print("serving", flush=True)
    signal.pause()
"""


def test_sigterm_ends_a_block_as_an_interrupt_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    given_back: list[bool] = []

    def work() -> None:
        with ended_by_sigterm(), ExitStack() as owned:
            owned.callback(given_back.append, True)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as ended:
        work()
    assert ended.value.code == 128 + signal.SIGTERM
    assert given_back
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_leaves_signals_alone() -> None:
    found = []

    def look() -> None:
        with ended_by_sigterm():
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_measurement_that_is_told_to_end_ends_its_service(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SERVING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        (noted,) = list_running(tmp_path / "run")
        assert noted.ray_mark is not None
        assert marked_processes(noted.ray_mark)
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
    assert list_running(tmp_path / "run") == ()
    assert marked_processes(noted.ray_mark) == []
