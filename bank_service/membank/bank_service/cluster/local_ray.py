"""A Ray of our own on this machine: started quietly, and ended without a trace.

Every process of it carries a mark in its environment, so that it can be found and ended whatever
became of its parents, and no other Ray on the machine is touched.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import ray

from membank.bank_service.cluster.config import NAMESPACE
from membank.bank_service.rpc.server import free_port
from membank.wire.errors import FailedPreconditionError, UnavailableError

_LOG = logging.getLogger(__name__)

# Ray takes 127.0.0.1 for a mistake and dials an address of the network instead; all of 127/8 is loopback.
_HOST = "127.0.0.2"
_MARK = "MEMBANK_RAY_MARK"
# Sockets below it have names of 60 characters, and the kernel allows 107 in all.
_MAX_DIR_LENGTH = 40
_POLL_S = 0.05
_CONNECT_TIMEOUT_S = 5.0

QUIET_ENV = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Announced for a later Ray; asked for now, it stops a warning in every process.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Idle workers, one per CPU, that actors would never use.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_metrics_collection": "0",
    # Ray would let its workers yield to everything else (niceness 15): shards are what clients on
    # this machine wait for.
    "RAY_worker_niceness": "0",
    # Ray gives its processes titles; without this they would overwrite the environment, as the
    # system shows it, and the mark with it.
    "SPT_NOENV": "1",
}
"""Environment that keeps Ray from starting and saying more than it has to."""

# It listens on loopback alone, as the service itself does without tokens. Left unset, Ray would
# want a token of its own from every driver as soon as any Ray of this user has made one.
_LOOPBACK_ENV = {"RAY_AUTH_MODE": "disabled"}


@dataclass(frozen=True, slots=True)
class LocalRay:
    """A Ray that was started here."""

    address: str
    """Address to connect to, host:port."""
    folder: str
    """Its session files."""
    mark: str
    """The mark of its processes."""


def start_ray(*, num_cpus: int | None, object_store_bytes: int, timeout_s: float) -> LocalRay:
    """Start a Ray on loopback.

    Parameters
    ----------
    num_cpus
        Logical CPUs; None = the cores, at least 4.
    object_store_bytes
        Bytes of shared memory.
    timeout_s
        Longest wait for it.

    Returns
    -------
    LocalRay
        How to reach and to stop it.

    Raises
    ------
    UnavailableError
        If it does not start; the message holds what it said.
    """
    mark = uuid.uuid4().hex
    folder = _session_folder()
    local = LocalRay(f"{_HOST}:{free_port(_HOST)}", folder, mark)
    port = local.address.rpartition(":")[2]
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head"),
        f"--port={port}",
        f"--node-ip-address={_HOST}",
        f"--temp-dir={folder}",
        f"--num-cpus={max(4, os.cpu_count() or 1) if num_cpus is None else num_cpus}",
        f"--object-store-memory={object_store_bytes}",
        "--include-dashboard=false",
        "--include-log-monitor=false",
        "--disable-usage-stats",
        # It cannot be left out, and its usual port is another Ray's.
        f"--ray-client-server-port={free_port(_HOST)}",
    ]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **QUIET_ENV, **_LOOPBACK_ENV, _MARK: mark},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            # Its own session: Ctrl-C in our terminal is not meant for the service.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as err:
        stop_ray(local, timeout_s=5.0)
        raise UnavailableError(f"Ray did not start within {timeout_s:g} s") from err
    except BaseException:
        # An interrupt too: it ends the command, and not what that has started already.
        stop_ray(local, timeout_s=5.0)
        raise
    if done.returncode != 0:
        stop_ray(local, timeout_s=5.0)
        said = (done.stderr or done.stdout).strip().splitlines()[-8:]
        raise UnavailableError("Ray did not start: " + " | ".join(said))
    return local


def stop_ray(local: LocalRay, *, timeout_s: float) -> None:
    """End every process of a Ray that was started here, and remove its files.

    They are killed outright: the service has been stopped before, and Ray itself keeps nothing
    that would have to be saved.

    Raises
    ------
    UnavailableError
        If a process does not end within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    # In rounds, as a process may start another one while we look.
    while pids := marked_processes(local.mark):
        if time.monotonic() > deadline:
            raise UnavailableError(f"processes {pids} of Ray do not end; kill them by hand")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    shutil.rmtree(local.folder, ignore_errors=True)


def marked_processes(mark: str) -> list[int]:
    """Return the processes of the Ray with this mark; those that ended do not count."""
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        # Processes end while we look, and those of other users are none of ours.
        with suppress(OSError):
            # A zombie has an empty environment.
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the Ray at `address` for a while, unless this process is one already.

    Raises
    ------
    UnavailableError
        If there is no Ray at `address`.
    FailedPreconditionError
        If this process is a driver of another Ray.
    """
    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in {"auto", here}:
            raise FailedPreconditionError(
                f"this process is connected to the Ray at {here} and cannot be to {address}; "
                "disconnect it with ray.shutdown()"
            )
        yield
        return
    _check_listening(address)
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.ERROR,
            configure_logging=False,
        )
    except (ConnectionError, RuntimeError, ValueError) as err:
        raise UnavailableError(f"there is no Ray at {address}: {err}") from err
    try:
        yield
    finally:
        ray.shutdown()


def _check_listening(address: str) -> None:
    """Raise unless something listens at `address`: Ray would try for half a minute."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto", or a URL of Ray's own
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S).close()
    except OSError as err:
        raise UnavailableError(f"there is no Ray at {address}: {err.strerror or err}") from err


def _session_folder() -> str:
    folder = tempfile.mkdtemp(prefix="membank-")
    if len(folder) <= _MAX_DIR_LENGTH:
        return folder
    shutil.rmtree(folder)
    return tempfile.mkdtemp(prefix="membank-", dir="/tmp")  # the short one
