"""Settings of a service and the names that follow from them."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from membank.bank_service.rpc.server import ServerConfig
from membank.bank_service.shard.config import Durability, ShardConfig
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.signing import Signer, TrustedKeys

NAMESPACE = "membank"
"""Ray namespace of controllers and shards."""

GATEWAY_MESSAGE_BYTES = 64 << 20
"""Largest message of the gateway: `CreateBank` carries a whole tree document."""


def default_runtime_dir() -> Path:
    """Return where running services are noted, for `status` and `down`.

    That is ``$MEMBANK_RUNTIME_DIR``, else ``membank`` in ``$XDG_RUNTIME_DIR``, else a directory of
    this user among the temporary files.
    """
    if chosen := os.environ.get("MEMBANK_RUNTIME_DIR"):
        return Path(chosen)
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "membank"
    return Path(tempfile.gettempdir()) / f"membank-{os.getuid()}"


def default_journal_root() -> Path:
    """Return where journals lie of banks behind URLs, on the machine that asks.

    That is ``$MEMBANK_RUNTIME_DIR``, else ``membank`` in ``$XDG_STATE_HOME`` or in
    ``~/.local/state``: what systems offer for the runtime of a user is empty after a restart of the
    machine, which a synced journal is to survive.
    """
    if chosen := os.environ.get("MEMBANK_RUNTIME_DIR"):
        return Path(chosen)
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "membank"
    return Path.home() / ".local" / "state" / "membank"


def default_signing_key() -> Path:
    """Return the file of the key that receipts are signed with, where none is named.

    It lies beside the journals of banks behind URLs, for the same reason, and never in a bank.
    """
    return default_journal_root() / "signing-key.pem"


def canonical_url(url: str) -> str:
    """Return the one spelling of a bank's URL: absolute paths for directories."""
    path = url.removeprefix("file://")
    if "://" in path:
        return path.rstrip("/")
    return str(Path(path).expanduser().resolve())


def bank_key(url: str) -> str:
    """Return a short name of the bank at `url`, for actors and files."""
    # Which client library reaches the bank does not make it another bank.
    place = canonical_url(url).removeprefix("fsspec+")
    return hashlib.sha256(place.encode()).hexdigest()[:12]


def journal_name(url: str) -> str:
    """Return the name of the folder that holds the journals of the bank at `url`, if no other."""
    return f"journal-{bank_key(url)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class UpConfig:
    """What to start, and where."""

    bank_url: str
    """Directory or URL of the bank. Where there is none yet, the service waits for `CreateBank`.
    A directory must be seen by every node that runs a shard."""
    keyring_url: str = ""
    """Directory or URL of the keyring of a sealed bank, seen by every node like the bank; one that
    `CreateBank` creates is sealed with it. Empty = the bank is not sealed."""
    num_shards: int = 2
    """Shard actors, 1..256, at most one per partition of the bank."""
    host: str = "127.0.0.1"
    """Address that the gateway binds. Off loopback, certificate, key and token file are needed."""
    port: int = 7600
    """Port of the gateway; 0 = any free one."""
    tls_cert: Path | None = None
    """PEM certificate chain, at this path on every node; None = no TLS."""
    tls_key: Path | None = None
    """PEM key of the certificate, at this path on every node."""
    token_file: Path | None = None
    """Who may call, at this path on every node; None = everybody on this machine."""
    trusted_keys: Path | None = None
    """Public keys of which one must have signed a pack that is imported, one ``KEY NAME`` per line, at
    this path on every node; None = any pack is taken."""
    ray_address: str | None = None
    """Ray to join: host:port, or "auto" for the one of this machine; None = start one."""
    num_cpus: int | None = None
    """Logical CPUs of a Ray that is started here; None = the cores, at least 4. The service
    itself takes none of them."""
    object_store_bytes: int = 200 << 20
    """Shared memory of a Ray that is started here, at least 80 MiB."""
    min_nodes: int = 1
    """Ray nodes to wait for before shards are placed."""
    rebalance: bool | None = None
    """Whether shards move to nodes that join later; None = unless the bank is a directory, which
    a new node may not see."""
    runtime_dir: Path = field(default_factory=default_runtime_dir)
    """Where the running service is noted."""
    resident_bytes: int = 1 << 30
    """Bytes of blocks and optimizer state that each shard keeps in memory."""
    durability: Durability | str | None = None
    """What an acknowledged update survives; None = `process`, of a sealed bank `store`, which is the
    only one that it takes."""
    journal_dir: Path | None = None
    """Local directory of the journals, at this path on every node that runs a shard; None = in a
    bank's directory, or for a bank behind a URL where `default_journal_root` says on each node."""
    ship_every_s: float = 0.0
    """Seconds between two copies of the journals to the bank's storage, for a bank behind a URL:
    about what is lost at most with a machine. 0 = none."""
    lease_s: float = 10.0
    """Seconds that a shard of a bank behind a URL answers without asking the storage whether it has
    been replaced; a shard that replaces one on a lost machine waits as long."""
    retained_revisions: int = 8
    """Newest revisions that can be rolled back to, besides snapshots; at least 1."""
    retained_s: float = 0.0
    """Revisions that ended less than so many seconds ago can be rolled back to as well, >= 0."""
    signing_key: Path | None = None
    """PEM file with the Ed25519 key that receipts are signed with, at this path on the node of the
    controller; None = the one of `default_signing_key`, which is made where there is none."""
    recycle: bool = True
    """Whether the processes of shards that held what was deleted end, and others take their place,
    before the deletion is acknowledged. Clients wait for them meanwhile."""
    service_id: str = ""
    """Names the service in the claim that it writes into a bank behind a URL; chosen by `up`."""
    max_in_flight_bytes: int = 1 << 30
    """Payload bytes that each server holds at one time; beyond, callers are told to retry."""
    start_timeout_s: float = 90.0
    """Longest wait for the service to answer, > 0."""

    def __post_init__(self) -> None:
        for name in (
            "tls_cert",
            "tls_key",
            "token_file",
            "trusted_keys",
            "runtime_dir",
            "journal_dir",
            "signing_key",
        ):
            path = getattr(self, name)
            if path is not None:
                # Actors have another working directory.
                object.__setattr__(self, name, Path(path).expanduser().absolute())
        for name in ("bank_url", "keyring_url"):
            url = getattr(self, name)
            _refuse_credentials(url)
            object.__setattr__(self, name, canonical_url(url) if url else "")
        usual = Durability.STORE if self.keyring_url else Durability.PROCESS
        object.__setattr__(self, "durability", Durability.of(self.durability or usual))
        is_kept = not self.keyring_url or self.durability is Durability.STORE
        _require(is_kept, "durability", self.durability, "store, for a sealed bank")
        _require(1 <= self.num_shards <= 256, "num_shards", self.num_shards, "1..256")
        _require(1 <= self.min_nodes <= 4096, "min_nodes", self.min_nodes, "1..4096")
        _require(self.num_cpus is None or self.num_cpus >= 0, "num_cpus", self.num_cpus, ">= 0")
        ok = self.object_store_bytes >= 80 << 20
        _require(ok, "object_store_bytes", self.object_store_bytes, ">= 80 MiB")
        ok = self.max_in_flight_bytes >= 1 << 20
        _require(ok, "max_in_flight_bytes", self.max_in_flight_bytes, ">= 1 MiB")
        _require(self.start_timeout_s > 0, "start_timeout_s", self.start_timeout_s, "> 0")
        # Refused here, before anything is started.
        self.gateway_config()
        self.shard_config()

    @property
    def key(self) -> str:
        """Short name of the bank."""
        return bank_key(self.bank_url)

    @property
    def is_directory(self) -> bool:
        """Whether the bank is a directory."""
        return "://" not in self.bank_url

    @property
    def moves_shards(self) -> bool:
        """Whether shards move to nodes that join later."""
        return not self.is_directory if self.rebalance is None else self.rebalance

    def load_trusted_keys(self) -> TrustedKeys | None:
        """Return the keys that count; None = any. `InvalidArgumentError` (BAD_KEY) for a bad file."""
        return None if self.trusted_keys is None else TrustedKeys.load(self.trusted_keys)

    def load_signer(self) -> Signer:
        """Return what signs receipts on this machine.

        Raises
        ------
        FailedPreconditionError
            If the key cannot be used (BAD_KEY).
        """
        if self.signing_key is not None:
            return Signer.load(self.signing_key)
        return Signer.load_or_create(default_signing_key())

    def gateway_config(self) -> ServerConfig:
        """Return how the gateway listens; off loopback without TLS and tokens it does not."""
        return ServerConfig(
            host=self.host,
            port=self.port,
            tls_cert=self.tls_cert,
            tls_key=self.tls_key,
            token_file=self.token_file,
            max_message_bytes=GATEWAY_MESSAGE_BYTES,
        )

    def shard_config(self) -> ShardConfig:
        """Return the settings of each shard."""
        return ShardConfig(
            durability=Durability.of(self.durability or Durability.PROCESS),
            journal_dir=None if self.journal_dir is None else str(self.journal_dir),
            ship_every_s=self.ship_every_s,
            lease_s=self.lease_s,
            resident_bytes=self.resident_bytes,
            retained_revisions=self.retained_revisions,
            retained_s=self.retained_s,
        )


def _refuse_credentials(url: str) -> None:
    # Settings travel through Ray, are noted on disk and shown by `status`.
    _, mark, place = url.partition("://")
    if mark and "@" in place.partition("/")[0]:
        # The URL is not repeated, for what is in it.
        raise InvalidArgumentError(
            "the URL of a bank or keyring holds no credentials; they come from the environment, a profile or a role",
            reason=Reason.BAD_CONFIG,
        )


def _require(ok: bool, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise InvalidArgumentError(
            f"{name} is {value!r}; accepted: {accepted}",
            reason=Reason.BAD_CONFIG,
            metadata={"field": name, "value": str(value)},
        )
