"""A shard of a bank: fetches, updates, transactions, recovery.

`contract` says what a shard offers (`ShardApi`), `shard.Shard` is it in this process. Under it:
`reader` (consistent reads), `partition` (updates and consolidation), `participant` (transactions),
`recovery` (start), `partition_store` (slots and manifests), `optimizer`, `residency`, `watch`.
"""

from __future__ import annotations

import typing

from membank.bank_service.shard.config import Durability, ShardConfig
from membank.bank_service.shard.contract import ShardApi

if typing.TYPE_CHECKING:
    from membank.bank_service.shard.shard import Shard

__all__ = ["Durability", "Shard", "ShardApi", "ShardConfig"]


def __getattr__(name: str) -> object:
    # The engine brings torch along: seconds that the controller and the command do not have.
    if name == "Shard":
        from membank.bank_service.shard.shard import Shard

        return Shard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
