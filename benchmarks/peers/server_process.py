"""Servers as processes: started, waited for, ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.peers.contestant import NotRunError

_START_S = 120.0
_STOP_S = 10.0


class ServerProcess:
    """A command that runs until `stop`, its output in a file.

    Parameters
    ----------
    command
        Program and arguments.
    log
        File for its output.
    environment
        Variables to set besides those of this process.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self._log = log
        with log.open("wb") as output:
            # A session of its own: what it starts ends with it.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )

    @classmethod
    def of_module(
        cls,
        module: str,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> ServerProcess:
        """Start a module of this package."""
        command = [sys.executable, "-u", "-m", f"benchmarks.peers.{module}", *arguments]
        return cls(command, log, environment)

    def wait_for_line(self, mark: str) -> str:
        """Return what follows `mark` at the beginning of a line of its output, once there is one.

        Raises
        ------
        NotRunError
            If it ends, or two minutes pass, before.
        """
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            for line in self._log.read_text(errors="replace").splitlines():
                if line.startswith(mark):
                    return line.removeprefix(mark).strip()
            self._check_alive()
            time.sleep(0.05)
        raise NotRunError(f"it was not ready within {_START_S:.0f} s: {self._last_words()}")

    def wait_for_port(self, port: int) -> None:
        """Return once a port of this machine answers; errors as `wait_for_line`."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            self._check_alive()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise NotRunError(f"port {port} did not answer: {self._last_words()}")

    def stop(self) -> None:
        """End it and all that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(_STOP_S)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.wait()

    def _check_alive(self) -> None:
        if self._process.poll() is not None:
            raise NotRunError(f"it ended at once: {self._last_words()}")

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return " | ".join(line for line in lines[-3:]) or "it said nothing"


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
