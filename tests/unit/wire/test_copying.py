"""Copies by two threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from membank.wire import copying
from membank.wire.copying import copy_checked
from membank.wire.crc import crc32c


def test_a_copy_needs_no_second_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    copying._helpers.cache_clear()
    source = np.random.default_rng(0).integers(0, 256, 5 << 20, np.uint8)
    target = np.zeros_like(source)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        assert copy_checked(target, source) == crc32c(source)
    assert (target == source).all()
    # What the pool has kept is not done when a thread comes free: the memory may be somebody's.
    target[:] = 0
    other = np.zeros_like(source)
    copy_checked(other, source)
    assert not target.any()
    copying._helpers.cache_clear()
