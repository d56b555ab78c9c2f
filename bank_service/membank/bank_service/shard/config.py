"""Settings of a shard."""

from __future__ import annotations

from dataclasses import dataclass

from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import Durability as Durability  # said to be exported


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardConfig:
    """Settings of a shard. Administrative operations are always as durable as the storage."""

    durability: Durability = Durability.PROCESS
    """What an acknowledged update survives."""
    journal_dir: str | None = None
    """Local directory of the journals and of the locks that keep a second process away; None =
    beside the blocks, for a bank in a directory."""
    ship_every_s: float = 0.0
    """Seconds between two copies of the journal to the bank's storage: what an owner that loses its
    machine loses at most, beside what one copy takes. 0 = none; of no use with `store`."""
    consolidate_bytes: int = 256 << 20
    """Bytes of a partition's journal from which on it is folded into slots, at least 1. To fold a
    block writes three times the bytes of its gradient, so blocks of millions of parameters should take
    many updates in between: with 256 MiB instead of 64, AdamW on a few blocks of 16 MB costs a
    quarter less processor time per push, and with twice as much hardly less again. To replay as many
    bytes takes one to two seconds where blocks are large."""
    consolidate_updates: int = 1 << 15
    """Updates of blocks in a partition's journal from which on it is folded as well, at least 1. It
    bounds what an opening has to replay where blocks are small: 0.3 ms each on a busy machine, so 10 s."""
    journal_limit_bytes: int = 1 << 30
    """Bytes of a partition's journal from which on updates wait until it is folded; at least
    `consolidate_bytes`. They wait at four times `consolidate_updates`, too."""
    segment_bytes: int = 64 << 20
    """Bytes of a journal segment from which on the next one is begun, at least 1."""
    spare_bytes: int = 256 << 20
    """Bytes of trimmed segments that a partition keeps on its journal's disk, at most, to write the
    next ones over them, which is several times as fast as to write new files; 0 = none. As many as
    `consolidate_bytes` serve a sustained load. They go when the partition is closed, when a deletion
    asks for it, and when the disk is full."""
    resident_bytes: int = 4 << 30
    """Bytes of blocks and optimizer state that are kept in memory. Blocks that are not in slots
    yet are written back when they fill a third of it, and updates wait at two thirds."""
    retained_revisions: int = 8
    """Newest revisions that can be rolled back to, besides snapshots; at least 1."""
    retained_s: float = 0.0
    """Revisions that ended less than so many seconds ago can be rolled back to as well, >= 0."""
    retained_requests: int = 1024
    """Newest pushes per partition of which a late retry is recognised, at least 1."""
    hold_wait_s: float = 5.0
    """Seconds that a push waits for a transaction, or for room, before it is turned away."""
    lease_s: float = 10.0
    """Seconds that an owner answers without asking the storage whether it has been replaced, and
    that a new owner waits unless it knows the old one to be gone. 0 = do not ask; a replaced owner
    then finds out when it next publishes. Of no use for a bank in a directory: a lock decides."""
    settle_after_s: float = 60.0
    """Seconds after which a prepared transaction without a decision is given up."""
    watch_queue_events: int = 4096
    """Events that a subscription holds at most; the oldest are dropped and counted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "durability", Durability.of(self.durability))
        for name in (
            "consolidate_bytes",
            "consolidate_updates",
            "segment_bytes",
            "retained_revisions",
            "retained_requests",
            "watch_queue_events",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in (
            "resident_bytes",
            "retained_s",
            "hold_wait_s",
            "settle_after_s",
            "spare_bytes",
            "lease_s",
            "ship_every_s",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        limit = max(self.journal_limit_bytes, self.consolidate_bytes)
        object.__setattr__(self, "journal_limit_bytes", limit)

    @property
    def is_replayed_elsewhere(self) -> bool:
        """Whether another machine, with other kernels, may have to replay the journal."""
        return self.durability is Durability.STORE or self.ship_every_s > 0


def _require(ok: bool, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise InvalidArgumentError(
            f"{name} is {value!r}; accepted: {accepted}",
            reason=Reason.BAD_CONFIG,
            metadata={"field": name, "value": str(value)},
        )
