"""The port for data, called by clients whose every byte is written down here, and by grpcio."""

from __future__ import annotations

import logging
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest

from http2_callers import (
    PATH,
    ListenerRig,
    RawCaller,
    check,
    error_in,
    head,
    message,
    request,
)
from membank.bank_service.rpc.direct import DataListener, listener
from membank.bank_service.rpc.server import ServerConfig
from membank.v1 import block_service_pb2 as block_pb
from membank.v1.block_service_pb2_grpc import BlockServiceStub
from membank.wire import convert
from membank.wire.errors import (
    DeadlineError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnauthenticatedError,
)
from membank.wire.http2.frames import WORD, ErrorCode, Flag, Frame, frame
from membank.wire.spec import BlockRef

UNKNOWN_FRAME = frame(0xFA, 0xFF, 1, b"for later versions")


@pytest.fixture
def rig() -> Iterator[ListenerRig]:
    with ListenerRig() as rig:
        yield rig


@pytest.fixture
def caller(rig: ListenerRig) -> Iterator[RawCaller]:
    with RawCaller(rig.port) as caller:
        yield caller


class TestRefusing:
    @pytest.mark.parametrize(
        ("changed", "status"),
        [
            ({"method": "GET"}, "405"),
            ({"content_type": "application/json"}, "415"),
            ({"content_type": None}, "415"),
            ({"membank_server": "0123"}, "421"),
        ],
    )
    def test_what_is_no_call_to_this_server(
        self, rig: ListenerRig, caller: RawCaller, changed: dict[str, str | None], status: str
    ) -> None:
        caller.say(request(1, None, **changed))
        assert caller.answer()[0][":status"] == status
        caller.say(request(3, membank_server=rig.listener.alternative.server_id))
        check(rig, caller)

    @pytest.mark.parametrize(
        ("changed", "body", "code"),
        [
            ({"path": "/membank.v1.BlockService/GetBank"}, message(), "UNIMPLEMENTED"),
            ({"path": "/elsewhere"}, message(), "UNIMPLEMENTED"),
            ({"grpc_encoding": "gzip"}, message(), "UNIMPLEMENTED"),
            ({}, b"\1" + message()[1:], "INTERNAL"),
            ({}, struct.pack(">BI", 0, 9 << 20), "RESOURCE_EXHAUSTED"),
            ({}, message() * 2, "INVALID_ARGUMENT"),
            ({}, struct.pack(">BI", 0, 3) + b"abc", "INVALID_ARGUMENT"),
            ({"grpc_timeout": "0n"}, message(), "DEADLINE_EXCEEDED"),
        ],
    )
    def test_calls(
        self,
        rig: ListenerRig,
        caller: RawCaller,
        changed: dict[str, str | None],
        body: bytes,
        code: str,
    ) -> None:
        caller.say(request(1, body, **changed))
        if code == "DEADLINE_EXCEEDED":
            assert caller.is_hung_up_on()
            return
        trailers = caller.answer()[2]
        assert trailers["grpc-status"] == str(grpc.StatusCode[code].value[0])
        caller.say(request(3))
        check(rig, caller)

    def test_the_rest_of_a_request_that_is_refused_is_not_waited_for(
        self, rig: ListenerRig, caller: RawCaller
    ) -> None:
        caller.say(head(path="/elsewhere"), frame(Frame.DATA, 0, 1, bytes(1_000)))
        assert caller.answer()[2]["grpc-status"] == "12"
        said = caller.next_of(Frame.RST_STREAM)
        assert said.payload == WORD.pack(ErrorCode.NO_ERROR)
        # What was on its way is of no interest.
        caller.say(frame(Frame.DATA, Flag.END_STREAM, 1, bytes(5_000)), request(3))
        check(rig, caller)

    def test_errors_of_the_shard_arrive_as_they_are(
        self, rig: ListenerRig, caller: RawCaller
    ) -> None:
        rig.shard.error = NotFoundError(
            "gone: 100 %\nwithout a trace, \u00e4h",
            reason=Reason.UNKNOWN_CLUSTER,
            metadata={"a": "b" * 20_000},
        )
        caller.say(request())
        said = caller.next_of(Frame.HEADERS)
        block = said.payload
        while not said.flags & Flag.END_HEADERS:
            said = caller.next_of(Frame.CONTINUATION)
            block += said.payload
        error = error_in({str(k): str(v) for k, v in caller._decoder.decode(block)})
        assert isinstance(error, NotFoundError)
        assert (error.message, error.reason) == (rig.shard.error.message, Reason.UNKNOWN_CLUSTER)
        assert error.metadata == rig.shard.error.metadata
        assert rig.budget.used_bytes == 0

    @pytest.mark.parametrize("error", [OSError("disk"), TimeoutError(), RuntimeError("defect")])
    def test_defects_do_not_leave_the_server(
        self,
        rig: ListenerRig,
        caller: RawCaller,
        error: Exception,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        rig.shard.error = error
        caller.say(request())
        told = error_in(caller.answer()[2])
        assert isinstance(told, InternalError)
        assert told.metadata["request_id"] in caplog.text
        assert "FetchBlocks failed" in caplog.text
        rig.shard.error = None
        caller.say(request(3))
        check(rig, caller)

    def test_what_does_not_fit_into_the_budget(self, rig: ListenerRig, caller: RawCaller) -> None:
        with rig.budget.reserve(1 << 30, what="test"):
            caller.say(request())
            error = error_in(caller.answer()[2])
        assert isinstance(error, ResourceExhaustedError)
        assert "retry_after_ms" in error.metadata

    def test_blocks_that_there_are_not(self, caller: RawCaller) -> None:
        caller.say(request(1, message([BlockRef(1, 99)])))
        assert isinstance(error_in(caller.answer()[2]), NotFoundError)

    def test_only_known_tokens_pass(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        tokens = tmp_path / "tokens"
        tokens.write_text("sesame rita reader\n")
        with ListenerRig(token_file=tokens) as rig, RawCaller(rig.port) as caller:
            for stream, authorization in ((1, None), (3, "Bearer wrong"), (5, "Basic sesame")):
                caller.say(request(stream, authorization=authorization))
                assert isinstance(error_in(caller.answer()[2]), UnauthenticatedError)
            assert not rig.shard.is_asked.is_set()
            caller.say(request(7, authorization="Bearer sesame"))
            check(rig, caller)
        assert "sesame" not in caplog.text


class TestConnections:
    def test_too_many_are_sent_away(self) -> None:
        with ListenerRig(max_connections=2) as rig, ExitStack() as stack:
            callers = [stack.enter_context(RawCaller(rig.port)) for _ in range(2)]
            for caller in callers:
                caller.say(request())
                check(rig, caller)
            with RawCaller(rig.port, greeting=b"") as caller:
                assert caller.is_hung_up_on()
            callers.pop().close()
            ends = time.monotonic() + 10
            while rig.listener.num_connections == 2:
                assert time.monotonic() < ends
            with RawCaller(rig.port) as caller:
                caller.say(request())
                check(rig, caller)

    def test_a_lack_of_threads_passes(
        self, rig: ListenerRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name == "membank-data-call":
                raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as scarce:
            scarce.setattr(threading.Thread, "start", refuse)
            with RawCaller(rig.port, greeting=b"") as caller:
                assert caller.is_hung_up_on()
        with RawCaller(rig.port) as caller:
            caller.say(request())
            check(rig, caller)

    @pytest.mark.parametrize("idle", [UNKNOWN_FRAME, frame(Frame.PING, Flag.ACK, 0, bytes(8))])
    def test_who_says_much_and_asks_nothing_is_sent_away(
        self, rig: ListenerRig, caller: RawCaller, idle: bytes
    ) -> None:
        caller.say(request())
        check(rig, caller)
        with suppress(OSError):  # the service may have hung up by then
            caller.say(idle * 2_000)
        assert caller.is_hung_up_on()

    def test_who_is_refused_all_does_not_stay(
        self, rig: ListenerRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "_GREETING_S", 0.2)
        with RawCaller(rig.port) as caller:
            caller.say(request(1, message(), path="/elsewhere"))
            assert caller.answer()[2]["grpc-status"] == "12"
            caller.next_of(Frame.GOAWAY)
            assert caller.is_hung_up_on()

    def test_an_idle_one_is_ended(self) -> None:
        with ListenerRig(idle_s=0.1) as rig, RawCaller(rig.port) as caller:
            caller.say(request())
            check(rig, caller)
            away = caller.next_of(Frame.GOAWAY)
            assert away.payload == WORD.pack(1) + WORD.pack(ErrorCode.NO_ERROR)
            assert caller.is_hung_up_on()

    def test_draining_ends_idle_ones_and_lets_calls_end(self) -> None:
        with (
            ListenerRig() as rig,
            RawCaller(rig.port) as idle,
            RawCaller(rig.port) as caller,
        ):
            for one in (idle, caller):
                one.say(request())
                check(rig, one)
            rig.shard.is_asked.clear()
            rig.shard.may_answer.clear()
            caller.say(request(3))
            assert rig.shard.is_asked.wait(10.0)
            rig.listener.drain()
            idle.next_of(Frame.GOAWAY)
            assert idle.is_hung_up_on()
            rig.shard.may_answer.set()
            check(rig, caller)
            assert caller.next_of(Frame.GOAWAY).payload[:4] == WORD.pack(3)
            assert caller.is_hung_up_on()
            rig.listener.stop()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", rig.port))

    def test_stopping_does_not_wait_for_a_caller_that_reads_nothing(self) -> None:
        rig = ListenerRig(16 << 20)
        with RawCaller(rig.port) as caller:
            caller.say(request())
            caller.next_of(Frame.DATA)
            rig.listener.stop()
            assert rig.budget.used_bytes == 0
            assert rig.listener.num_connections == 0
        rig.listener.stop()

    def test_a_port_that_is_taken(self, rig: ListenerRig) -> None:
        config = ServerConfig(data_port=rig.port)
        with pytest.raises(FailedPreconditionError) as caught:
            DataListener(config, rig.shard, rig.budget)  # type: ignore[arg-type]
        assert caught.value.reason is Reason.PORT_IN_USE

    def test_a_port_that_there_is_not(self) -> None:
        with pytest.raises(FailedPreconditionError):
            ServerConfig(data_port=1 << 16)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    make = Path(__file__).resolve().parents[3] / "scripts" / "make_tls.sh"
    subprocess.run([make, folder], check=True, capture_output=True)
    return folder / "tls.crt", folder / "tls.key"


class TestGrpcio:
    """A client that is not of ours."""

    @pytest.mark.parametrize("num_bytes", [0, 100, 70_000, 9 << 20])
    def test_fetches(self, num_bytes: int) -> None:
        with (
            ListenerRig(num_bytes) as rig,
            grpc.insecure_channel(f"localhost:{rig.port}") as channel,
        ):
            for _ in range(3):
                assert _fetched(channel) == rig.shard.content.tobytes()

    def test_many_at_a_time(self) -> None:
        with ListenerRig(50_000) as rig, grpc.insecure_channel(f"localhost:{rig.port}") as channel:
            with ThreadPoolExecutor(20) as threads:
                contents = list(threads.map(_fetched, [channel] * 20))
            assert contents == [rig.shard.content.tobytes()] * 20

    def test_cancels_and_goes_on(self) -> None:
        with (
            ListenerRig(32 << 20) as rig,
            grpc.insecure_channel(f"localhost:{rig.port}") as channel,
        ):
            for _ in range(3):
                call = BlockServiceStub(channel).FetchBlocks(_REQUEST, timeout=10)
                next(call)
                call.cancel()
            assert _fetched(channel) == rig.shard.content.tobytes()

    def test_over_tls(self, tls: tuple[Path, Path]) -> None:
        credentials = grpc.ssl_channel_credentials(tls[0].read_bytes())
        with (
            ListenerRig(9 << 20, tls=tls) as rig,
            grpc.secure_channel(f"localhost:{rig.port}", credentials) as channel,
        ):
            assert _fetched(channel) == rig.shard.content.tobytes()
            with RawCaller(rig.port) as plain:
                assert plain.is_hung_up_on()

    def test_is_told_of_errors(self, rig: ListenerRig) -> None:
        with grpc.insecure_channel(f"localhost:{rig.port}") as channel:
            rig.shard.error = InvalidArgumentError("not so")
            with pytest.raises(grpc.RpcError, match="not so"):
                _fetched(channel)
            rig.shard.error = DeadlineError("too late")
            with pytest.raises(grpc.RpcError, match="too late"):
                _fetched(channel)
            with pytest.raises(grpc.RpcError, match="Method not found"):
                BlockServiceStub(channel).GetBank(block_pb.GetBankRequest(), timeout=10)
        assert PATH.endswith("FetchBlocks")


def test_a_certificate_that_cannot_be_used(tmp_path: Path, tls: tuple[Path, Path]) -> None:
    with pytest.raises(FailedPreconditionError, match="certificate"):
        ListenerRig(tls=(tmp_path / "none", tls[1]))


_REQUEST = block_pb.FetchBlocksRequest(refs=[convert.ref_to_pb(BlockRef(1, 0))])


def _fetched(channel: grpc.Channel) -> bytes:
    call = BlockServiceStub(channel).FetchBlocks(_REQUEST, timeout=10, wait_for_ready=True)
    return b"".join(m.data for m in call)
