"""A shard of a bank: fetches, updates, transactions, recovery.

`contract` says what a shard offers (`ShardApi`), `shard.Shard` is it in this process. Under it:
`reader` (consistent reads), `partition` (updates and consolidation), `participant` (transactions),
`recovery` (start), `partition_store` (slots and manifests), `optimizer`, `residency`, `watch`.
"""

from membank.bank_service.shard.config import Durability, ShardConfig
from membank.bank_service.shard.contract import ShardApi
from membank.bank_service.shard.shard import Shard

__all__ = ["Durability", "Shard", "ShardApi", "ShardConfig"]
