"""The port for data that a shard tells of: who goes there, when, and who comes back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import cast

import numpy as np
import pytest

from direct_rigs import Grpcio, Server
from fake_bank import FakeBank
from fake_service import FakeService
from http2_scripts import (
    REFS,
    SETTINGS,
    answer_messages,
    data,
    head,
    headers_frame,
    message,
    request_of,
    trailers,
)
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.direct import DataListener
from membank.bank_service.rpc.server import ServerConfig
from membank.bank_service.shard import ShardApi
from membank.client import BankClient, ClientConfig, GrpcTransport
from membank.client.transport import data_port, direct_calls
from membank.client.transport.data_port import DataPort
from membank.client.transport.direct_calls import DirectCalls
from membank.client.transport.landing import Landing
from membank.wire.alternative import ALTERNATIVE_KEY, Alternative
from membank.wire.buffers import BufferPool
from membank.wire.errors import UnavailableError
from membank.wire.http2.frames import WORD, Frame, frame

TOPIC = REFS[0]
TIMEOUT_S = 10.0


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank, data_port=True)
    yield service
    service.close()


@pytest.fixture
async def transport(bank: FakeBank, service: FakeService) -> AsyncIterator[GrpcTransport]:
    transport = GrpcTransport(bank.endpoints[bank.shard_of(TOPIC).shard_id], ClientConfig())
    yield transport
    await transport.close()


async def fetch(transport: GrpcTransport, bank: FakeBank) -> tuple[int, int, dict[str, int]]:
    """Fetch, check what comes, and return how many went where."""
    answer = await transport.fetch([TOPIC], timeout_s=TIMEOUT_S)
    np.testing.assert_array_equal(answer.blocks[0].weight, bank.held(TOPIC).weight)
    stats = transport.direct_stats
    return stats.num_data_port, stats.num_data_port_failures, dict(stats.fallbacks)


def listener_of(bank: FakeBank, service: FakeService) -> DataListener:
    return service.data[bank.shard_of(TOPIC).shard_id]


def replaced(
    bank: FakeBank, service: FakeService, *, port: int = 0, shard: object = None
) -> DataListener:
    """Stop the listener of a shard and start another one; nobody is told of it yet."""
    listener_of(bank, service).stop(within_s=0.0)
    shard = cast("ShardApi", shard or bank.shard_of(TOPIC))
    return DataListener(ServerConfig(data_port=port, drain_s=0.0), shard, ByteBudget(1 << 30))


async def test_the_second_call_goes_there(
    bank: FakeBank, service: FakeService, transport: GrpcTransport
) -> None:
    for number in range(4):
        assert await fetch(transport, bank) == (number, 0, {})
    assert listener_of(bank, service).num_connections == 1


async def test_a_port_where_nobody_is_costs_no_call(
    bank: FakeBank,
    service: FakeService,
    transport: GrpcTransport,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener_of(bank, service).stop()
    for failures in (0, 1, 1, 1):
        assert await fetch(transport, bank) == (0, failures, {})
    # Once the pause is over it is tried again.
    monkeypatch.setattr(data_port, "_PAUSE_S", -1.0)
    transport._direct._data_port._paused_until = 0.0  # type: ignore[union-attr]
    for failures in (1, 2, 3):
        assert await fetch(transport, bank) == (0, failures, {})


async def test_a_server_that_starts_again_elsewhere_is_found(
    bank: FakeBank, service: FakeService, transport: GrpcTransport
) -> None:
    for number in range(3):
        assert await fetch(transport, bank) == (number, 0, {})
    again = replaced(bank, service)
    try:
        # Its old port is gone; the endpoint tells of the new one.
        service.tell_of(bank.shard_of(TOPIC).shard_id, again)
        assert await fetch(transport, bank) == (2, 1, {})
        assert await fetch(transport, bank) == (3, 1, {})
    finally:
        again.stop()


async def test_a_port_that_is_another_servers_by_now_answers_with_nothing(
    bank: FakeBank, service: FakeService, transport: GrpcTransport
) -> None:
    for number in range(3):
        assert await fetch(transport, bank) == (number, 0, {})
    old = listener_of(bank, service).alternative.port
    other_bank = FakeBank()
    other_bank.held(TOPIC).weight = other_bank.held(TOPIC).weight + 1
    other = replaced(bank, service, port=old, shard=other_bank.shard_of(TOPIC))
    try:
        assert await fetch(transport, bank) == (2, 1, {"data port": 1})
        assert await fetch(transport, bank) == (2, 1, {"data port": 1})
    finally:
        other.stop()


async def test_a_shard_that_moves_is_followed(bank: FakeBank, service: FakeService) -> None:
    config = ClientConfig(same_host=None)
    shard = bank.shard_of(TOPIC)

    def fetch_thrice() -> None:
        with BankClient.connect(service.endpoint, config=config) as client:
            for _ in range(3):
                client.fetch_blocks([TOPIC])
            assert listener_of(bank, service).num_connections == 1
            service.stop_server(shard.shard_id)
            service.start_shard(shard)
            for _ in range(3):
                weight = client.fetch_blocks([TOPIC])[TOPIC].weight
                np.testing.assert_array_equal(weight, bank.held(TOPIC).weight)
            assert listener_of(bank, service).num_connections == 1

    fetch_thrice()


def telling(bank: FakeBank, port: int) -> bytes:
    """Return an answer that tells of another port."""
    first = headers_frame(
        [
            (":status", "200"),
            ("content-type", "application/grpc"),
            (ALTERNATIVE_KEY, Alternative(port, "ab").header(is_secured=False)),
        ]
    )
    answer = first + b"".join(map(data, map(message, answer_messages(bank)))) + trailers()
    # With the answer comes that it is the last one of this connection.
    return SETTINGS + answer + frame(Frame.GOAWAY, 0, 0, WORD.pack(1) + WORD.pack(0))


def port_of(server: Server) -> int:
    return int(server.endpoint.rpartition(":")[2])


@asynccontextmanager
async def fetches_told_of(bank: FakeBank, port: int) -> AsyncIterator[DirectCalls]:
    """Yield fetches from a server that has told of another port."""
    server = Server(telling(bank, port))
    fetches = DirectCalls(server.endpoint, ClientConfig(), Grpcio(), DataPort())
    try:
        await fetched(fetches)
        assert fetches.stats.num_fetches == 1
        yield fetches
    finally:
        await fetches.close()
        server.close()


async def fetched(fetches: DirectCalls) -> object:
    landing = Landing(BufferPool(0))
    return await fetches.fetch(request_of(REFS), REFS, landing, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
async def test_whoever_does_not_greet_there_costs_no_call(
    bank: FakeBank, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_calls, "CONNECT_TIMEOUT_S", 0.1)
    with ExitStack() as stack:
        there = Server(said)
        stack.callback(there.close)
        async with fetches_told_of(bank, port_of(there)) as fetches:
            for _ in range(2):
                assert await fetched(fetches) is not Grpcio.answer
            stats = fetches.stats
            assert (stats.num_fetches, stats.num_data_port_failures) == (3, 1)
            assert (stats.num_data_port, stats.fallbacks) == (0, {})


async def test_a_way_there_that_breaks_is_given_up_for_a_while(bank: FakeBank) -> None:
    there = Server(SETTINGS + head(), hangs_up=True)
    try:
        async with fetches_told_of(bank, port_of(there)) as fetches:
            with pytest.raises(UnavailableError):
                await fetched(fetches)
            assert await fetched(fetches) is not Grpcio.answer
            assert fetches.stats.num_data_port_failures == 1
    finally:
        there.close()


async def test_who_is_not_understood_there_is_called_elsewhere(bank: FakeBank) -> None:
    there = Server(SETTINGS + head() + data(b"\1\0\0\0\0"))
    try:
        async with fetches_told_of(bank, port_of(there)) as fetches:
            assert await fetched(fetches) is Grpcio.answer
            assert await fetched(fetches) is not Grpcio.answer
            assert fetches.stats.fallbacks == {"data port": 1}
    finally:
        there.close()


def test_what_is_told() -> None:
    alternative = Alternative(7601, "0123abcd")
    for is_secured in (False, True):
        header = alternative.header(is_secured=is_secured)
        assert Alternative.of_header(header, is_secured=is_secured) == alternative
        # Nobody is led from one that is secured to one that is not.
        assert Alternative.of_header(header, is_secured=not is_secured) is None
        many = f'h3=":443"; ma=60, {header}, h2=":1"'
        assert Alternative.of_header(many, is_secured=is_secured) == alternative


@pytest.mark.parametrize(
    "value",
    [
        "",
        "clear",
        'h2=":7601"',
        'h2="elsewhere:7601"; membank-server="ab"',
        'h2=":0"; membank-server="ab"',
        'h2=":65536"; membank-server="ab"',
        'h2=":7601"; membank-server="\x00"',
    ],
)
def test_what_tells_nothing(value: str) -> None:
    assert Alternative.of_header(value, is_secured=True) is None


def test_a_pause_ends_where_another_server_is_told_of() -> None:
    first, second = Alternative(1, "a"), Alternative(1, "b")
    port = DataPort()
    assert port.wanted() is None
    port.told(first)
    assert port.wanted() == first
    port.failed(first)
    port.told(first)
    assert port.wanted() is None
    port.told(second)
    assert port.wanted() == second
    # One that is no longer told of changes nothing.
    port.failed(first)
    assert port.wanted() == second
    assert port.num_failures == 2
