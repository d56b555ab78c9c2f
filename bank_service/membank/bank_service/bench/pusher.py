"""A shard and a trainer that is alone with it."""

from __future__ import annotations

import numpy as np

from membank.bank_service.bench.banks import update_of
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.store.bank import Bank
from membank.wire.spec import Array, BlockRef


class Pusher:
    """A shard of a whole bank, and a trainer that is alone with it.

    Parameters
    ----------
    bank
        The bank.
    refs
        Blocks to push to, in turn.
    config
        Settings of the shard; without them, nothing is folded but when the benchmark says so.
    """

    def __init__(self, bank: Bank, refs: list[BlockRef], config: ShardConfig | None = None) -> None:
        self.shard = Shard.open(bank, config=config or ShardConfig(consolidate_bytes=1 << 40))
        """The shard."""
        self._refs = refs
        self._versions = {status.ref: status.version for status in self.shard.describe(refs)}
        self._values: Array = np.full(bank.spec.block_shape(1), 1e-3, np.float32)
        self._count = 0

    def push(self, count: int) -> None:
        """Push `count` updates of one block each."""
        for _ in range(count):
            ref = self._refs[self._count % len(self._refs)]
            self._count += 1
            update = update_of(f"bench-{self._count}", ref, self._versions[ref], self._values)
            (result,) = self.shard.push(update).results
            assert result.accepted, result
            self._versions[ref] = result.version
