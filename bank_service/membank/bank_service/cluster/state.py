"""What is noted of running services, so that `status` and `down` find them."""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from pathlib import Path

from membank.bank_service.cluster.config import bank_key, default_runtime_dir
from membank.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
    UnavailableError,
)

_LOG = logging.getLogger(__name__)

_SUFFIX = ".service.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """A running service; `str` gives the address that clients connect to."""

    address: str
    """gRPC address of the gateway, host:port."""
    bank_url: str
    """The bank that it serves."""
    ray_address: str
    """Ray that it runs in, for trainers that want to join it."""
    ray_dir: str | None = None
    """Directory of the Ray that was started for it; None = it joined another."""
    ray_mark: str | None = None
    """Environment mark of that Ray's processes."""
    num_shards: int = 0
    """Shards it was started with."""
    keyring_url: str = ""
    """Keyring of its bank; empty = it is not sealed."""
    had_bank: bool = True
    """Whether there was a bank when it was started; else it waited for `CreateBank`."""

    def __str__(self) -> str:
        return self.address

    @property
    def key(self) -> str:
        """Short name of the bank."""
        return bank_key(self.bank_url)


def save(endpoint: Endpoint, runtime_dir: Path) -> None:
    """Note a running service.

    Raises
    ------
    FailedPreconditionError
        If it cannot be noted there (BAD_CONFIG).
    """
    path = note_path(endpoint.key, runtime_dir)
    scratch = path.with_suffix(".new")
    try:
        runtime_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch.write_text(json.dumps(dataclasses.asdict(endpoint), indent=1))
        # A reader sees the old note or the new one, never half of it.
        scratch.replace(path)
    except OSError as err:
        raise FailedPreconditionError(
            f"cannot note the service in {runtime_dir}, where `membank down` looks for it: "
            f"{err.strerror or err}; mend that, or choose another place by MEMBANK_RUNTIME_DIR",
            reason=Reason.BAD_CONFIG,
            metadata={"folder": str(runtime_dir)},
        ) from err


def forget(endpoint: Endpoint, runtime_dir: Path) -> None:
    """Remove the note of a service.

    Raises
    ------
    FailedPreconditionError
        If it cannot be removed (BAD_CONFIG).
    """
    path = note_path(endpoint.key, runtime_dir)
    try:
        path.unlink(missing_ok=True)
    except OSError as err:
        raise FailedPreconditionError(
            f"{endpoint.bank_url} is not served any more; cannot remove {path}, which says that it is: "
            f"{err.strerror or err}; remove it by hand",
            reason=Reason.BAD_CONFIG,
            metadata={"folder": str(runtime_dir)},
        ) from err


def list_running(runtime_dir: Path | None = None) -> tuple[Endpoint, ...]:
    """Return the services that are noted; one that was killed may still be among them.

    Parameters
    ----------
    runtime_dir
        Where they are noted; None = `default_runtime_dir`.

    Returns
    -------
    tuple[Endpoint, ...]
        The services, by the name of their note.
    """
    folder = runtime_dir or default_runtime_dir()
    found = []
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        try:
            found.append(Endpoint(**json.loads(path.read_text())))
        except (FileNotFoundError, ValueError, TypeError):
            continue  # removed just now, or written by another version: not ours to run
        except OSError as err:
            # Of another user, perhaps; it must not keep the others from being found.
            _LOG.warning("%s is passed over: it cannot be read: %s", path, err.strerror or err)
    return tuple(found)


def find(bank_url: str | None, runtime_dir: Path) -> Endpoint:
    """Return the service of a bank, or the only one there is.

    Raises
    ------
    UnavailableError
        If none is noted (NOT_RUNNING).
    InvalidArgumentError
        If there are several and `bank_url` is None.
    """
    running = list_running(runtime_dir)
    if bank_url is not None:
        running = tuple(item for item in running if item.key == bank_key(bank_url))
    if not running:
        raise UnavailableError(
            f"no service {'of ' + bank_url + ' ' if bank_url else ''}is running; start one with "
            "`membank up`",
            reason=Reason.NOT_RUNNING,
        )
    if len(running) > 1:
        banks = ", ".join(item.bank_url for item in running)
        raise InvalidArgumentError(f"several services are running; name one bank of: {banks}")
    return running[0]


def note_path(key: str, runtime_dir: Path) -> Path:
    """Return the file that notes the service of a bank."""
    return runtime_dir / f"{key}{_SUFFIX}"
