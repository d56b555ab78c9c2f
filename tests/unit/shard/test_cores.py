"""What computes blocks on several cores."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from membank.bank_service.shard import cores

WAIT_S = 20.0


def _meet() -> None:
    """Compute two items that both have to be under way before either ends."""
    meeting = threading.Barrier(2, timeout=WAIT_S)

    def meet(item: int) -> None:
        del item
        meeting.wait()

    cores.compute(meet, range(2))


def test_a_child_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_num_cores", lambda: 2 * torch.get_num_threads())
    _meet()
    pid = os.fork()
    if pid == 0:
        try:
            _meet()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
