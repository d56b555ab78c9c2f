"""Which bank is killed, which processes serve it, and what it promises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from membank.bank_service.shard import Durability, ShardConfig
from membank.bank_service.store import ObjectStore
from membank.bank_service.store.journal import LogFile
from membank.bank_service.store.open_objects import open_objects
from storage_faults import FaultPlan, FaultyLogFile
from tiny_bank import UnsyncedObjects


class Seat(StrEnum):
    """A process of the service."""

    SHARD_0 = "shard-0"
    SHARD_1 = "shard-1"
    COORDINATOR = "coordinator"


SHARDS = (Seat.SHARD_0, Seat.SHARD_1)
"""The shards, in their order."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What an acknowledged update survives."""

    durability: Durability
    """The level."""
    ship_every_s: float = 0.0
    """Seconds between two copies of the journals to the bank's storage; 0 = none."""

    def __str__(self) -> str:
        return f"{self.durability}{', shipped' if self.ship_every_s else ''}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a bank is, and how it is served."""

    url: str
    """Directory, or URL of a bucket."""
    journal_dir: Path
    """Directory of its journals."""
    folder: Path
    """Directory for the boards and for what the processes have to say."""
    name: str
    """Told from that of every other bank of this machine; the processes listen under it."""
    promise: Promise = Promise(Durability.PROCESS)
    """What an acknowledged update survives."""
    folds_at_stop: bool = True
    """Whether a clean stop leaves nothing in a journal, so that a machine can be given up."""
    is_restless: bool = True
    """Whether blocks are written all the time, or hardly ever, so that journals hold all updates."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What leads to the bucket."""

    @property
    def is_directory(self) -> bool:
        """Whether the bank is on the local disk."""
        return "://" not in self.url

    def address(self, seat: Seat) -> str:
        """Return where a process listens: a name that no file system holds, and no kill leaves."""
        return f"\0membank-{self.name}-{seat}"

    def board(self, seat: Seat) -> Path:
        """Return the file of a process's board."""
        return self.folder / f"board-{seat}"

    def objects(self) -> ObjectStore:
        """Open the bank's storage."""
        # A directory need not survive a loss of power here, and is much quicker so.
        return UnsyncedObjects(self.url) if self.is_directory else open_objects(self.url)

    def open_log_file(self, path: Path, plan: FaultPlan) -> LogFile:
        """Make a file of a journal."""
        return FaultyLogFile(path, plan)

    def config(self) -> ShardConfig:
        """Return settings under which a bank of this size never rests, or hardly ever writes."""
        return ShardConfig(
            durability=self.promise.durability,
            ship_every_s=self.promise.ship_every_s,
            journal_dir=str(self.journal_dir),
            consolidate_bytes=1500 if self.is_restless else 1 << 30,
            segment_bytes=1000,
            resident_bytes=20_000 if self.is_restless else 1 << 30,
            retained_revisions=3,
            lease_s=0.3,
        )
