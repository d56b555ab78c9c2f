"""Settings of a shard."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from membank.wire.errors import InvalidArgumentError, Reason


class Durability(StrEnum):
    """What an acknowledged update survives."""

    PROCESS = "process"
    """The death of the shard's process."""
    HOST = "host"
    """The loss of power of its machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig:
    """Settings of a shard. Administrative operations are always as durable as the storage."""

    durability: Durability = Durability.PROCESS
    """What an acknowledged update survives."""
    journal_dir: str | None = None
    """Local directory of the journals; None = beside the blocks, for a bank in a directory."""
    consolidate_bytes: int = 64 << 20
    """Bytes of a partition's journal from which on it is folded into slots, at least 1."""
    segment_bytes: int = 16 << 20
    """Bytes of a journal segment from which on the next one is begun, at least 1."""
    resident_bytes: int = 4 << 30
    """Bytes of blocks and optimizer state that are kept in memory once they are in slots; what
    is not in slots yet is kept besides."""
    retained_revisions: int = 8
    """Newest revisions that can be rolled back to, besides snapshots; at least 1."""
    retained_s: float = 0.0
    """Revisions that ended less than so many seconds ago can be rolled back to as well, >= 0."""
    retained_requests: int = 1024
    """Newest pushes per partition of which a late retry is recognised, at least 1."""
    hold_wait_s: float = 5.0
    """Seconds that a push waits for a transaction on its partition before it is turned away."""
    settle_after_s: float = 60.0
    """Seconds after which a prepared transaction without a decision is given up."""
    watch_queue_events: int = 4096
    """Events that a subscription holds at most; the oldest are dropped and counted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "durability", _durability(self.durability))
        for name in (
            "consolidate_bytes",
            "segment_bytes",
            "retained_revisions",
            "retained_requests",
            "watch_queue_events",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("resident_bytes", "retained_s", "hold_wait_s", "settle_after_s"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")


def _durability(value: str) -> Durability:
    try:
        return Durability(value)
    except ValueError:
        known = ", ".join(kind.value for kind in Durability)
        raise InvalidArgumentError(
            f"durability is {value!r}; accepted: {known}", reason=Reason.BAD_CONFIG
        ) from None


def _require(ok: bool, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise InvalidArgumentError(
            f"{name} is {value!r}; accepted: {accepted}",
            reason=Reason.BAD_CONFIG,
            metadata={"field": name, "value": str(value)},
        )
