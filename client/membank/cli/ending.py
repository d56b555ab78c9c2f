"""Ending in order where a command is told to end while it owns something that outlives it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Have SIGTERM end the block as an interrupt does, so that it gives back what it has started.

    The process ends with 143, as shells have it of SIGTERM. Connecting to Ray replaces the handler,
    and disconnecting takes it away: enter this again after a call that did.

    Raises
    ------
    SystemExit
        On SIGTERM, wherever the main thread is.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread alone
        return
    before = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
