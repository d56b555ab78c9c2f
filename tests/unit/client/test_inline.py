"""What a sync client does in the thread of its caller, and when it does not."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from core_rig import CONFIG, PATH, base, gradients
from fake_bank import FakeBank
from membank.client import (
    AsyncBankClient,
    BankClient,
    CacheConfig,
    ClientConfig,
)
from membank.client.inline import NeedsLoopError, is_inline, require_loop, run_inline
from membank.client.loop_thread import loop_thread
from membank.wire.errors import DeadlineError, FailedPreconditionError, NotFoundError
from membank.wire.spec import BlockRef
from witness import Witness, WitnessedNetwork


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def network(bank: FakeBank) -> WitnessedNetwork:
    return WitnessedNetwork(bank)


def connect(network: WitnessedNetwork, config: ClientConfig = CONFIG) -> BankClient:
    core = loop_thread().run(AsyncBankClient.connect("gateway:1", config=config, connector=network))
    return BankClient(core, runs_inline=True)


@pytest.fixture
def client(network: WitnessedNetwork) -> Iterator[BankClient]:
    with connect(network) as client:
        client.fetch(PATH)  # the first one connects, for which it takes the loop
        yield client


def threads_of(network: WitnessedNetwork) -> set[threading.Thread]:
    return {thread for shard in network.shards.values() for thread in shard.threads}


def shard_of_path(network: WitnessedNetwork) -> Witness:
    return next(shard for shard in network.shards.values() if shard.threads)


@pytest.fixture
def shard(network: WitnessedNetwork, client: BankClient) -> Witness:
    """The shard of `PATH`, that has seen nothing yet."""
    witness = shard_of_path(network)
    for seen in (witness.threads, witness.timeouts, witness.request_ids):
        seen.clear()
    return witness


def test_calls_are_made_where_the_caller_is(client: BankClient, shard: Witness) -> None:
    client.fetch(PATH)
    client.fetch_blocks(PATH)
    client.push(gradients(*PATH), base=base(*PATH))
    assert shard.threads == [threading.current_thread()] * 3


def test_several_shards_are_asked_at_the_same_time(
    network: WitnessedNetwork, client: BankClient, shard: Witness
) -> None:
    every = [BlockRef(1, cluster) for cluster in range(4)]
    assert list(client.fetch_blocks(every)) == every
    assert threading.current_thread() not in threads_of(network)


def test_what_must_wait_is_made_anew_on_the_loop(client: BankClient, shard: Witness) -> None:
    async def wait() -> None:
        await asyncio.sleep(0)

    shard.before = wait
    assert list(client.fetch(PATH)) == list(PATH)
    here, elsewhere = shard.threads
    assert here is threading.current_thread()
    assert elsewhere is not here


def test_and_reads_its_arguments_once(client: BankClient, shard: Witness) -> None:
    shard.before = _needs_loop
    assert list(client.fetch_blocks(iter(PATH))) == list(PATH)
    assert list(client.fetch_blocks(refs=iter(PATH))) == list(PATH)


def test_and_shares_the_deadline(client: BankClient, shard: Witness) -> None:
    shard.before = _needs_loop
    client.fetch(PATH, timeout_s=2.0)
    first, second = shard.timeouts
    assert 0 < second < first <= 2.0


def test_and_ends_with_it(client: BankClient, shard: Witness) -> None:
    async def late() -> None:
        require_loop()
        raise DeadlineError("late")

    shard.before = late
    with pytest.raises(DeadlineError):
        client.fetch(PATH, timeout_s=1e-6)


def test_a_push_that_is_made_twice_is_one(
    bank: FakeBank, client: BankClient, shard: Witness
) -> None:
    shard.after = require_loop  # the shard has applied it; the answer does not get here
    answer = client.push(gradients(*PATH), base=base(*PATH))
    first, second = shard.request_ids
    assert first == second
    assert answer.duplicate
    assert client.fetch(PATH).versions == dict.fromkeys(PATH, 1)


def test_errors_come_from_where_they_arise(client: BankClient, shard: Witness) -> None:
    with pytest.raises(NotFoundError):
        client.fetch([BlockRef(1, 99)])
    assert not is_inline()


def test_an_interrupt_leaves_the_thread_as_it_was(client: BankClient, shard: Witness) -> None:
    async def interrupt() -> None:
        raise KeyboardInterrupt

    shard.before = interrupt
    with pytest.raises(KeyboardInterrupt):
        client.fetch(PATH)
    assert len(shard.threads) == 1
    assert not is_inline()


def test_a_cache_stays_on_its_loop(bank: FakeBank, network: WitnessedNetwork) -> None:
    with connect(network, ClientConfig(cache=CacheConfig(max_bytes=1 << 20))) as client:
        client.fetch(PATH)
        client.fetch(PATH)
    assert threading.current_thread() not in threads_of(network)


def test_a_connector_of_the_callers_is_called_on_the_loop_alone(network: WitnessedNetwork) -> None:
    with BankClient.connect("gateway:1", config=CONFIG, connector=network) as client:
        client.fetch(PATH)
        client.fetch(PATH)
    assert threading.current_thread() not in threads_of(network)


def test_the_loops_own_thread_is_refused(client: BankClient, shard: Witness) -> None:
    async def call() -> None:
        client.fetch(PATH)

    with pytest.raises(FailedPreconditionError):
        loop_thread().run(call())
    assert not shard.threads


def test_a_coroutine_that_gives_up_is_closed() -> None:
    closed: list[bool] = []

    async def waits() -> None:
        try:
            await asyncio.sleep(0)
        finally:
            closed.append(True)

    with pytest.raises(NeedsLoopError):
        run_inline(waits())
    assert closed == [True]


def test_one_call_may_make_another() -> None:
    async def inner() -> bool:
        return is_inline()

    async def outer() -> tuple[bool, bool]:
        return run_inline(inner()), is_inline()

    assert run_inline(outer()) == (True, True)
    assert not is_inline()


async def _needs_loop() -> None:
    require_loop()
