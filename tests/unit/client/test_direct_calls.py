"""Calls of the data path pass grpcio by where they can, leave the others to it, and say so."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest

from direct_rigs import Grpcio, Server
from fake_bank import FakeBank
from fake_service import FakeService
from faults import Fault
from http2_scripts import REFS, SETTINGS, head, request_of, whole_answer
from membank.client import ClientConfig, GrpcTransport, TlsConfig
from membank.client.transport.contract import FetchAnswer
from membank.client.transport.data_port import DataPort
from membank.client.transport.direct_calls import DirectCalls
from membank.client.transport.landing import Landing
from membank.wire.buffers import BufferPool
from membank.wire.errors import DeadlineError, Reason, UnavailableError

TIMEOUT_S = 10.0
TOPIC = REFS[0]
MAKE_TLS = Path(__file__).resolve().parents[3] / "scripts" / "make_tls.sh"


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


@asynccontextmanager
async def a_transport(
    bank: FakeBank, config: ClientConfig | None = None
) -> AsyncIterator[GrpcTransport]:
    endpoint = bank.endpoints[bank.shard_of(TOPIC).shard_id]
    transport = GrpcTransport(endpoint, config or ClientConfig())
    yield transport
    await transport.close()


async def fetched(transport: GrpcTransport, timeout_s: float = TIMEOUT_S) -> bytes:
    answer = await transport.fetch([TOPIC], timeout_s=timeout_s)
    weight = answer.blocks[0].weight
    assert weight is not None
    return weight.tobytes()


@asynccontextmanager
async def fetches_from(
    server: Server, config: ClientConfig | None = None
) -> AsyncIterator[DirectCalls]:
    fetches = DirectCalls(server.endpoint, config or ClientConfig(), Grpcio(), DataPort())
    try:
        yield fetches
    finally:
        await fetches.close()
        server.close()


async def fetch(fetches: DirectCalls, timeout_s: float = TIMEOUT_S) -> FetchAnswer:
    landing = Landing(BufferPool(0))
    return await fetches.fetch(request_of(REFS), REFS, landing, timeout_s=timeout_s)


async def test_a_transport_uses_it_by_itself(bank: FakeBank, service: FakeService) -> None:
    content = bank.held(TOPIC).weight.tobytes()
    async with a_transport(bank) as transport:
        for _ in range(3):
            assert await fetched(transport) == content
        assert (transport.direct_stats.num_fetches, transport.direct_stats.fallbacks) == (3, {})


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    subprocess.run([MAKE_TLS, tmp_path], check=True, capture_output=True)
    return tmp_path


async def test_over_tls(bank: FakeBank, certificates: Path) -> None:
    key, certificate = certificates / "tls.key", certificates / "tls.crt"
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    service = FakeService(bank, credentials=credentials, token="sesame")
    try:
        for server_name in (None, "membank"):
            tls = TlsConfig(root_certificates=certificate, server_name=server_name)
            async with a_transport(bank, ClientConfig(tls=tls, token="sesame")) as transport:
                assert await fetched(transport) == bank.held(TOPIC).weight.tobytes()
                assert transport.direct_stats.fallbacks == {}
        tls = TlsConfig(root_certificates=certificate, server_name="elsewhere")
        async with a_transport(bank, ClientConfig(tls=tls, token="sesame")) as transport:
            with pytest.raises(UnavailableError):
                await fetched(transport, timeout_s=1.0)
            assert transport.direct_stats.fallbacks == {"not connected": 1}
    finally:
        service.close()


async def test_an_endpoint_that_speaks_otherwise_is_not_tried_again() -> None:
    server = Server(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    async with fetches_from(server) as fetches:
        for _ in range(2):
            assert await fetch(fetches) is Grpcio.answer
        assert fetches.stats.fallbacks == {"not understood": 2}
        assert len(server.callers) == 1


async def test_an_endpoint_where_nobody_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    fetches = DirectCalls(f"127.0.0.1:{port}", ClientConfig(), Grpcio(), DataPort())
    for _ in range(2):
        assert await fetch(fetches) is Grpcio.answer
    assert fetches.stats.fallbacks == {"not connected": 2}
    await fetches.close()


async def test_a_connection_that_ended_meanwhile_is_replaced(bank: FakeBank) -> None:
    server = Server(whole_answer(bank), hangs_up=True)
    async with fetches_from(server) as fetches:
        for _ in range(2):
            server.hung_up.clear()
            answer = await fetch(fetches)
            np.testing.assert_array_equal(answer.blocks[0].weight, bank.held(TOPIC).weight)
            await asyncio.to_thread(server.hung_up.wait, TIMEOUT_S)
        assert len(server.callers) == 2


async def test_a_call_that_is_cancelled_ends_its_connection() -> None:
    server = Server(SETTINGS + head())
    async with fetches_from(server) as fetches:
        call = asyncio.create_task(fetch(fetches))
        await asyncio.to_thread(server.heard.wait, TIMEOUT_S)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await asyncio.to_thread(server.left.wait, TIMEOUT_S)


async def test_a_call_that_is_cancelled_while_it_connects_leaves_no_connection() -> None:
    server = Server(b"")
    async with fetches_from(server) as fetches:
        call = asyncio.create_task(fetch(fetches))
        await asyncio.to_thread(server.called.wait, TIMEOUT_S)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        # It is waiting for the settings of the other end, which now come.
        server.callers[0].sendall(SETTINGS)
        assert await asyncio.to_thread(server.left.wait, TIMEOUT_S)


async def test_closing_ends_calls_that_run() -> None:
    server = Server(SETTINGS + head())
    async with fetches_from(server) as fetches:
        call = asyncio.create_task(fetch(fetches))
        await asyncio.to_thread(server.heard.wait, TIMEOUT_S)
        await fetches.close(grace_s=0.01)
        with pytest.raises(UnavailableError) as caught:
            await call
        assert caught.value.reason is Reason.CANCELLED


async def test_calls_wait_for_their_turn(bank: FakeBank, service: FakeService) -> None:
    config = ClientConfig(max_data_connections=1)
    async with a_transport(bank, config) as transport:
        contents = await asyncio.gather(*(fetched(transport) for _ in range(5)))
        assert set(contents) == {bank.held(TOPIC).weight.tobytes()}
        assert transport.direct_stats.num_fetches == 5


async def test_a_turn_that_does_not_come(bank: FakeBank, service: FakeService) -> None:
    config = ClientConfig(max_data_connections=1)
    script = service.scripts[bank.shard_of(TOPIC).shard_id]
    script.plan("FetchBlocks", Fault.SLOW)
    async with a_transport(bank, config) as transport:
        slow = asyncio.create_task(fetched(transport))
        await script.wait_for("FetchBlocks")
        with pytest.raises(DeadlineError):
            await fetched(transport, timeout_s=0.05)
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert await fetched(transport) == bank.held(TOPIC).weight.tobytes()
