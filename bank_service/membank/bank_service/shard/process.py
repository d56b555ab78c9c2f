"""Which process this is, so that a receipt can say that it has ended."""

from __future__ import annotations

import os
import socket
import time
from functools import cache
from pathlib import Path

from membank.wire.format.receipt import ProcessLife

_LOADED_S = time.time()
_PROC = Path("/proc")


def this_process() -> ProcessLife:
    """Return name and start of this process."""
    pid = os.getpid()
    return ProcessLife(host=socket.gethostname(), pid=pid, start_time_s=_start_time_s(pid))


@cache
def _start_time_s(pid: int) -> float:
    """Return when this process, `pid`, began, to a hundredth of a second where the kernel says it.

    Asked once: the kernel's answer moves when the clock is set, and a process that seemed to be another
    one would be taken for one that took its place.
    """
    try:
        # The name of the program, in brackets, may hold anything.
        fields = (_PROC / "self/stat").read_text().rpartition(")")[2].split()
        boot = next(
            int(line.split()[1])
            for line in (_PROC / "stat").read_text().splitlines()
            if line.startswith("btime ")
        )
        return boot + int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):
        return _LOADED_S


_START_FIELD = 19
"""Of `starttime` in proc_pid_stat(5), counted from the state, which follows the name."""
