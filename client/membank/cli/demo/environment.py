"""What a measurement was made with: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata

_PACKAGES = ("membank", "numpy", "torch", "ray", "zarr", "grpcio", "protobuf", "scikit-learn")


def environment() -> dict[str, object]:
    """Return machine, versions and commit, JSON-able; what cannot be known is None."""
    return {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of the working directory, with ``+`` where files differ from it."""
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or no repository: an installed membank
    return answer.stdout.strip()
