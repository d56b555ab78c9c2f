"""Watching all shards as one stream."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from faults import Fault
from in_process import InProcessNetwork
from membank.client import (
    AsyncBankClient,
    Changes,
    ClientConfig,
    RetryConfig,
    grpc_connector,
)
from membank.client.shards import ShardMap
from membank.client.watching import ShardWatch
from membank.wire.errors import InternalError, UnavailableError
from membank.wire.spec import BlockRef, BlockState

ACROSS = (BlockRef(1, 0), BlockRef(1, 1))
CONFIG = ClientConfig(
    timeout_s=10.0, retry=RetryConfig(max_attempts=20, initial_backoff_s=0.001, max_backoff_s=0.02)
)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[AsyncBankClient]:
    async with await AsyncBankClient.connect(service.endpoint, config=CONFIG) as client:
        yield client


def withhold(bank: FakeBank, ref: BlockRef) -> None:
    bank.transact("withhold", [ref], lambda _, kept: setattr(kept, "state", BlockState.WITHHELD))


async def changed(changes: AsyncGenerator[Changes], count: int) -> set[BlockRef]:
    """Return the blocks of the next `count` events."""
    refs: list[BlockRef] = []
    while len(refs) < count:
        refs += [event.ref for event in (await anext(changes)).events]
    return set(refs)


async def test_in_process_too(bank: FakeBank) -> None:
    network = InProcessNetwork(bank)
    async with (
        await AsyncBankClient.connect(network.GATEWAY, connector=network) as client,
        aclosing(client.watch()) as changes,
    ):
        assert await anext(changes) == Changes()
        for ref in ACROSS:
            withhold(bank, ref)
        assert await changed(changes, 2) == set(ACROSS)
    assert all(s.is_closed for shard in bank.shards for s in shard.subscriptions)


async def test_says_nothing_before_it_is_on(bank: FakeBank) -> None:
    network = InProcessNetwork(bank)
    network.remove("shard:2")
    async with (
        await AsyncBankClient.connect(network.GATEWAY, config=CONFIG, connector=network) as client,
        aclosing(client.watch()) as changes,
    ):
        first = asyncio.create_task(anext(changes))
        while not bank.shards[0].subscriptions:  # noqa: ASYNC110  # of a fake, which has no event
            await asyncio.sleep(0)
        withhold(bank, ACROSS[0])
        await asyncio.to_thread(bank.shards[0].subscriptions[0].wait_until_read)
        network.place("shard-1", bank.shards[1], "shard:3")
        assert await first == Changes()


async def test_merges_all_shards(bank: FakeBank, client: AsyncBankClient) -> None:
    async with aclosing(client.watch()) as changes:
        assert await anext(changes) == Changes()
        for ref in ACROSS:
            withhold(bank, ref)
        assert await changed(changes, 2) == set(ACROSS)


async def test_asks_only_the_shards_of_its_blocks(
    bank: FakeBank, service: FakeService, client: AsyncBankClient
) -> None:
    async with aclosing(client.watch([ACROSS[0]], admin_only=True)) as changes:
        await anext(changes)
        gradient = np.ones(SPEC.block_shape(1), np.float32)
        await client.push({ACROSS[0]: gradient}, base={ACROSS[0]: 0})
        withhold(bank, ACROSS[1])
        withhold(bank, ACROSS[0])
        (event,) = (await anext(changes)).events
    assert (event.ref, event.version, event.state) == (ACROSS[0], 2, BlockState.WITHHELD)
    assert service.scripts["shard-1"].num_calls("WatchBlocks") == 0


async def test_says_that_there_was_a_gap(
    bank: FakeBank, service: FakeService, client: AsyncBankClient
) -> None:
    async with aclosing(client.watch()) as changes:
        assert await anext(changes) == Changes()
        for subscription in bank.shards[0].subscriptions:
            subscription.close()
        assert await anext(changes) == Changes(is_gap=True)
        withhold(bank, ACROSS[0])
        assert await changed(changes, 1) == {ACROSS[0]}


async def test_a_span_ends_with_the_stream_and_another_begins_with_the_next(
    bank: FakeBank, service: FakeService
) -> None:
    shards = ShardMap(service.endpoint, grpc_connector(CONFIG), grace_s=1.0)
    await shards.refresh(timeout_s=10.0)
    watch = ShardWatch(shards, SPEC, (), admin_only=False, config=CONFIG)
    spans = [watch.span]
    watch.follow_placement(is_gap=False)
    spans.append(watch.span)
    assert await watch.next() == Changes()
    spans.append(watch.span)
    withhold(bank, ACROSS[0])
    await watch.next()
    spans.append(watch.span)
    bank.shards[0].subscriptions[0].close()
    assert await watch.next() == Changes(is_gap=True)
    spans.append(watch.span)
    before, opening, first, same, second = spans
    assert (before, opening) == (None, None)
    assert first is not None
    assert (same == first, second in (None, first)) == (True, False)
    await watch.close()
    await shards.close()


async def test_counts_only_failures_in_a_row(bank: FakeBank, service: FakeService) -> None:
    config = replace(CONFIG, retry=replace(CONFIG.retry, max_attempts=2))
    async with (
        await AsyncBankClient.connect(service.endpoint, config=config) as client,
        aclosing(client.watch([ACROSS[0]])) as changes,
    ):
        await anext(changes)
        for _ in range(4):
            bank.shards[0].subscriptions[-1].close()
            assert await anext(changes) == Changes(is_gap=True)


async def test_follows_a_shard_to_its_new_port(
    bank: FakeBank, service: FakeService, client: AsyncBankClient
) -> None:
    async with aclosing(client.watch()) as changes:
        assert await anext(changes) == Changes()
        service.stop_server("shard-0")
        service.start_shard(bank.shards[0])
        assert await anext(changes) == Changes(is_gap=True)
        withhold(bank, ACROSS[0])
        withhold(bank, ACROSS[1])
        assert await changed(changes, 2) == set(ACROSS)


async def test_starts_where_a_shard_is_not_there_yet(
    bank: FakeBank, service: FakeService, client: AsyncBankClient
) -> None:
    service.stop_server("shard-0")
    async with aclosing(client.watch()) as changes:
        first = asyncio.create_task(anext(changes))
        await service.script.wait_for("GetBank", 3)
        service.start_shard(bank.shards[0])
        assert await first == Changes()
        withhold(bank, ACROSS[0])
        assert await changed(changes, 1) == {ACROSS[0]}


async def test_ends_where_a_shard_stays_away(service: FakeService, client: AsyncBankClient) -> None:
    async with aclosing(client.watch()) as changes:
        await anext(changes)
        service.stop_server("shard-0")
        with pytest.raises(UnavailableError):
            await anext(changes)


async def test_ends_with_an_answer_that_is_no_silence(
    service: FakeService, client: AsyncBankClient
) -> None:
    service.scripts["shard-1"].plan("WatchBlocks", Fault.INTERNAL)
    async with aclosing(client.watch()) as changes:
        with pytest.raises(InternalError):
            await changed(changes, 1)
