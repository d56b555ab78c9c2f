"""The cache of a whole client, kept true by the watch streams of its shards."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from faults import Fault
from in_process import InProcessNetwork
from membank.client import (
    AsyncBankClient,
    BankClient,
    CacheConfig,
    CacheStats,
    ClientConfig,
    RetryConfig,
)
from membank.wire.spec import BlockRef
from membank.wire.steps import Delete, Withhold

PATH = (BlockRef(1, 0), BlockRef(2, 1))
OTHER = BlockRef(1, 1)
CONFIG = ClientConfig(
    timeout_s=10.0,
    retry=RetryConfig(max_attempts=50, initial_backoff_s=0.001, max_backoff_s=0.01),
    cache=CacheConfig(max_staleness_s=60.0),
)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def network(bank: FakeBank) -> InProcessNetwork:
    return InProcessNetwork(bank)


@pytest.fixture
async def client(network: InProcessNetwork) -> AsyncIterator[AsyncBankClient]:
    async with await AsyncBankClient.connect(
        network.GATEWAY, config=CONFIG, connector=network
    ) as client:
        yield client


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110  # of fakes, which have no event
        await asyncio.sleep(0)


def stats_of(client: AsyncBankClient | BankClient) -> CacheStats:
    stats = client.cache_stats
    assert stats is not None
    return stats


async def fetch_until_hit(client: AsyncBankClient, *refs: BlockRef) -> None:
    """Fetch until the cache answers: its watch is on and all was confirmed since."""
    before = stats_of(client).num_hits if client.cache_stats else 0
    while client.cache_stats is None or stats_of(client).num_hits == before:
        await client.fetch(refs)


async def test_off_unless_configured(network: InProcessNetwork, bank: FakeBank) -> None:
    async with await AsyncBankClient.connect(network.GATEWAY, connector=network) as client:
        await client.fetch(PATH)
        await client.fetch(PATH)
        assert client.cache_stats is None
    assert bank.shards[0].num_weights_sent == 4
    assert not bank.shards[0].subscriptions


async def test_answers_from_memory_until_it_hears_otherwise(
    bank: FakeBank, network: InProcessNetwork, client: AsyncBankClient
) -> None:
    await fetch_until_hit(client, *PATH)
    asked = network.scripts["shard:1"].num_calls("fetch")
    await client.fetch(PATH)
    assert network.scripts["shard:1"].num_calls("fetch") == asked
    bank.swap({PATH[1]: np.ones(SPEC.block_shape(2), np.float32)}, {}, request_id="", dry_run=False)
    await until(lambda: stats_of(client).num_blocks == 1)
    assert (await client.fetch(PATH)).versions == {PATH[0]: 0, PATH[1]: 1}


async def test_reads_its_own_pushes(client: AsyncBankClient) -> None:
    await fetch_until_hit(client, *PATH)
    gradient = np.ones(SPEC.block_shape(1), np.float32)
    await client.push({PATH[0]: gradient}, base={PATH[0]: 0})
    assert (await client.fetch(PATH)).versions == {PATH[0]: 1, PATH[1]: 0}


async def test_what_others_withhold_is_let_go_unasked(
    bank: FakeBank, client: AsyncBankClient
) -> None:
    await fetch_until_hit(client, *PATH, OTHER)
    bank.apply([Withhold(topic=PATH[0])], request_id="", dry_run=False)
    await until(lambda: stats_of(client).num_blocks == 1)
    memory = await client.fetch(PATH)
    assert (list(memory), memory.ended_at) == ([], PATH[0])


async def test_what_the_client_deletes_is_let_go_at_once(client: AsyncBankClient) -> None:
    await client.fetch([*PATH, OTHER])
    await client.delete(PATH[0], dry_run=True)
    assert stats_of(client).num_blocks == 3
    await client.delete(PATH[0])
    assert stats_of(client).num_blocks == 1


async def test_who_asks_every_time_hears_of_removals_alone(
    bank: FakeBank, network: InProcessNetwork
) -> None:
    config = replace(CONFIG, cache=CacheConfig())
    async with await AsyncBankClient.connect(
        network.GATEWAY, config=config, connector=network
    ) as client:
        await client.fetch(PATH)
        await until(lambda: all(shard.subscriptions for shard in bank.shards))
        assert all(s._admin_only for shard in bank.shards for s in shard.subscriptions)
        await client.fetch(PATH)
        bank.apply([Delete(topic=PATH[1])], request_id="", dry_run=False)
        await until(lambda: stats_of(client).num_blocks == 1)
    assert all(s.is_closed for shard in bank.shards for s in shard.subscriptions)


class TestOverGrpc:
    @pytest.fixture
    def service(self, bank: FakeBank) -> Iterator[FakeService]:
        service = FakeService(bank)
        yield service
        service.close()

    async def test_a_watch_that_is_refused_is_begun_again(
        self, bank: FakeBank, service: FakeService
    ) -> None:
        service.scripts["shard-0"].plan("WatchBlocks", Fault.INTERNAL)
        async with await AsyncBankClient.connect(service.endpoint, config=CONFIG) as client:
            await fetch_until_hit(client, *PATH)
            bank.apply([Delete(topic=PATH[1])], request_id="", dry_run=False)
            await until(lambda: stats_of(client).num_blocks == 1)
        assert service.scripts["shard-0"].num_calls("WatchBlocks") > 1

    async def test_asks_again_once_a_stream_has_broken(
        self, bank: FakeBank, service: FakeService
    ) -> None:
        async with await AsyncBankClient.connect(service.endpoint, config=CONFIG) as client:
            await fetch_until_hit(client, *PATH)
            bank.held(PATH[0]).version = 5
            for subscription in bank.shards[0].subscriptions:
                subscription.close()
            await service.scripts["shard-0"].wait_for("WatchBlocks", 2)
            assert (await client.fetch(PATH)).versions == {PATH[0]: 5, PATH[1]: 0}
            await fetch_until_hit(client, *PATH)

    def test_the_sync_client_has_it_too(self, service: FakeService) -> None:
        with BankClient.connect(service.endpoint, config=CONFIG) as client:
            assert client.cache_stats is None
            client.fetch(PATH)
            client.fetch(PATH)
            assert stats_of(client).num_misses == 2
