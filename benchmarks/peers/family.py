"""All processes of one server and its clients: halted while others are measured.

On few cores, idle servers are not idle enough: TensorPipe polls its shared memory, which keeps a core
busy in each of its processes, and a Ray does housekeeping. So only one family runs at a time.

What a server starts may leave its process group, its session and even its parent, as Ray's daemons
do; what it inherits is its environment. So a family is who carries a mark there, and whom those
started: a process that renames itself overwrites the place where its environment can be read.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

_MARK = "MEMBANK_PEERS_FAMILY"
_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_POLL_S = 0.002
_HALT_S = 5.0
_WINDOW_S = 0.1
_NEAR = 0.25
_REST_S = 1.5


class Family:
    """The processes that carry a mark, and those that they started.

    Parameters
    ----------
    name
        The mark, unique on the machine.
    """

    def __init__(self, name: str) -> None:
        self.environment = {_MARK: name}
        """Variables to start each process of it with."""
        self._wanted = f"{_MARK}={name}".encode()
        self._seen: dict[tuple[int, str], bool] = {}
        self.idle_cores = 0.0
        """Cores that it keeps busy when nobody asks it anything, once measured."""

    def members(self) -> set[int]:
        """Return the process ids."""
        members: set[int] = set()
        children: dict[int, list[int]] = {}
        for pid, parent, began in _processes():
            children.setdefault(parent, []).append(pid)
            # Environments are read once: a turn looks often, and at every process of the machine.
            if (pid, began) not in self._seen:
                self._seen[pid, began] = self._is_marked(pid)
            if self._seen[pid, began]:
                members.add(pid)
        found = list(members)
        while found:
            new = [pid for pid in children.get(found.pop(), ()) if pid not in members]
            members.update(new)
            found += new
        return members

    def cores(self, seconds: float) -> float:
        """Return how many cores it keeps busy, over so many seconds from now on."""
        members = self.members()
        begin, before = time.monotonic(), _cpu_s(members)
        time.sleep(seconds)
        spent = _cpu_s(members) - before
        return max(0.0, spent) / (time.monotonic() - begin)

    def come_to_rest(self) -> None:
        """Wait until it is about as idle as it ever is; not for ever."""
        deadline = time.monotonic() + _REST_S
        while self.cores(_WINDOW_S) > self.idle_cores + _NEAR:
            if time.monotonic() > deadline:
                return

    def halt(self) -> None:
        """Stop all of them where they are, and return once none runs."""
        halted: set[int] = set()
        deadline = time.monotonic() + _HALT_S
        # Whom one of them has started meanwhile has to be found as well.
        while new := self.members() - halted:
            _signal(new, signal.SIGSTOP)
            halted |= new
        while any(_runs(pid) for pid in halted):
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes do not stop: {sorted(filter(_runs, halted))}")
            time.sleep(_POLL_S)

    def resume(self, *, but: Collection[int] = ()) -> None:
        """Let them go on, all `but` some."""
        _signal(self.members().difference(but), signal.SIGCONT)

    def _is_marked(self, pid: int) -> bool:
        try:
            environment = (_PROC / str(pid) / "environ").read_bytes()
        except OSError:
            return False
        return self._wanted in environment.split(b"\0")


def _cpu_s(pids: set[int]) -> float:
    total = 0
    for pid in pids:
        with suppress(OSError):
            fields = _stat(pid)
            total += int(fields[11]) + int(fields[12])
    return total / _TICKS_PER_S


def _processes() -> Iterator[tuple[int, int, str]]:
    """Yield id, parent and beginning of every process; the first and the last name it for good."""
    for entry in os.listdir(_PROC):
        if entry.isdigit():
            # Those that have ended since are nobody's any more.
            with suppress(OSError):
                fields = _stat(int(entry))
                yield int(entry), int(fields[1]), fields[19]


def _stat(pid: int) -> list[str]:
    """Return what follows the name, which may hold anything: state, parent, group, ..."""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


def _runs(pid: int) -> bool:
    try:
        return _stat(pid)[0] not in "TtZX"
    except OSError:
        return False


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
