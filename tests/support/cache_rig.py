"""A cache over two fake shards, with a clock and an ear of the test's."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from fake_bank import SPEC, FakeBank
from in_process import InProcessNetwork
from membank.client import (
    CacheConfig,
    ClientConfig,
    DiskTierConfig,
    FetchedBlocks,
    PushAnswer,
    RetryConfig,
)
from membank.client.blocks import ShardedBlocks
from membank.client.cache.blocks import CachedBlocks
from membank.client.cache.disk_tier import DiskTier
from membank.client.cache.store import BlockStore
from membank.client.deadline import Deadline
from membank.client.shards import ShardMap
from membank.wire.records import Block, BlockEvent, Gradient, Update
from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete, Restore, Withhold

RETRY = RetryConfig(max_attempts=3, initial_backoff_s=0.001, max_backoff_s=0.002)

_STEPS: dict[BlockState, type[Restore | Withhold | Delete]] = {
    BlockState.ACTIVE: Restore,
    BlockState.WITHHELD: Withhold,
    BlockState.DELETED: Delete,
}


class FakeEar:
    """Passes on what a test says, in spans of the test's."""

    def __init__(self) -> None:
        self.span: int | None = 1
        self.is_closed = False
        self.hear: Callable[[BlockEvent], None] = lambda event: None
        self.hear_again: Callable[[], None] = lambda: None

    def listen(self, hear: Callable[[BlockEvent], None], hear_again: Callable[[], None]) -> None:
        self.hear, self.hear_again = hear, hear_again

    async def close(self) -> None:
        self.is_closed = True


class CacheRig:
    """A cache over two shards, and files where a disk tier is given.

    Parameters
    ----------
    max_staleness_s
        As in `CacheConfig`.
    max_bytes
        As in `CacheConfig`.
    disk
        As in `CacheConfig`.
    """

    def __init__(
        self,
        max_staleness_s: float = 0.0,
        max_bytes: int = 1 << 20,
        disk: DiskTierConfig | None = None,
    ) -> None:
        self.bank = FakeBank()
        self.network = InProcessNetwork(self.bank)
        self.shards = ShardMap(self.network.GATEWAY, self.network, grace_s=1.0)
        self.now_s = 100.0
        self.config = CacheConfig(max_bytes=max_bytes, max_staleness_s=max_staleness_s, disk=disk)
        self.start()

    def start(self) -> None:
        """Begin with a new cache, as another process would."""
        disk = self.config.disk
        self.ear = FakeEar()
        self.disk = None if disk is None else DiskTier(disk, SPEC, clock=lambda: self.now_s)
        self.store = BlockStore(self.config, None if self.disk is None else self.disk.put)
        self.cache = CachedBlocks(
            ShardedBlocks(self.shards, SPEC, ClientConfig(retry=RETRY)),
            self.config,
            store=self.store,
            ear=self.ear,
            disk=self.disk,
            last_removal=self.last_removal,
            clock=lambda: self.now_s,
        )

    async def restart(self) -> None:
        """End, and begin with a new cache."""
        await self.cache.close()
        self.start()

    async def last_removal(self) -> int:
        return (await self.network(self.network.GATEWAY).get_bank(timeout_s=1.0)).removal_revision

    async def settle(self) -> None:
        """Wait until nothing is under way to or from the files."""
        if self.cache._looking is not None:
            await self.cache._looking
        if self.disk is not None and self.disk._folder is not None:
            await self.disk.flush()

    async def fetch(
        self,
        *refs: BlockRef,
        held: Mapping[BlockRef, Block] | None = None,
        dtype: str = "float32",
        min_revision: int = 0,
        snapshot: str = "",
    ) -> FetchedBlocks:
        await self.shards.info(timeout_s=1.0)
        return await self.cache.fetch(
            refs,
            held=held or {},
            dtype=dtype,
            min_revision=min_revision,
            snapshot=snapshot,
            deadline=Deadline.after(5.0),
        )

    async def push(self, ref: BlockRef, *, base: int) -> PushAnswer:
        gradient = Gradient(ref=ref, base_version=base, values=ones(ref))
        update = Update(request_id=f"push-{ref}-{base}", step=1, gradients=(gradient,))
        return await self.cache.push(update, deadline=Deadline.after(5.0))

    def swap(self, *refs: BlockRef, value: float = 3.0) -> None:
        weights = {ref: value * ones(ref) for ref in refs}
        self.bank.swap(weights, {}, request_id="", dry_run=False)

    def set_state(self, ref: BlockRef, state: BlockState) -> None:
        self.bank.apply([_STEPS[state](topic=ref)], request_id="", dry_run=False)

    def tell(self, *refs: BlockRef) -> None:
        """Let the cache hear how blocks are by now."""
        for ref in refs:
            kept, revision = self.bank.held(ref), self.bank.revision
            self.ear.hear(
                BlockEvent(ref=ref, version=kept.version, state=kept.state, revision=revision)
            )

    @property
    def num_asked(self) -> int:
        return sum(script.num_calls("fetch") for script in self.network.scripts.values())

    @property
    def num_sent(self) -> int:
        return sum(shard.num_weights_sent for shard in self.bank.shards)

    @property
    def counts(self) -> tuple[int, int, int]:
        stats = self.cache.stats
        return (stats.num_hits, stats.num_confirmed, stats.num_misses)


def ones(ref: BlockRef) -> NDArray[np.float32]:
    return np.ones(SPEC.block_shape(ref.level), np.float32)
