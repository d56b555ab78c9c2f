"""A whole service of one's own to measure: gateway, controller and shards on Ray, as `up` starts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from membank.bank_service.cluster import UpConfig, down, status, up
from membank.cli.ending import ended_by_sigterm
from membank.client import BankClient
from membank.wire.spec import BankSpec

_IN_FLIGHT_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnService:
    """A running service."""

    endpoint: str
    """Address of its gateway."""
    shard_pids: tuple[int, ...]
    """Processes of its shards."""
    controller_pid: int
    """Process of controller and gateway."""


@contextmanager
def own_service(
    folder: Path, spec: BankSpec, *, num_shards: int, resident_bytes: int
) -> Iterator[OwnService]:
    """Serve a new bank while the context lasts, with all that `membank up` starts.

    Parameters
    ----------
    folder
        Where the bank is made, and where the service is noted: others are not touched.
    spec
        The bank.
    num_shards
        Shards, no more than the bank has partitions.
    resident_bytes
        Bytes of blocks and optimizer state that each shard keeps in memory.

    Raises
    ------
    MembankError
        If it does not start.
    """
    config = UpConfig(
        bank_url=str(folder / "bank"),
        num_shards=num_shards,
        port=0,
        runtime_dir=folder / "run",
        resident_bytes=resident_bytes,
        max_in_flight_bytes=_IN_FLIGHT_BYTES,
    )
    with ended_by_sigterm():
        endpoint = up(config)
    try:
        with ended_by_sigterm(), BankClient.connect(endpoint.address) as bank:
            bank.create_bank(spec)
        found = status(runtime_dir=config.runtime_dir)
        with ended_by_sigterm():
            yield OwnService(
                endpoint=endpoint.address,
                shard_pids=tuple(shard.pid for shard in found.shards),
                controller_pid=found.controller_pid,
            )
    finally:
        down(runtime_dir=config.runtime_dir)
