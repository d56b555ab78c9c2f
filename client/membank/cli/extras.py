"""A clear word where a command needs an extra that is not installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from membank.wire.errors import FailedPreconditionError, Reason


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Turn a failed import inside the block into the command that mends it.

    Raises
    ------
    FailedPreconditionError
        If something imported inside is not installed.
    """
    try:
        yield
    except ImportError as err:
        if err.name is not None and err.name.split(".")[0] == "membank":
            raise  # our own defect, not a missing package
        raise FailedPreconditionError(
            f"this command needs {err.name}, which is not installed; "
            f"run: pip install 'membank[{extra}]'",
            reason=Reason.MISSING_EXTRA,
            metadata={"extra": extra},
        ) from err
