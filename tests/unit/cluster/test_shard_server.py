"""A shard's server and its ways in, as clients find them."""

from __future__ import annotations

import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from membank.bank_service.cluster.identity import ShardSettings
from membank.bank_service.cluster.shard_server import ShardServer
from membank.bank_service.rpc.server import ServerConfig
from membank.bank_service.shard import ShardConfig
from membank.bank_service.store import Bank
from membank.client import ClientConfig, GrpcTransport, TlsConfig
from membank.client.transport.direct_calls import DirectStats
from membank.wire.errors import FailedPreconditionError, Reason, UnauthenticatedError
from membank.wire.spec import BlockRef
from shard_rig import RIG_SPEC

MAKE_TLS = Path(__file__).resolve().parents[3] / "scripts" / "make_tls.sh"
REF = BlockRef(1, 0)


@pytest.fixture
def settings(tmp_path: Path) -> ShardSettings:
    Bank.create(str(tmp_path / "bank"), RIG_SPEC)
    return ShardSettings(
        shard_id="shard-0",
        bank_url=str(tmp_path / "bank"),
        partitions=tuple(range(RIG_SPEC.num_partitions)),
        server=ServerConfig(),
        shard=ShardConfig(),
        max_in_flight_bytes=1 << 24,
    )


async def fetched_thrice(server: ShardServer, config: ClientConfig | None = None) -> DirectStats:
    """Fetch a block three times, check that it is the same, and return what went where."""
    transport = GrpcTransport(server.identity.endpoint, config or ClientConfig())
    try:
        contents = set()
        for _ in range(3):
            (block,) = (await transport.fetch([REF], timeout_s=10.0)).blocks
            assert block.weight is not None
            contents.add(block.weight.tobytes())
        (kept,) = server.shard.fetch([REF]).blocks
        assert kept.weight is not None
        assert contents == {kept.weight.tobytes()}
        return transport.direct_stats
    finally:
        await transport.close()


async def test_has_a_port_for_data(settings: ShardSettings) -> None:
    server = ShardServer(settings)
    try:
        stats = await fetched_thrice(server)
    finally:
        server.stop()
    assert stats == DirectStats(num_fetches=3, num_data_port=2)


async def test_has_none_where_it_is_not_to(settings: ShardSettings) -> None:
    server = ShardServer(replace(settings, server=ServerConfig(data_port=None)))
    try:
        stats = await fetched_thrice(server)
    finally:
        server.stop()
    assert stats == DirectStats(num_fetches=3)


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    folder = tmp_path / "secrets"
    subprocess.run([MAKE_TLS, folder], check=True, capture_output=True)
    (folder / "token").write_text("sesame rita reader\n")
    return folder


async def test_the_port_is_as_secure_as_the_address(settings: ShardSettings, secrets: Path) -> None:
    secured = ServerConfig(
        tls_cert=secrets / "tls.crt", tls_key=secrets / "tls.key", token_file=secrets / "token"
    )
    server = ShardServer(replace(settings, server=secured))
    tls = TlsConfig(root_certificates=secrets / "tls.crt")
    try:
        stats = await fetched_thrice(server, ClientConfig(tls=tls, token="sesame"))
        assert stats == DirectStats(num_fetches=3, num_data_port=2)
        with pytest.raises(UnauthenticatedError):
            await fetched_thrice(server, ClientConfig(tls=tls, token="wrong"))
    finally:
        server.stop()


def test_a_port_that_is_taken_leaves_nothing_behind(settings: ShardSettings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        for taken in (ServerConfig(data_port=port), ServerConfig(port=port)):
            with pytest.raises(FailedPreconditionError) as caught:
                ShardServer(replace(settings, server=taken))
            assert caught.value.reason is Reason.PORT_IN_USE
    server = ShardServer(replace(settings, server=ServerConfig(data_port=port)))
    server.stop()
    # It is free at once.
    ShardServer(replace(settings, server=ServerConfig(data_port=port))).stop()
