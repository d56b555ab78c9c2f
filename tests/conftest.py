"""What every test shares: Hypothesis profiles, markers that need a machine, one thread per process."""

import atexit
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable

import pytest
from hypothesis import HealthCheck, settings

pytest_plugins = ["s3_server"]

# Before numpy or torch load: several test processes share few cores, and a thread pool in each only thrashes.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
# No test leaves a key or a journal with the user who runs it.
if "MEMBANK_TEST_STATE" not in os.environ:
    os.environ["MEMBANK_TEST_STATE"] = tempfile.mkdtemp(prefix="membank-tests-")
    atexit.register(shutil.rmtree, os.environ["MEMBANK_TEST_STATE"], ignore_errors=True)
os.environ["XDG_STATE_HOME"] = os.environ["MEMBANK_TEST_STATE"]
# No test may report usage or look for the network through Ray.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

settings.register_profile("default", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.register_profile(
    "nightly", deadline=None, max_examples=2000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def _has_cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def _missing(marker: str) -> str | None:
    """Return why tests with `marker` cannot run here, or None if they can."""
    if marker == "s3":
        # Here, not above: pytest loads a plugin itself.
        from s3_server import why_no_s3

        return why_no_s3()
    if marker == "gpu" and not _has_cuda():
        return "needs a CUDA device"
    return None


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    reasons: dict[str, str | None] = {}
    for item in items:
        for marker in ("s3", "gpu"):
            if item.get_closest_marker(marker) is None:
                continue
            if marker not in reasons:
                reasons[marker] = _missing(marker)
            if (reason := reasons[marker]) is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
