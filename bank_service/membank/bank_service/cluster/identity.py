"""What a shard is started with, where one life of it is found, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from membank.bank_service.rpc.server import ServerConfig
from membank.bank_service.shard.config import ShardConfig

BLOCK_SERVICE = "membank.v1.BlockService"
ADMIN_SERVICE = "membank.v1.AdminService"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """What one shard serves, and how."""

    shard_id: str
    """Identity of the shard."""
    bank_url: str
    """The bank."""
    keyring_url: str = ""
    """Its keyring; "" = it is not sealed."""
    partitions: tuple[int, ...]
    """Partitions it owns."""
    service: str = ""
    """Service that must have the claim on the bank when the shard opens; "" = no claim is needed."""
    server: ServerConfig
    """How its server listens."""
    advertise_host: str = ""
    """Host that others are told; "" = the one that is bound."""
    shard: ShardConfig
    """Settings of the engine."""
    max_in_flight_bytes: int
    """Payload bytes held at one time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIdentity:
    """Where one life of a shard is found."""

    shard_id: str
    """Identity of the shard."""
    incarnation: str
    """Random; another one after every restart."""
    endpoint: str
    """gRPC address, host:port."""
    node: str
    """Address of its machine."""
    node_id: str
    """Ray's name for its node; "" outside of Ray."""
    pid: int
    """Its process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardStatus:
    """One shard of a running service."""

    shard_id: str
    """Its identity."""
    endpoint: str
    """gRPC address, host:port; the last one where it is down."""
    node: str
    """Address of its machine."""
    node_id: str
    """Ray's name for its node."""
    pid: int
    """Its process."""
    partitions: tuple[int, ...]
    """Partitions it owns."""
    num_restarts: int
    """Times it came back since the controller started."""
    alive: bool
    """Whether it answers."""
    problem: str = ""
    """Why it does not, as last heard."""


def server_version() -> str:
    """Return the version of the installed distribution."""
    try:
        return version("membank")
    except PackageNotFoundError:
        return "unknown"
