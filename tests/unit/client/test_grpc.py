"""What only a network shows: credentials, TLS, deadlines, broken streams, lost servers."""

import asyncio
import io
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import grpc
import numpy as np
import pytest

from core_rig import ones
from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from faults import Fault
from membank.client import AsyncBankClient, ClientConfig, GrpcTransport, RetryConfig, TlsConfig
from membank.client.transport.grpc_channel import host_of, is_loopback
from membank.client.transport.grpc_status import ServedStatus
from membank.wire.errors import (
    CorruptionError,
    DeadlineError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnauthenticatedError,
    UnavailableError,
)
from membank.wire.format import TreeDocument
from membank.wire.records import Gradient, Update
from membank.wire.spec import BlockRef

PATH = (BlockRef(1, 0), BlockRef(2, 1))
ACROSS = (BlockRef(1, 0), BlockRef(1, 1))
RETRY = RetryConfig(initial_backoff_s=0.001, max_backoff_s=0.02)
CONFIG = ClientConfig(timeout_s=10.0, retry=RETRY)
MAKE_TLS = Path(__file__).resolve().parents[3] / "scripts" / "make_tls.sh"


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank(tree=b"tree" * 100)


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


@pytest.fixture
async def client(service: FakeService) -> AsyncIterator[AsyncBankClient]:
    async with await AsyncBankClient.connect(service.endpoint, config=CONFIG) as client:
        yield client


@pytest.fixture
def shard(service: FakeService) -> str:
    """Address of the shard that serves `PATH`."""
    return service.bank.endpoints["shard-0"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run([MAKE_TLS, folder], check=True, capture_output=True)
    return folder


class TestCredentials:
    async def test_token_travels_with_every_call(self, bank: FakeBank) -> None:
        service = FakeService(bank, token="sesame")
        try:
            config = ClientConfig(token="sesame")
            async with await AsyncBankClient.connect(service.endpoint, config=config) as client:
                await client.fetch(PATH)
                await client.topics()
        finally:
            service.close()
        for script in (service.script, service.scripts["shard-0"]):
            assert {call["authorization"] for call in script.metadata} == {"Bearer sesame"}

    async def test_token_file_is_read_for_each_connection(
        self, bank: FakeBank, tmp_path: Path
    ) -> None:
        # As the service's own file has it: comments, and who and what follows the token.
        path = tmp_path / "token"
        path.write_text("# tokens\n\nsesame alice admin\nother bob reader\n")
        service = FakeService(bank, token="sesame")
        try:
            config = ClientConfig(token_file=path)
            async with await AsyncBankClient.connect(service.endpoint, config=config) as client:
                await client.fetch(PATH)
        finally:
            service.close()

    @pytest.mark.parametrize("token", [None, "wrong"])
    async def test_without_the_right_token(self, bank: FakeBank, token: str | None) -> None:
        service = FakeService(bank, token="sesame")
        try:
            with pytest.raises(UnauthenticatedError):
                await AsyncBankClient.connect(service.endpoint, config=ClientConfig(token=token))
        finally:
            service.close()

    async def test_token_is_not_sent_over_the_network_without_tls(self) -> None:
        with pytest.raises(FailedPreconditionError) as caught:
            GrpcTransport("192.0.2.1:7600", ClientConfig(token="sesame"))
        assert caught.value.reason is Reason.INSECURE_ENDPOINT
        assert "sesame" not in str(caught.value)

    async def test_token_file_that_is_missing_or_empty(self, tmp_path: Path) -> None:
        for path in (tmp_path / "missing", tmp_path / "empty"):
            (tmp_path / "empty").write_text("# nothing\n")
            with pytest.raises(FailedPreconditionError) as caught:
                GrpcTransport("localhost:7600", ClientConfig(token_file=path))
            assert caught.value.reason is Reason.NO_CREDENTIALS


class TestTls:
    @pytest.fixture
    def service(self, bank: FakeBank, certificates: Path) -> Iterator[FakeService]:
        key, certificate = certificates / "tls.key", certificates / "tls.crt"
        credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
        service = FakeService(bank, credentials=credentials, token="sesame")
        yield service
        service.close()

    @pytest.mark.parametrize("server_name", [None, "membank"])
    async def test_with_the_right_root(
        self, service: FakeService, certificates: Path, server_name: str | None
    ) -> None:
        tls = TlsConfig(root_certificates=certificates / "tls.crt", server_name=server_name)
        config = ClientConfig(tls=tls, token="sesame")
        async with await AsyncBankClient.connect(service.endpoint, config=config) as client:
            assert list(await client.fetch(PATH)) == list(PATH)

    @pytest.mark.parametrize("server_name", [None, "elsewhere"])
    async def test_with_a_wrong_root_or_name(
        self, service: FakeService, certificates: Path, server_name: str | None
    ) -> None:
        root = None if server_name is None else certificates / "tls.crt"
        config = ClientConfig(
            tls=TlsConfig(root_certificates=root, server_name=server_name),
            retry=RetryConfig(max_attempts=1),
        )
        with pytest.raises(UnavailableError):
            await AsyncBankClient.connect(service.endpoint, config=config)
        assert service.script.calls == []

    async def test_root_that_is_missing(self, tmp_path: Path) -> None:
        config = ClientConfig(tls=TlsConfig(root_certificates=tmp_path / "missing"))
        with pytest.raises(FailedPreconditionError, match="root certificates"):
            GrpcTransport("localhost:7600", config)


class TestEndpoints:
    @pytest.mark.parametrize("endpoint", ["", "host", "host:", ":7600", "host:x", "host:70000"])
    def test_malformed(self, endpoint: str) -> None:
        with pytest.raises(InvalidArgumentError, match="host:port"):
            host_of(endpoint)

    @pytest.mark.parametrize(
        ("endpoint", "expected"),
        [
            ("localhost:1", True),
            ("127.0.0.1:1", True),
            ("127.3.2.1:1", True),
            ("[::1]:1", True),
            ("192.0.2.1:1", False),
            ("bank.example:1", False),
        ],
    )
    def test_loopback(self, endpoint: str, expected: bool) -> None:
        assert is_loopback(host_of(endpoint)) is expected

    async def test_nobody_listens(self, service: FakeService) -> None:
        service.stop_server("gateway")
        config = ClientConfig(retry=replace(RETRY, max_attempts=3))
        with pytest.raises(UnavailableError) as caught:
            await AsyncBankClient.connect(service.endpoint, config=config)
        assert caught.value.reason is Reason.CONNECT_FAILED
        assert service.endpoint in str(caught.value)

    async def test_unknown_bank(self, service: FakeService) -> None:
        with pytest.raises(NotFoundError) as caught:
            await AsyncBankClient.connect(service.endpoint, config=ClientConfig(bank="other"))
        assert caught.value.reason is Reason.UNKNOWN_BANK

    async def test_admin_calls_need_the_gateway(self, shard: str) -> None:
        async with await AsyncBankClient.connect(shard, config=CONFIG) as client:
            assert list(await client.fetch(PATH)) == list(PATH)
            with pytest.raises(FailedPreconditionError, match="gateway"):
                await client.topics()


class TestDeadlines:
    async def test_of_a_fetch(self, service: FakeService, client: AsyncBankClient) -> None:
        service.scripts["shard-0"].plan("FetchBlocks", Fault.SLOW)
        start = time.monotonic()
        with pytest.raises(DeadlineError):
            await client.fetch(PATH, timeout_s=0.1)
        assert 0.1 <= time.monotonic() - start < 2.0
        assert service.scripts["shard-0"].num_calls("FetchBlocks") == 1

    async def test_is_shared_by_all_attempts(
        self, service: FakeService, client: AsyncBankClient
    ) -> None:
        service.scripts["shard-0"].plan("PushUpdates", Fault.UNAVAILABLE, Fault.SLOW)
        start = time.monotonic()
        with pytest.raises(DeadlineError):
            await client.push({PATH[0]: _ones(PATH[0])}, base={PATH[0]: 0}, timeout_s=0.2)
        assert time.monotonic() - start < 2.0
        # On a busy machine time may have run out before the second attempt arrived.
        assert service.scripts["shard-0"].num_calls("PushUpdates") <= 2

    async def test_of_an_admin_call(self, service: FakeService, client: AsyncBankClient) -> None:
        service.script.plan("ApplyTransaction", Fault.SLOW)
        with pytest.raises(DeadlineError):
            await client.withhold(PATH[1], timeout_s=0.1)


class TestBrokenStreams:
    async def test_a_fetch_that_was_cut_is_made_again(
        self, service: FakeService, client: AsyncBankClient
    ) -> None:
        service.scripts["shard-0"].plan("FetchBlocks", Fault.CUT, Fault.CUT)
        memory = await client.fetch(PATH)
        for ref, weight in memory.weights.items():
            np.testing.assert_array_equal(weight, service.bank.held(ref).weight)

    @pytest.mark.parametrize("fault", [Fault.WRONG_CRC, Fault.SHORT])
    @pytest.mark.parametrize("method", ["FetchBlocks", "GetTree", "ExportTopic"])
    async def test_damage_is_never_retried_until_good(
        self, service: FakeService, client: AsyncBankClient, method: str, fault: Fault
    ) -> None:
        script = service.scripts["shard-0"] if method == "FetchBlocks" else service.script
        script.plan(method, fault)
        calls: dict[str, Callable[[], Awaitable[object]]] = {
            "FetchBlocks": lambda: client.fetch(PATH),
            "GetTree": client.tree,
            "ExportTopic": lambda: client.export(PATH[0]),
        }
        expected = "CRC-32C" if fault is Fault.WRONG_CRC else "ended after"
        with pytest.raises(CorruptionError, match=expected):
            await calls[method]()
        assert script.num_calls(method) == 1

    async def test_an_export_that_was_cut_is_made_again(
        self, service: FakeService, client: AsyncBankClient
    ) -> None:
        service.script.plan("ExportTopic", Fault.CUT)
        target = io.BytesIO(b"before")
        target.seek(6)
        info = await client.export_to(PATH[0], target)
        pack = service.bank.export(PATH[0])
        assert target.getvalue() == b"before" + pack
        assert info.num_bytes == len(pack)

    async def test_an_export_to_a_pipe_gets_one_attempt(
        self, service: FakeService, client: AsyncBankClient
    ) -> None:
        class Pipe(io.BytesIO):
            def seekable(self) -> bool:
                return False

        service.script.plan("ExportTopic", Fault.CUT)
        with pytest.raises(UnavailableError):
            await client.export_to(PATH[0], Pipe())
        assert service.script.num_calls("ExportTopic") == 1
        await client.export_to(PATH[0], pipe := Pipe())
        assert pipe.getvalue() == service.bank.export(PATH[0])

    async def test_answers_are_bounded(self, service: FakeService) -> None:
        config = ClientConfig(max_answer_bytes=399)
        async with await AsyncBankClient.connect(service.endpoint, config=config) as client:
            for call in (client.tree(), client.export(PATH[0])):
                with pytest.raises(InvalidArgumentError) as caught:
                    await call
                assert caught.value.reason is Reason.MESSAGE_TOO_LARGE

    async def test_a_pack_that_cannot_be_read_is_the_callers_error(
        self, bank: FakeBank, client: AsyncBankClient
    ) -> None:
        class BadDisk(io.BytesIO):
            def read(self, size: int | None = -1) -> bytes:
                if self.tell() > 0:
                    raise OSError("bad sector")
                return super().read(1)

        with pytest.raises(OSError, match="bad sector"):
            await client.import_pack(BadDisk(b"pack"))
        assert bank.revision == 0

    async def test_a_tree_that_does_not_fit_into_a_message(self) -> None:
        service = FakeService(FakeBank(spec=None))
        try:
            async with await AsyncBankClient.connect(service.endpoint) as client:
                tree = TreeDocument(arrays={"large": np.zeros(3 << 20, np.float32)})
                with pytest.raises(InvalidArgumentError) as caught:
                    await client.create_bank(SPEC, tree)
        finally:
            service.close()
        assert caught.value.reason is Reason.MESSAGE_TOO_LARGE
        assert service.script.num_calls("CreateBank") == 0


class TwoStatuses:
    """A call to which gRPC sets one status after another."""

    def __init__(self, *statuses: tuple[grpc.StatusCode, str]) -> None:
        self._statuses = statuses
        self._now = statuses[0]

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        for status in self._statuses:
            self._now = status
            callback(self)

    async def code(self) -> grpc.StatusCode:
        return self._now[0]

    async def details(self) -> str:
        return self._now[1]

    async def trailing_metadata(self) -> grpc.aio.Metadata:
        return grpc.aio.Metadata(("key", self._now[1]))


class TestServedStatus:
    SERVED = (grpc.StatusCode.UNAVAILABLE, "away")
    LOST = (grpc.StatusCode.INTERNAL, "Internal error from Core")
    REPORTED = grpc.aio.AioRpcError(LOST[0], grpc.aio.Metadata(), grpc.aio.Metadata(), LOST[1])

    @pytest.mark.parametrize("statuses", [(SERVED, LOST), (LOST, SERVED), (SERVED,)])
    def test_is_found_in_either_order(self, statuses: tuple[tuple[grpc.StatusCode, str]]) -> None:
        call = cast("grpc.aio.Call", TwoStatuses(*statuses))
        error = ServedStatus(call).error_or(self.REPORTED)
        assert (error.code(), error.details()) == self.SERVED
        assert list(error.trailing_metadata()) == [("key", "away")]

    def test_where_there_is_none(self) -> None:
        call = cast("grpc.aio.Call", TwoStatuses(self.LOST))
        assert ServedStatus(call).error_or(self.REPORTED) is self.REPORTED


class TestRestarts:
    async def test_a_shard_that_comes_back_at_another_port(
        self, bank: FakeBank, service: FakeService, client: AsyncBankClient
    ) -> None:
        memory = await client.fetch_blocks(ACROSS)
        service.stop_server("shard-0")
        service.start_shard(bank.shards[0])
        answer = await client.push(
            {ref: _ones(ref) for ref in ACROSS}, base=memory.versions, request_id="p"
        )
        assert answer.versions == dict.fromkeys(ACROSS, 1)
        assert service.scripts["shard-1"].num_calls("PushUpdates") == 1

    async def test_a_shard_that_comes_back_while_a_call_waits(
        self, bank: FakeBank, service: FakeService, client: AsyncBankClient
    ) -> None:
        service.stop_server("shard-0")
        before = service.script.num_calls("GetBank")
        fetching = asyncio.create_task(client.fetch(PATH))
        # Two refreshes that brought nothing: the call goes on trying.
        await service.script.wait_for("GetBank", before + 2)
        service.start_shard(bank.shards[0])
        assert list(await fetching) == list(PATH)

    async def test_an_answer_that_was_lost(
        self, bank: FakeBank, service: FakeService, client: AsyncBankClient
    ) -> None:
        service.scripts["shard-0"].plan("PushUpdates", Fault.DROP_RESPONSE)
        answer = await client.push({PATH[0]: _ones(PATH[0])}, base={PATH[0]: 0})
        assert answer.duplicate
        assert bank.held(PATH[0]).version == 1
        assert len(set(service.scripts["shard-0"].request_ids)) == 1

    async def test_closing_ends_calls_that_run(
        self, service: FakeService, client: AsyncBankClient
    ) -> None:
        service.scripts["shard-0"].plan("FetchBlocks", Fault.SLOW)
        fetching = asyncio.create_task(client.fetch(PATH))
        await service.scripts["shard-0"].wait_for("FetchBlocks")
        await client.close()
        with pytest.raises((UnavailableError, FailedPreconditionError)):
            await fetching

    async def test_cancelling_a_call_is_not_an_error_of_the_service(
        self, service: FakeService, client: AsyncBankClient
    ) -> None:
        before = service.script.num_calls("GetBank")
        service.script.plan("GetBank", Fault.SLOW)
        asking = asyncio.create_task(client.info())
        await service.script.wait_for("GetBank", before + 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert service.script.num_calls("GetBank") == before + 1
        assert list(await client.fetch(PATH)) == list(PATH)


def _ones(ref: BlockRef) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.ones(SPEC.block_shape(ref.level), np.float32)


class TestClosed:
    """A call may be on its way to a shard that has moved, whose connections are closed by then."""

    @pytest.mark.parametrize("max_data_connections", [0, 2])
    async def test_a_call_after_the_end_found_nobody(
        self, service: FakeService, max_data_connections: int
    ) -> None:
        config = ClientConfig(max_data_connections=max_data_connections)
        transport = GrpcTransport(service.endpoint, config)
        await transport.close()
        update = Update(
            request_id="one",
            step=0,
            gradients=(Gradient(ref=PATH[0], base_version=0, values=ones(PATH[0])),),
        )
        for call in (
            transport.get_bank(timeout_s=5),
            transport.fetch(PATH, timeout_s=5),
            transport.push(update, timeout_s=5),
        ):
            with pytest.raises(UnavailableError, match="closed"):
                await call
