"""Where a measurement was made, and with what."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path

_PACKAGES = (
    "membank", "numpy", "torch", "zarr", "obstore", "fsspec", "s3fs", "awscrt", "google-crc32c",
    "grpcio", "protobuf", "ray",
)  # fmt: skip


def environment(folder: Path) -> dict[str, object]:
    """Return time, commit, versions and machine, JSON-able; what cannot be known is None.

    Parameters
    ----------
    folder
        Where the measured service or benchmark writes: its file system is part of the result.
    """
    return {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit() or f"membank {version_of('membank')}",
        "versions": {
            "python": platform.python_version(),
            "kernel": platform.release(),
            **{name: version_of(name) for name in _PACKAGES},
        },
        "machine": {
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "file_system": file_system(folder),
            # After a run of some minutes: more than 1 means that others were at work too.
            "load_5_minutes": os.getloadavg()[1],
        },
    }


def commit() -> str | None:
    """Return the commit of this source, with ``+`` where files differ; None = not in git."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed copy may lie within somebody else's repository.
        _run([*git, "ls-files", "--error-unmatch", here.name])
        return _run([*git, "describe", "--always", "--dirty=+", "--abbrev=12"])
    except (OSError, subprocess.SubprocessError):
        return None


def file_system(folder: Path) -> str | None:
    """Return the type of the file system that holds `folder`, such as ``ext4``."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return None
    resolved = folder.resolve()
    mounts = [(fields[1], fields[2]) for line in lines if len(fields := line.split()) > 2]
    # The last one wins where one is mounted over another.
    found = [(len(place), index, kind) for index, (place, kind) in enumerate(mounts)
             if resolved.is_relative_to(place)]  # fmt: skip
    return max(found)[2] if found else None


def version_of(package: str) -> str | None:
    """Return the installed version of a distribution; None = it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _run(command: list[str]) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return answer.stdout.strip()
