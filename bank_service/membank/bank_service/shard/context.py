"""What the partitions of one shard share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from membank.bank_service.shard.config import ShardConfig
from membank.bank_service.shard.lease import boot_clock
from membank.bank_service.shard.maintenance import InlineMaintenance, Maintenance
from membank.bank_service.shard.residency import Residency
from membank.bank_service.shard.update_rule import UpdateRule
from membank.bank_service.shard.watch import WatchHub
from membank.bank_service.store.bank import Bank
from membank.bank_service.store.journal import LogFile, PosixLogFile
from membank.wire.loaders import Loaders


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardContext:
    """Collaborators of every partition of a shard."""

    bank: Bank
    """The bank."""
    config: ShardConfig
    """Settings."""
    rule: UpdateRule
    """Applies gradients."""
    residency: Residency
    """Decides what stays in memory."""
    hub: WatchHub
    """Tells watchers."""
    num_partitions: int
    """Partitions that share all this."""
    maintenance: Maintenance = field(default_factory=InlineMaintenance)
    """Runs what nobody waits for."""
    clock: Callable[[], float] = boot_clock
    """Seconds, monotonic, the time that the machine slept included."""
    sleep: Callable[[float], None] = time.sleep
    """Waits for some seconds."""
    wall_clock: Callable[[], float] = time.time
    """Seconds since 1970-01-01 UTC."""
    open_log_file: Callable[[Path], LogFile] = PosixLogFile
    """Makes the files of journals."""
    loaders: Loaders = field(default_factory=Loaders)
    """Load contents from storage side by side."""
    state_lock: Lock = field(default_factory=Lock)
    """Guards what all partitions know of blocks, and the revision in force; never held during
    input or output."""

    @property
    def dirty_share_bytes(self) -> int:
        """Bytes of dirty blocks at which a partition writes them back.

        All partitions may have twice that, and one consolidation holds as much again; together
        that is within the budget.
        """
        return max(1, self.config.resident_bytes // 3 // self.num_partitions)
