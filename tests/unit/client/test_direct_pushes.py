"""Pushes pass grpcio by where they can; where they cannot, they arrive once all the same."""

from __future__ import annotations

import asyncio
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

import hpack
import numpy as np
import pytest

from direct_rigs import Grpcio, Server
from fake_bank import FakeBank
from fake_service import FakeService
from http2_scripts import (
    SETTINGS,
    Client,
    data,
    frames_in,
    head,
    headers_frame,
    message,
    refusal,
    sent_by,
    trailers,
)
from membank.bank_service.rpc.direct import DataListener
from membank.bank_service.shard import ShardApi
from membank.bank_service.shard.contract import PushResult
from membank.client import BankClient, ClientConfig, GrpcTransport, TlsConfig
from membank.client.transport.data_connection import DataConnection
from membank.client.transport.data_port import DataPort
from membank.client.transport.direct_calls import DirectCalls
from membank.v1 import block_service_pb2 as block_pb
from membank.wire import convert
from membank.wire.alternative import Alternative
from membank.wire.crc import crc32c
from membank.wire.errors import (
    CorruptionError,
    DeadlineError,
    InternalError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.framing import CHUNK_BYTES
from membank.wire.http2.frames import WORD, ErrorCode, Flag, Frame, ProtocolError, Setting, frame
from membank.wire.records import Gradient, Update, UpdateResult
from membank.wire.spec import BlockRef
from push_rigs import REF, PushRig
from rpc_rig import RpcRig
from shard_rig import RIG_SPEC

TIMEOUT_S = 10.0
MAKE_TLS = Path(__file__).resolve().parents[3] / "scripts" / "make_tls.sh"
LARGE_BYTES = 48 << 20
"""More than either end takes before it has read."""


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    subprocess.run([MAKE_TLS, tmp_path], check=True, capture_output=True)
    return tmp_path


def update_of(*shapes: tuple[int, ...], request_id: str = "p1") -> Update:
    rng = np.random.default_rng(0)
    return Update(
        request_id=request_id,
        step=4,
        gradients=tuple(
            Gradient(
                ref=BlockRef(2, number),
                base_version=0,
                values=rng.standard_normal(shape, np.float32),
            )
            for number, shape in enumerate(shapes)
        ),
    )


def well(*, stream: int = 1) -> bytes:
    """Return an answer to a push that was applied."""
    result = UpdateResult(ref=BlockRef(2, 0), accepted=True, version=7)
    response = block_pb.PushUpdatesResponse(results=[convert.result_to_pb(result)])
    body = message(response.SerializeToString())
    return head(stream=stream) + data(body, stream=stream) + trailers(stream=stream)


class TestConnection:
    def test_says_what_gRPC_wants(self, client: Client) -> None:
        client.server.sendall(SETTINGS + well())
        update = update_of((2, 3, 5), (3, 3, 5))
        answer = client.push(update, timeout_s=5.0)
        assert [result.version for result in answer.results] == [7]
        sent = sent_by(client)
        (_, flags, stream, block) = next(each for each in sent if each[0] == Frame.HEADERS)
        headers = {str(name): str(value) for name, value in hpack.Decoder().decode(block)}
        assert (flags, stream) == (Flag.END_HEADERS, 1)
        assert headers[":path"] == "/membank.v1.BlockService/PushUpdates"
        assert headers["authorization"] == "Bearer sesame"
        body = b"".join(each[3] for each in sent if each[0] == Frame.DATA)
        first, *rest = _messages_in(body)
        assert (first.request_id, first.step, first.learning_rate_scale) == ("p1", 4, 1.0)
        arrays = [gradient.values for gradient in update.gradients]
        assert [header.crc32c for header in first.headers] == list(map(crc32c, arrays))
        assert b"".join(each.data for each in rest) == b"".join(a.tobytes() for a in arrays)

    def test_large_ones_in_messages_of_chunks_and_within_windows(self, client: Client) -> None:
        update = update_of((2, 3, 1024, 100), (4, 1, 1024, 7))
        heard = bytearray()
        thread = threading.Thread(target=_take_bit_by_bit, args=(client, heard))
        client.server.sendall(frame(Frame.SETTINGS, 0, 0, struct.pack(">HI", 4, 100_000)))
        client.connect()
        thread.start()
        client.push(update)
        thread.join()
        first, *rest = _messages_in(bytes(heard))
        assert len(first.headers) == 2
        assert all(len(each.data) == CHUNK_BYTES for each in rest[:-1])
        sent = b"".join(each.data for each in rest)
        assert sent == b"".join(gradient.values.tobytes() for gradient in update.gradients)

    def test_one_after_the_other_and_between_fetches(self, client: Client) -> None:
        client.server.sendall(SETTINGS + well())
        client.push(update_of((2, 2)))
        assert client.connection is not None
        assert client.connection.is_usable()
        client.server.sendall(well(stream=3))
        client.push(update_of((2, 2)))
        assert client.connection.is_usable()

    @pytest.mark.parametrize("is_window_full", [True, False])
    def test_a_refusal_before_all_is_sent(self, client: Client, is_window_full: bool) -> None:
        window = 70_000 if is_window_full else 1 << 30
        first = frame(Frame.SETTINGS, 0, 0, struct.pack(">HI", 4, window))
        first += frame(Frame.WINDOW_UPDATE, 0, 0, WORD.pack(window))
        client.server.sendall(first)
        client.connect()
        # Nobody reads what is sent: the client has to look up from that.
        client.server.sendall(refusal(ResourceExhaustedError("full")))
        client.server.sendall(frame(Frame.RST_STREAM, 0, 1, WORD.pack(ErrorCode.NO_ERROR)))
        with pytest.raises(ResourceExhaustedError):
            client.push(update_of((16, 1 << 20)))
        assert client.connection is not None
        assert not client.connection.is_usable()
        assert not client.connection.has_broken

    @pytest.mark.parametrize(
        ("code", "kind"),
        [(ErrorCode.REFUSED_STREAM, UnavailableError), (ErrorCode.PROTOCOL_ERROR, InternalError)],
    )
    def test_a_stream_that_is_reset_while_it_sends(
        self, client: Client, code: ErrorCode, kind: type[Exception]
    ) -> None:
        client.server.sendall(SETTINGS + frame(Frame.RST_STREAM, 0, 1, WORD.pack(code)))
        with pytest.raises(kind):
            client.push(update_of((16, 1 << 20)))

    @pytest.mark.parametrize("window", [70_000, 1 << 30])
    def test_a_deadline_while_nobody_reads(self, client: Client, window: int) -> None:
        first = frame(Frame.SETTINGS, 0, 0, struct.pack(">HI", Setting.INITIAL_WINDOW_SIZE, window))
        client.server.sendall(first + frame(Frame.WINDOW_UPDATE, 0, 0, WORD.pack(window)))
        with pytest.raises(DeadlineError):
            client.push(update_of((16, 1 << 20)), timeout_s=0.3)

    @pytest.mark.parametrize("answer", [b"", message(b"") * 2, b"\1\0\0\0\0", message(b"\xff")])
    def test_answers_that_are_none(self, client: Client, answer: bytes) -> None:
        client.server.sendall(SETTINGS + head() + data(answer) + trailers())
        with pytest.raises(ProtocolError):
            client.push(update_of((2, 2)))

    def test_a_connection_that_breaks(self, client: Client) -> None:
        client.server.sendall(SETTINGS)
        client.server.shutdown(socket.SHUT_WR)
        with pytest.raises(UnavailableError):
            client.push(update_of((16, 1 << 20)))
        assert client.connection is not None
        assert client.connection.has_broken

    def test_a_service_that_knows_no_pushes(self, client: Client) -> None:
        fields = [(":status", "200"), ("content-type", "application/grpc"), ("grpc-status", "12")]
        ends = Flag.END_HEADERS | Flag.END_STREAM
        client.server.sendall(SETTINGS + headers_frame(fields, flags=ends))
        with pytest.raises(Exception, match="does not offer PushUpdates"):
            client.push(update_of((2, 2)))


def _messages_in(body: bytes) -> list[block_pb.PushUpdatesRequest]:
    found, at = [], 0
    while at < len(body):
        _, length = struct.unpack_from(">BI", body, at)
        found.append(block_pb.PushUpdatesRequest.FromString(body[at + 5 : at + 5 + length]))
        at += 5 + length
    return found


def _take_bit_by_bit(client: Client, heard: bytearray) -> None:
    """Take a push and let the client send only what was taken; then say that it went well."""
    sent, told = b"", 0
    while True:
        sent += client.server.recv(1 << 20)
        whole = [f for f in frames_in(sent) if f[0] == Frame.DATA]
        complete = whole if _is_whole(sent) else whole[:-1]
        count = sum(len(f[3]) for f in complete)
        if count > told:
            for stream in (0, 1):
                more = WORD.pack(count - told)
                client.server.sendall(frame(Frame.WINDOW_UPDATE, 0, stream, more))
            told = count
        if complete and complete[-1][1] & Flag.END_STREAM:
            heard += b"".join(f[3] for f in complete)
            client.server.sendall(well())
            return


def _is_whole(sent: bytes) -> bool:
    rest = sent.partition(b"SM\r\n\r\n")[2]
    at = 0
    while at < len(rest):
        at += 9 + int.from_bytes(rest[at : at + 3], "big")
    return at == len(rest)


@asynccontextmanager
async def calls_to(
    endpoint: str, alternative: Alternative | None, config: ClientConfig | None = None
) -> AsyncIterator[tuple[DirectCalls, Grpcio]]:
    """Yield calls to an endpoint that has told of a port for data."""
    port, grpcio = DataPort(), Grpcio()
    if alternative is not None:
        port.told(alternative)
    calls = DirectCalls(endpoint, config or ClientConfig(), grpcio, port)
    try:
        yield calls, grpcio
    finally:
        await calls.close()


def port_of(server: Server) -> Alternative:
    return Alternative(int(server.endpoint.rpartition(":")[2]), "ab")


class TestWays:
    async def test_without_a_port_grpcio_makes_them(self) -> None:
        async with calls_to("127.0.0.1:1", None) as (calls, grpcio):
            answer = await calls.push(update_of((2, 2)), bank="", timeout_s=TIMEOUT_S)
            assert answer is Grpcio.push_answer
            assert (calls.stats.num_pushes, calls.stats.fallbacks) == (0, {})
            assert grpcio.pushes == ["p1"]

    async def test_with_one_they_go_there(self) -> None:
        with PushRig() as rig:
            async with calls_to(f"127.0.0.1:{rig.port}", rig.alternative) as (calls, grpcio):
                for number in range(3):
                    update = rig.update(f"p{number}", seed=number)
                    await calls.push(update, bank="", timeout_s=TIMEOUT_S)
                    assert rig.shard.gradient() == update.gradients[0].values.tobytes()
                stats = calls.stats
                assert (stats.num_pushes, stats.num_data_port, stats.fallbacks) == (3, 3, {})
                assert (rig.listener.num_connections, grpcio.pushes) == (1, [])

    async def test_a_refusal_comes_while_a_large_one_is_sent(self) -> None:
        with PushRig(LARGE_BYTES, budget_bytes=1 << 20) as rig:
            async with calls_to(f"127.0.0.1:{rig.port}", rig.alternative) as (calls, grpcio):
                for _ in range(2):
                    with pytest.raises(Exception, match="more than the") as caught:
                        await calls.push(rig.update(), bank="", timeout_s=TIMEOUT_S)
                    assert getattr(caught.value, "reason", None) is Reason.MESSAGE_TOO_LARGE
                # Nothing is wrong with the port.
                assert (calls.stats.num_data_port_failures, grpcio.pushes) == (0, [])
            assert not rig.shard.is_asked.is_set()

    async def test_larger_than_any_window(self) -> None:
        with PushRig(LARGE_BYTES) as rig:
            async with calls_to(f"127.0.0.1:{rig.port}", rig.alternative) as (calls, _):
                update = rig.update()
                await calls.push(update, bank="", timeout_s=60.0)
                assert rig.shard.gradient() == update.gradients[0].values.tobytes()

    async def test_over_tls(self, certificates: Path) -> None:
        certificate, key = certificates / "tls.crt", certificates / "tls.key"
        config = ClientConfig(tls=TlsConfig(root_certificates=certificate))
        with PushRig(12 << 20, tls=(certificate, key)) as rig:
            async with calls_to(f"127.0.0.1:{rig.port}", rig.alternative, config) as (calls, _):
                update = rig.update()
                await calls.push(update, bank="", timeout_s=TIMEOUT_S)
                assert rig.shard.gradient() == update.gradients[0].values.tobytes()
                assert calls.stats.num_pushes == 1

    async def test_memory_that_changes_while_it_is_sent(self) -> None:
        with PushRig() as rig:
            async with calls_to(f"127.0.0.1:{rig.port}", rig.alternative) as (calls, _):
                update = rig.update()
                (gradient,) = update.gradients
                gradient = replace(gradient, values=Changing.of(gradient.values))
                with pytest.raises(CorruptionError):
                    await calls.push(
                        replace(update, gradients=(gradient,)), bank="", timeout_s=TIMEOUT_S
                    )
            assert not rig.shard.updates

    async def test_a_connection_that_is_left_from_before_is_not_used(self) -> None:
        server = Server(SETTINGS)
        try:
            with PushRig() as rig:
                async with calls_to(server.endpoint, None) as (calls, grpcio):
                    opened = await calls._opened(time.monotonic() + TIMEOUT_S)
                    calls._connections._idle.append(opened)
                    calls._data_port.told(rig.alternative)
                    await calls.push(rig.update(), bank="", timeout_s=TIMEOUT_S)
                    assert len(rig.shard.updates) == 1
                    assert not server.heard.is_set()
                    assert (calls.stats.num_pushes, grpcio.pushes) == (1, [])
        finally:
            server.close()

    async def test_a_port_where_nobody_is(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            gone = Alternative(listener.getsockname()[1], "ab")
        server = Server(SETTINGS)
        try:
            async with calls_to(server.endpoint, gone) as (calls, grpcio):
                for _ in range(2):
                    await calls.push(update_of((2, 2)), bank="", timeout_s=TIMEOUT_S)
                assert grpcio.pushes == ["p1", "p1"]
                stats = calls.stats
                assert (stats.num_data_port_failures, stats.fallbacks) == (1, {"not connected": 1})
        finally:
            server.close()

    async def test_a_port_that_is_another_servers_by_now(self) -> None:
        with PushRig() as rig:
            other = Alternative(rig.port, "ab")
            async with calls_to(f"127.0.0.1:{rig.port}", other) as (calls, grpcio):
                await calls.push(rig.update(), bank="", timeout_s=TIMEOUT_S)
                assert calls.stats.fallbacks == {"data port": 1}
                assert (grpcio.pushes, rig.shard.updates) == (["p1"], [])

    async def test_one_that_is_not_understood(self) -> None:
        server = Server(SETTINGS + head() + data(b"\1\0\0\0\0"))
        try:
            async with calls_to("127.0.0.1:1", port_of(server)) as (calls, grpcio):
                await calls.push(update_of((2, 2)), bank="", timeout_s=TIMEOUT_S)
                assert (calls.stats.fallbacks, grpcio.pushes) == ({"data port": 1}, ["p1"])
        finally:
            server.close()

    async def test_a_way_that_breaks_in_the_midst_is_given_up_for_a_while(self) -> None:
        server = Server(SETTINGS, hangs_up=True)
        try:
            async with calls_to("127.0.0.1:1", port_of(server)) as (calls, grpcio):
                with pytest.raises(UnavailableError):
                    await calls.push(update_of((2, 2)), bank="", timeout_s=TIMEOUT_S)
                assert grpcio.pushes == []
                # The caller sends the same once more.
                await calls.push(update_of((2, 2)), bank="", timeout_s=TIMEOUT_S)
                assert (grpcio.pushes, calls.stats.num_data_port_failures) == (["p1"], 1)
        finally:
            server.close()

    async def test_a_call_that_is_cancelled_ends_its_connection(self) -> None:
        server = Server(SETTINGS + head())
        try:
            async with calls_to("127.0.0.1:1", port_of(server)) as (calls, _):
                push = calls.push(update_of((2, 2)), bank="", timeout_s=TIMEOUT_S)
                call = asyncio.create_task(push)
                await asyncio.to_thread(server.heard.wait, TIMEOUT_S)
                call.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await call
                assert await asyncio.to_thread(server.left.wait, TIMEOUT_S)
        finally:
            server.close()


class Changing(np.ndarray):
    """An array whose bytes are others once its checksum has been taken."""

    @classmethod
    def of(cls, values: np.ndarray) -> Changing:
        return values.copy().view(cls)

    @property
    def nbytes(self) -> int:
        # Asked for by what is said of it, after its checksum was taken.
        self.view(np.ndarray).flat[0] += 1
        return self.view(np.ndarray).nbytes


class CutsOff:
    """A shard that applies its first push and then loses who sent it.

    Parameters
    ----------
    shard
        The shard.
    """

    def __init__(self, shard: ShardApi) -> None:
        self._shard = shard
        self.listener: DataListener | None = None
        """Whose connections end with the first push."""

    def __getattr__(self, name: str) -> object:
        return getattr(self._shard, name)

    def push(self, update: Update) -> PushResult:
        result = self._shard.push(update)
        listener, self.listener = self.listener, None
        for connection in list(listener._connections) if listener is not None else ():
            connection.end()
        return result


def rig_update(request_id: str = "p1") -> Update:
    values = np.ones(RIG_SPEC.block_shape(1), np.float32)
    gradient = Gradient(ref=REF, base_version=0, values=values)
    return Update(request_id=request_id, step=1, gradients=(gradient,))


async def test_a_push_tells_of_the_port(tmp_path: Path) -> None:
    with RpcRig(tmp_path / "bank") as rig:
        transport = GrpcTransport(rig.address, ClientConfig())
        try:
            for number in range(3):
                update = rig_update(f"p{number}")
                await transport.push(update, timeout_s=TIMEOUT_S)
                assert transport.direct_stats.num_pushes == number
            assert transport.direct_stats.fallbacks == {}
        finally:
            await transport.close()


async def test_what_was_applied_before_the_way_broke_is_applied_once(tmp_path: Path) -> None:
    with RpcRig(tmp_path / "bank") as rig:
        shard = CutsOff(rig.shard)
        rig.data._calls._shard = cast("ShardApi", shard)
        transport = GrpcTransport(rig.address, ClientConfig())
        try:
            await transport.fetch([REF], timeout_s=TIMEOUT_S)
            shard.listener = rig.data
            with pytest.raises(UnavailableError):
                await transport.push(rig_update(), timeout_s=TIMEOUT_S)
            again = await transport.push(rig_update(), timeout_s=TIMEOUT_S)
            assert again.duplicate
            assert [result.version for result in again.results] == [1]
            stats = transport.direct_stats
            assert (stats.num_pushes, stats.num_data_port_failures) == (0, 1)
        finally:
            await transport.close()
        (block,) = rig.shard.fetch([REF]).blocks
        assert block.header.version == 1


def test_a_sync_client_pushes_in_its_own_thread() -> None:
    bank = FakeBank()
    service = FakeService(bank, data_port=True)
    shard = bank.shard_of(REF)
    threads: list[str] = []
    listener = service.data[shard.shard_id]
    try:
        config = ClientConfig(same_host=None)
        with BankClient.connect(service.endpoint, config=config) as client:
            for _ in range(2):
                client.fetch_blocks([REF])
            gradient = np.ones(bank.spec.block_shape(1), np.float32)
            transport = client._core._session.shards.transport(bank.endpoints[shard.shard_id])
            assert isinstance(transport, GrpcTransport)
            assert transport._direct is not None
            heed = transport._direct._heed

            def seen(connection: DataConnection) -> None:
                threads.append(threading.current_thread().name)
                heed(connection)

            transport._direct._heed = seen  # type: ignore[method-assign]
            for version in range(3):
                client.push({REF: gradient}, base={REF: version})
            assert transport.direct_stats.num_pushes == 3
        assert threads == [threading.current_thread().name] * 3
        assert shard.blocks[REF].version == 3
    finally:
        with suppress(OSError):
            listener.stop()
        service.close()
