"""Families of processes, which run one at a time: who belongs to one, and what halts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from benchmarks.peers import family as families
from benchmarks.peers.family import Family

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Starts a child that inherits nothing and is in a session of its own, says who it is, and then
# answers lines: the child does, through it.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", '''
import sys
for line in sys.stdin:
    print(line.strip() + " heard", flush=True)
'''], env={}, start_new_session=True, stdin=subprocess.PIPE)
print(child.pid, flush=True)
for line in sys.stdin:
    child.stdin.write(line.encode())
    child.stdin.flush()
"""
SPIN = "print('spinning', flush=True)\nwhile True: pass"


class Started:
    """A process of a family.

    Parameters
    ----------
    family
        The family.
    program
        What it runs.
    """

    def __init__(self, family: Family, program: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **family.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> str:
        """Return the next line of it or of its child."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def write(self, line: str) -> None:
        """Ask it."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        """End it; halted or not."""
        self.process.kill()
        self.process.communicate()


Start = Callable[[str], Started]
"""Starts a program as a member of the family."""


@pytest.fixture
def family() -> Iterator[Family]:
    """A family that is ended after."""
    made = Family(f"test-{os.getpid()}")
    yield made
    end_all(made)


def end_all(family: Family) -> None:
    """End all processes of a family."""
    for pid in family.members():
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def start(family: Family) -> Iterator[Start]:
    """What starts members, all of which are ended after."""
    with ExitStack() as stack:

        def started(program: str) -> Started:
            member = Started(family, program)
            stack.callback(member.end)
            # The child has the same pipes: the parent's end alone would not close them.
            stack.callback(end_all, family)
            return member

        yield started


def state(pid: int) -> str:
    """Return the state of a process: T = halted."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_members_are_those_marked_and_whom_they_started(family: Family, start: Start) -> None:
    parent = start(PARENT)
    child = int(parent.read())
    assert family.members() == {parent.process.pid, child}
    assert Family("test-another").members() == set()


def test_who_is_halted_does_nothing_and_goes_on_where_it_was(family: Family, start: Start) -> None:
    started = start(PARENT)
    child = int(started.read())
    family.halt()
    assert {state(pid) for pid in (started.process.pid, child)} == {"T"}
    started.write("question")
    assert {state(pid) for pid in (started.process.pid, child)} == {"T"}
    family.resume()
    assert started.read() == "question heard"


def test_a_halted_family_uses_no_core(family: Family, start: Start) -> None:
    assert start(SPIN).read() == "spinning"
    assert family.cores(0.2) > 0.1
    family.halt()
    assert family.cores(0.2) == 0
    # Nobody to halt, and nobody to resume, is no error.
    Family("test-nobody").halt()
    Family("test-nobody").resume()


def test_rest_is_what_is_usual_for_a_family_and_is_not_waited_for_for_ever(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    class Watched(Family):
        def cores(self, seconds: float) -> float:
            looks.append(super().cores(seconds))
            return looks[-1]

    watched = Watched(f"test-{os.getpid()}")
    assert start(SPIN).read() == "spinning"
    watched.idle_cores = 1.0
    watched.come_to_rest()
    assert len(looks) == 1
    monkeypatch.setattr(families, "_REST_S", 0.0)
    watched.idle_cores = -1.0
    watched.come_to_rest()
    assert len(looks) == 2
