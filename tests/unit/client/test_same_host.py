"""The way through shared memory gives way to gRPC wherever it fails, and says so."""

from __future__ import annotations

import asyncio
import mmap
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from fake_bank import FakeBank
from fake_service import FakeService
from membank.bank_service.rpc.same_host import SameHostDoor as HostDoor
from membank.client import AsyncBankClient, BankClient, ClientConfig, SameHostConfig
from membank.client.transport.contract import SameHostDoor
from membank.client.transport.same_host import SameHostCounters, SameHostTransport
from membank.v1 import same_host_pb2 as host_pb
from membank.wire.copying import copy_checked
from membank.wire.errors import DeadlineError, NotFoundError, UnavailableError
from membank.wire.same_host import MessageSocket, abstract_address, boot_id
from membank.wire.shared_memory import Bytes
from membank.wire.spec import Array, BlockRef

TIMEOUT_S = 10.0
TOPIC = BlockRef(1, 0)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank, same_host=True)
    yield service
    service.close()


@pytest.fixture
async def transport(bank: FakeBank, service: FakeService) -> AsyncIterator[SameHostTransport]:
    async with a_transport(bank) as transport:
        yield transport


@asynccontextmanager
async def a_transport(bank: FakeBank) -> AsyncIterator[SameHostTransport]:
    endpoint = bank.endpoints[bank.shard_of(TOPIC).shard_id]
    transport = SameHostTransport(endpoint, ClientConfig(), SameHostConfig(), SameHostCounters())
    yield transport
    await transport.close()


async def fetched(transport: SameHostTransport, timeout_s: float = TIMEOUT_S) -> bytes:
    answer = await transport.fetch([TOPIC], timeout_s=timeout_s)
    weight = answer.blocks[0].weight
    assert weight is not None
    return weight.tobytes()


def content(bank: FakeBank) -> bytes:
    return bank.shard_of(TOPIC).blocks[TOPIC].weight.tobytes()


async def test_a_client_uses_it_by_itself(bank: FakeBank, service: FakeService) -> None:
    async with await AsyncBankClient.connect(service.endpoint) as client:
        await client.fetch_blocks([TOPIC])
        assert client.same_host_stats.num_fetches == 1
        assert client.same_host_stats.fallbacks == {}
    config = ClientConfig(same_host=None)
    async with await AsyncBankClient.connect(service.endpoint, config=config) as client:
        await client.fetch_blocks([TOPIC])
        assert client.same_host_stats.num_fetches == 0


async def test_a_service_without_a_door(bank: FakeBank) -> None:
    service = FakeService(bank)
    async with a_transport(bank) as transport:
        for _ in range(2):
            assert await fetched(transport) == content(bank)
        assert transport.stats.fallbacks == {"not offered": 2}
    service.close()


async def test_a_shard_on_another_machine_is_not_tried(
    bank: FakeBank, transport: SameHostTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("membank.client.transport.same_host.boot_id", lambda: "another kernel")
    assert await fetched(transport) == content(bank)
    assert transport.stats.fallbacks == {"other host": 1}


async def test_another_user_is_not_let_in(
    bank: FakeBank, transport: SameHostTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("membank.bank_service.rpc.same_host.os.geteuid", lambda: 12345)
    assert await fetched(transport) == content(bank)
    assert transport.stats.fallbacks == {"not let in": 1}


async def test_a_door_that_closed_meanwhile(
    bank: FakeBank, service: FakeService, transport: SameHostTransport
) -> None:
    await fetched(transport)
    service.doors[bank.shard_of(TOPIC).shard_id].close()
    for _ in range(2):
        assert await fetched(transport) == content(bank)
    assert transport.stats.num_fetches == 1
    assert transport.stats.fallbacks == {"broken": 1, "not let in": 1}


async def test_memory_that_changes_while_it_is_copied(
    bank: FakeBank, transport: SameHostTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "membank.client.transport.same_host_connection.copy_checked",
        lambda target, source: copy_checked(target, source) ^ 1,
    )
    assert await fetched(transport) == content(bank)
    assert transport.stats.fallbacks == {"broken": 1}


async def test_an_error_of_the_shard_is_no_reason_to_ask_again(
    transport: SameHostTransport,
) -> None:
    with pytest.raises(NotFoundError):
        await transport.fetch([TOPIC], snapshot="none", timeout_s=TIMEOUT_S)
    await fetched(transport)
    assert transport.stats.num_fetches == 1
    assert transport.stats.fallbacks == {}


class Deaf:
    """A door that lets callers in and never answers."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(abstract_address("membank-test-deaf"))
        self._listener.listen()
        self.messages: list[MessageSocket] = []
        self.heard = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        messages = MessageSocket(self._listener.accept()[0])
        self.messages.append(messages)
        messages.receive(host_pb.SameHostRequest)
        messages.send(host_pb.SameHostResponse(welcome=host_pb.SameHostWelcome()))
        messages.receive(host_pb.SameHostRequest)
        self.heard.set()

    def close(self) -> None:
        self._thread.join()
        self.messages[0].close()
        self._listener.close()


@pytest.fixture
def deaf(transport: SameHostTransport, monkeypatch: pytest.MonkeyPatch) -> Iterator[Deaf]:
    deaf = Deaf()

    async def get_same_host_door(*, timeout_s: float) -> SameHostDoor:
        return SameHostDoor(boot_id=boot_id(), socket_name="membank-test-deaf", ticket=b"")

    monkeypatch.setattr(transport, "get_same_host_door", get_same_host_door)
    yield deaf
    deaf.close()


async def test_a_shard_that_hangs_is_given_up_in_time(
    deaf: Deaf, transport: SameHostTransport
) -> None:
    with pytest.raises(DeadlineError):
        await fetched(transport, timeout_s=0.1)
    assert transport.stats.num_fetches == 0


async def test_a_call_that_is_cancelled_ends_its_connection(
    deaf: Deaf, transport: SameHostTransport
) -> None:
    call = asyncio.create_task(fetched(transport))
    await asyncio.to_thread(deaf.heard.wait, TIMEOUT_S)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    deaf.messages[0].set_timeout(TIMEOUT_S)
    with pytest.raises(ConnectionError):
        await asyncio.to_thread(deaf.messages[0].receive, host_pb.SameHostRequest)


async def test_a_call_that_was_cancelled_writes_nothing_later(
    bank: FakeBank, transport: SameHostTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    await fetched(transport)
    copying, go_on = threading.Event(), threading.Event()

    def copy_slowly(target: Bytes, source: Bytes) -> int:
        copying.set()
        go_on.wait(TIMEOUT_S)
        return copy_checked(target, source)

    monkeypatch.setattr("membank.client.transport.same_host_connection.copy_checked", copy_slowly)
    buffer = np.zeros(bank.spec.block_shape(1), bank.spec.numpy_dtype)
    call = asyncio.create_task(transport.fetch([TOPIC], into={TOPIC: buffer}, timeout_s=TIMEOUT_S))
    await asyncio.to_thread(copying.wait, TIMEOUT_S)
    for _ in range(2):
        call.cancel()
        await asyncio.sleep(0)
    assert not call.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_many_calls_at_once_share_the_connections(
    bank: FakeBank, service: FakeService, transport: SameHostTransport
) -> None:
    answers = await asyncio.gather(*(fetched(transport) for _ in range(40)))
    assert set(answers) == {content(bank)}
    assert transport.stats.num_fetches == 40
    door = service.doors[bank.shard_of(TOPIC).shard_id]
    assert door.num_connections <= SameHostConfig().max_connections


# ---- blocks that are borrowed


async def test_what_is_borrowed_lies_in_the_memory_of_the_shard(
    bank: FakeBank, service: FakeService
) -> None:
    door = service.doors[bank.shard_of(TOPIC).shard_id]
    async with await AsyncBankClient.connect(service.endpoint) as client:
        async with client.borrow([TOPIC]) as blocks:
            weight = blocks[TOPIC].weight
            assert weight is not None
            assert weight.tobytes() == content(bank)
            assert not weight.flags.writeable
            assert isinstance(_memory_under(weight), mmap.mmap)
            assert door._calls._budget.used_bytes == weight.nbytes
        fetched_too = await client.fetch_blocks([TOPIC])
        assert fetched_too[TOPIC].version == blocks[TOPIC].version
        assert client.same_host_stats.num_borrows == 1
    for connection in list(door._connections):
        await asyncio.to_thread(connection.join, TIMEOUT_S)
    assert door._calls._budget.used_bytes == 0


async def test_blocks_of_several_shards_are_borrowed_together(
    bank: FakeBank, service: FakeService
) -> None:
    refs = [BlockRef(1, cluster) for cluster in range(2)]
    assert bank.shard_of(refs[0]) is not bank.shard_of(refs[1])
    async with await AsyncBankClient.connect(service.endpoint) as client:
        async with client.borrow(refs) as blocks:
            assert list(blocks) == refs
        assert client.same_host_stats.num_borrows == 2


async def test_what_was_borrowed_goes_back_after_an_error_too(
    bank: FakeBank, service: FakeService
) -> None:
    door = service.doors[bank.shard_of(TOPIC).shard_id]
    async with await AsyncBankClient.connect(service.endpoint) as client:
        with pytest.raises(KeyError):
            async with client.borrow([TOPIC]) as blocks:
                raise KeyError(blocks[TOPIC].version)
        # Long before the lease ends, and although the connection is kept.
        await asyncio.to_thread(_wait_until_returned, door)
        assert door.num_connections == 1


async def test_what_cannot_be_borrowed_is_fetched(bank: FakeBank) -> None:
    service = FakeService(bank)
    async with await AsyncBankClient.connect(service.endpoint) as client:
        async with client.borrow([TOPIC]) as blocks:
            weight = blocks[TOPIC].weight
            assert weight is not None
            assert weight.tobytes() == content(bank)
        assert client.same_host_stats.num_borrows == 0
        with pytest.raises(NotFoundError):
            async with client.borrow([BlockRef(1, 99)]):
                pass
    service.close()


async def test_a_lease_that_was_overstayed_is_told(bank: FakeBank, service: FakeService) -> None:
    door = service.doors[bank.shard_of(TOPIC).shard_id]
    door._lease_s = 0.05
    async with await AsyncBankClient.connect(service.endpoint) as client:
        lease = client.borrow([TOPIC])
        await lease.__aenter__()
        for connection in list(door._connections):
            await asyncio.to_thread(connection.join, TIMEOUT_S)
        with pytest.raises(UnavailableError, match="took the memory"):
            await lease.__aexit__(None, None, None)
        async with client.borrow([TOPIC]) as blocks:
            assert blocks[TOPIC].weight is not None


def test_a_sync_client_borrows_too(bank: FakeBank, service: FakeService) -> None:
    with BankClient.connect(service.endpoint) as client, client.borrow([TOPIC]) as blocks:
        weight = blocks[TOPIC].weight
        assert weight is not None
        assert weight.tobytes() == content(bank)
        assert client.same_host_stats.num_borrows == 1


def _wait_until_returned(door: HostDoor) -> None:
    ends = time.monotonic() + TIMEOUT_S
    while door._calls._budget.used_bytes:
        assert time.monotonic() < ends, "what was borrowed is still lent"
        threading.Event().wait(0.01)


def _memory_under(array: Array) -> object:
    under: object = array
    while isinstance(under, np.ndarray):
        under = under.base
    return under.obj if isinstance(under, memoryview) else under
