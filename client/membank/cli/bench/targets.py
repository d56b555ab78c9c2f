"""The services that loads are run against: one of the user's, or one that is made for it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from membank.cli.bench.display import Notice
from membank.cli.bench.load import Target, prepare
from membank.cli.bench.presets import SCRATCH_NAME, preset_spec
from membank.cli.bench.workload import Operation, Traffic
from membank.cli.connection import connect
from membank.cli.extras import needs_extra
from membank.client import BankClient, ClientConfig
from membank.wire.errors import FailedPreconditionError, MembankError, NotFoundError, Reason

_RESIDENT_BYTES = 1 << 30
# Blocks that are not in slots yet may fill a third of a shard's memory before updates wait.
_RESIDENT_PER_TOUCHED = 4


@contextmanager
def embedded_target(
    preset: str,
    traffic: Traffic,
    config: ClientConfig,
    *,
    folder: Path,
    num_shards: int,
    touch_bytes: int,
    notice: Notice,
) -> Iterator[Target]:
    """Serve a new bank, made as `preset` says in `folder`, while the context lasts.

    Raises
    ------
    MembankError
        If the service is not installed or does not start.
    """
    with needs_extra("service"):
        from membank.cli.bench.embedded import EmbeddedService
    spec = preset_spec(preset)
    service = EmbeddedService(
        folder,
        spec,
        num_shards=num_shards,
        resident_bytes=max(_RESIDENT_BYTES, _RESIDENT_PER_TOUCHED * touch_bytes),
    )
    with service:
        yield prepare(
            preset,
            service.endpoint,
            config,
            traffic,
            touch_bytes=touch_bytes,
            server_pids=service.pids,
            notice=notice,
        )


def served_target(
    endpoint: str,
    traffic: Traffic,
    config: ClientConfig,
    *,
    may_change: bool,
    scratch_preset: str | None,
    touch_bytes: int,
    notice: Notice,
) -> Target:
    """Return the service at `endpoint`, once it is clear that it may be measured so.

    Parameters
    ----------
    endpoint
        Address of the gateway or a shard.
    traffic
        What will be done.
    config
        How to connect.
    may_change
        Whether pushes may change a bank that was not made for this.
    scratch_preset
        Bank to create where the service has none; None = create none.
    touch_bytes
        Bytes that are touched at most.
    notice
        Told of the warm-up.

    Raises
    ------
    FailedPreconditionError
        If pushes would change somebody's bank.
    NotFoundError
        If the service has no bank and none is to be created.
    UnavailableError
        If nothing answers.
    """
    ca_file = None if config.tls is None else config.tls.root_certificates
    with connect(endpoint, config.token_file, ca_file) as bank:
        spec_name = _bank_name(bank, scratch_preset)
        if Operation.PUSH in traffic.operations and spec_name != SCRATCH_NAME and not may_change:
            raise FailedPreconditionError(
                f"pushes would train bank {spec_name} at {endpoint} on noise; leave --bank out to "
                "measure a bank made for it, or say --yes-change-this-bank",
                metadata={"bank": spec_name, "endpoint": endpoint},
            )
        pids = _pids_here(bank)
    return prepare(
        spec_name, endpoint, config, traffic,
        touch_bytes=touch_bytes, server_pids=pids, notice=notice,
    )  # fmt: skip


def _bank_name(bank: BankClient, scratch_preset: str | None) -> str:
    try:
        return bank.spec.name
    except NotFoundError:
        if scratch_preset is None:
            raise NotFoundError(
                f"the service at {bank.endpoint} has no bank yet; --create makes one there to "
                "measure with, as --preset says",
                reason=Reason.UNKNOWN_BANK,
            ) from None
    return bank.create_bank(preset_spec(scratch_preset)).name


def _pids_here(bank: BankClient) -> tuple[int, ...]:
    """Return the processes of the shards, if all of them run on this machine."""
    try:
        shards = bank.stats().shards
    except MembankError:
        return ()  # a shard was named, which has no such answer, or the caller may not ask
    if not all(_is_loopback(shard.endpoint) for shard in shards):
        return ()
    return tuple(shard.pid for shard in shards if Path(f"/proc/{shard.pid}").exists())


def _is_loopback(endpoint: str) -> bool:
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
