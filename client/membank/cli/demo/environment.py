"""What a demo was made with: machine, versions, commit."""

from __future__ import annotations

import os
import platform
import time

from membank.cli.machine import commit, version_of

_PACKAGES = ("membank", "numpy", "torch", "ray", "zarr", "grpcio", "protobuf", "scikit-learn")


def environment() -> dict[str, object]:
    """Return machine, versions and commit, JSON-able; what cannot be known is None."""
    return {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in _PACKAGES},
    }
