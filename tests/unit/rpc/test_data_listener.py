"""The port for data, called by clients whose every byte is written down here, and by grpcio."""

from __future__ import annotations

import logging
import shutil
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest

from http2_callers import (
    LARGE_WINDOWS,
    PATH,
    WINDOW,
    ListenerRig,
    RawCaller,
    error_in,
    head,
    message,
    payload_of,
    request,
    setting,
    wider,
)
from membank.bank_service.rpc.direct import DataListener
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
from membank.wire.http2 import end as http2_end
from membank.wire.http2.frames import PREFACE, WORD, ErrorCode, Flag, Frame, Setting, frame
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


def check(rig: ListenerRig, caller: RawCaller) -> None:
    """Check that the next answer is the shard's block."""
    headers, body, trailers = caller.answer()
    assert (headers[":status"], headers["content-type"]) == ("200", "application/grpc")
    assert trailers == {"grpc-status": "0"}
    assert payload_of(body) == rig.shard.content.tobytes()


class TestReading:
    def test_calls_one_after_the_other(self, rig: ListenerRig, caller: RawCaller) -> None:
        for stream in (1, 3, 9, 11):
            caller.say(request(stream))
            check(rig, caller)

    def test_a_call_beside_another_one_is_refused(self) -> None:
        with ListenerRig(100_000) as rig, RawCaller(rig.port) as caller:
            caller.say(request(1))
            body = bytearray()
            while len(body) < WINDOW:
                body += caller.next_of(Frame.DATA).payload
            caller.say(request(3))
            refusal = caller.next_of(Frame.RST_STREAM)
            assert (refusal.stream, refusal.payload) == (3, WORD.pack(ErrorCode.REFUSED_STREAM))
            caller.say(LARGE_WINDOWS)
            while not (said := caller.next_of(Frame.DATA, Frame.HEADERS)).ends:
                body += said.payload
            assert payload_of(body) == rig.shard.content.tobytes()
            caller.say(request(5))
            check(rig, caller)

    def test_a_call_after_one_that_was_given_up_is_not(self) -> None:
        with ListenerRig(40 << 20) as rig, RawCaller(rig.port) as caller:
            caller.say(LARGE_WINDOWS, request(1))
            assert rig.shard.is_asked.wait(10.0)
            # In the midst of a frame, which is sent to its end.
            caller.next_of(Frame.HEADERS)
            given_up = frame(Frame.RST_STREAM, 0, 1, WORD.pack(ErrorCode.CANCEL))
            caller.say(given_up, request(3))
            body = bytearray()
            while not (said := caller.next_of(Frame.DATA, Frame.HEADERS)).ends:
                body += said.payload if (said.kind, said.stream) == (Frame.DATA, 3) else b""
            assert said.stream == 3
            assert payload_of(body) == rig.shard.content.tobytes()

    @pytest.mark.parametrize("step", [1, 2, 7, 40])
    def test_a_request_in_pieces_of_any_size(self, rig: ListenerRig, step: int) -> None:
        said = PREFACE + frame(Frame.SETTINGS, 0, 0) + request()
        with RawCaller(rig.port, greeting=b"") as caller:
            caller.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for at in range(0, len(said), step):
                caller.say(said[at : at + step])
            check(rig, caller)

    def test_a_body_in_frames_of_one_byte_among_all_that_may_come_between(
        self, rig: ListenerRig, caller: RawCaller
    ) -> None:
        noise = (
            frame(Frame.PING, 0, 0, b"12345678"),
            setting(Setting.MAX_FRAME_SIZE, 20_000),
            frame(Frame.SETTINGS, Flag.ACK, 0),
            wider(5),
            wider(5, stream=1),
            frame(Frame.PRIORITY, 0, 1, b"\0\0\0\0\x10"),
            UNKNOWN_FRAME,
        )
        caller.say(head())
        for number, byte in enumerate(message()):
            padding = number % 3
            padded = bytes([padding, byte]) + bytes(padding)
            caller.say(frame(Frame.DATA, Flag.PADDED, 1, padded), noise[number % len(noise)])
        caller.say(frame(Frame.DATA, Flag.END_STREAM, 1))
        check(rig, caller)

    def test_headers_that_are_continued_padded_and_of_a_priority(
        self, rig: ListenerRig, caller: RawCaller
    ) -> None:
        block = head()[9:]
        flags = Flag.PADDED | Flag.PRIORITY
        first = frame(Frame.HEADERS, flags, 1, b"\x03" + b"\0\0\0\0\x10" + block[:9] + b"\0\0\0")
        caller.say(
            first,
            frame(Frame.CONTINUATION, 0, 1, block[9:20]),
            frame(Frame.CONTINUATION, Flag.END_HEADERS, 1, block[20:]),
            frame(Frame.DATA, Flag.END_STREAM, 1, message()),
        )
        check(rig, caller)

    def test_trailers_of_a_request_say_nothing(self, rig: ListenerRig, caller: RawCaller) -> None:
        caller.say(head(), frame(Frame.DATA, 0, 1, message()))
        caller.say(head(flags=Flag.END_HEADERS | Flag.END_STREAM))
        check(rig, caller)

    def test_pings_are_answered(self, caller: RawCaller) -> None:
        caller.say(frame(Frame.PING, 0, 0, b"12345678"))
        answer = caller.next_of(Frame.PING)
        assert (answer.flags, answer.payload) == (Flag.ACK, b"12345678")

    @pytest.mark.parametrize(
        "garbage",
        [
            b"GET / HTTP/1.1\r\nHost: shard\r\n\r\n",
            bytes(100),
            PREFACE + frame(Frame.PING, 0, 0, b"12345678"),
            PREFACE + frame(Frame.SETTINGS, Flag.ACK, 0),
            PREFACE + frame(Frame.SETTINGS, 0, 0, b"1"),
        ],
    )
    def test_whoever_speaks_otherwise_is_hung_up_on(self, rig: ListenerRig, garbage: bytes) -> None:
        with RawCaller(rig.port, greeting=garbage) as caller:
            assert caller.is_hung_up_on()
        rig.wait_until_idle()

    @pytest.mark.parametrize(
        "wrong",
        [
            frame(Frame.DATA, 0, 1, b"x"),
            head(2),
            frame(Frame.HEADERS, Flag.END_HEADERS, 1, b"\xff" * 20),
            frame(Frame.HEADERS, 0, 1, b"") + frame(Frame.PING, 0, 0, b"12345678"),
            frame(Frame.HEADERS, 0, 1, b"") + frame(Frame.CONTINUATION, 0, 1, b""),
            frame(Frame.HEADERS, Flag.PADDED | Flag.END_HEADERS, 1, b"\xff"),
            frame(Frame.HEADERS, 0, 1, b"") + frame(Frame.CONTINUATION, 0, 1, bytes(16_000)) * 5,
            frame(Frame.CONTINUATION, Flag.END_HEADERS, 1, b""),
            frame(Frame.PUSH_PROMISE, Flag.END_HEADERS, 1, b"\0\0\0\2"),
            frame(Frame.PING, 0, 0, b"short"),
            frame(Frame.WINDOW_UPDATE, 0, 0, WORD.pack(0)),
            wider((1 << 31) - 1),
            setting(Setting.INITIAL_WINDOW_SIZE, 1 << 31),
            setting(Setting.MAX_FRAME_SIZE, 100),
            frame(Frame.PING, 0, 0, bytes(17_000)),
            request(1, grpc_timeout="soon"),
            head() + frame(Frame.DATA, Flag.PADDED, 1, b"\x09x"),
            head() + frame(Frame.DATA, Flag.END_STREAM, 1, message()[:-1]),
            head() + head(),
        ],
    )
    def test_what_is_no_http2_ends_the_connection_and_says_so(
        self, rig: ListenerRig, caller: RawCaller, wrong: bytes
    ) -> None:
        caller.say(wrong)
        away = caller.next_of(Frame.GOAWAY)
        assert away.payload[4:] == WORD.pack(ErrorCode.PROTOCOL_ERROR)
        assert caller.is_hung_up_on()
        rig.wait_until_idle()

    def test_more_than_the_windows_allow(
        self, caller: RawCaller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http2_end, "WINDOW", 70_000)
        caller.say(head(), frame(Frame.DATA, 0, 1, bytes(70_001)))
        assert caller.next_of(Frame.GOAWAY).payload[4:] == WORD.pack(ErrorCode.PROTOCOL_ERROR)


def _say_all(caller: RawCaller, frames: bytes) -> None:
    # It may be hung up on before it has said all.
    with suppress(OSError):
        caller.say(frames)


class TestAnswering:
    def test_as_much_as_the_windows_allow(self) -> None:
        with ListenerRig(300_000) as rig, RawCaller(rig.port) as caller:
            caller.say(request())
            first = caller.next_of(Frame.HEADERS)
            assert caller.fields(first)[":status"] == "200"
            body = bytearray()
            while len(body) < WINDOW:
                said = caller.next_of(Frame.DATA)
                assert len(said.payload) <= 16_384
                body += said.payload
            assert len(body) == WINDOW
            # Only one of the two is wider.
            caller.say(wider(1_000), frame(Frame.PING, 0, 0, b"anything"))
            assert caller.next_of(Frame.PING, Frame.DATA).kind == Frame.PING
            caller.say(wider(10, stream=1))
            said = caller.next_of(Frame.DATA)
            assert len(said.payload) == 10
            body += said.payload
            # A setting counts for streams that are under way, and frames may be larger then.
            caller.say(
                setting(Setting.MAX_FRAME_SIZE, 200_000),
                setting(Setting.INITIAL_WINDOW_SIZE, 1 << 20),
                wider(1 << 20),
            )
            largest = 0
            while (said := caller.next_of(Frame.DATA, Frame.HEADERS)).kind == Frame.DATA:
                body += said.payload
                largest = max(largest, len(said.payload))
            assert largest == 200_000
            assert payload_of(body) == rig.shard.content.tobytes()

    def test_settings_that_leave_a_window_of_less_than_nothing(self) -> None:
        with ListenerRig(100_000) as rig, RawCaller(rig.port) as caller:
            caller.say(request())
            body = bytearray()
            while len(body) < WINDOW:
                body += caller.next_of(Frame.DATA).payload
            caller.say(setting(Setting.INITIAL_WINDOW_SIZE, 0), wider(1 << 20))
            caller.say(wider(WINDOW + 5, stream=1))
            assert len(caller.next_of(Frame.DATA).payload) == 5

    def test_what_a_caller_asks_while_its_kernel_is_full(self) -> None:
        with (
            ListenerRig(40 << 20) as rig,
            RawCaller(rig.port) as caller,
        ):
            caller.say(LARGE_WINDOWS, request())
            assert rig.shard.is_asked.wait(10.0)
            pings = [struct.pack(">Q", number) for number in range(50)]
            caller.say(*(frame(Frame.PING, 0, 0, ping) for ping in pings))
            body, answered = bytearray(), []
            while not (said := caller.next_of(Frame.DATA, Frame.HEADERS, Frame.PING)).ends:
                if said.kind == Frame.PING:
                    answered.append(said.payload)
                elif said.kind == Frame.DATA:
                    body += said.payload
            assert payload_of(body) == rig.shard.content.tobytes()
            # Those that are not answered by now are next.
            while len(answered) < len(pings):
                answered.append(caller.next_of(Frame.PING).payload)
            assert answered == pings

    def test_who_asks_much_and_takes_no_answer(self) -> None:
        with (
            ListenerRig(64 << 20, stall_s=0.5) as rig,
            RawCaller(rig.port) as caller,
        ):
            caller.say(LARGE_WINDOWS, request())
            assert rig.shard.is_asked.wait(10.0)
            _say_all(caller, frame(Frame.PING, 0, 0, b"12345678") * 500_000)
            rig.wait_until_idle()

    def test_a_call_that_is_given_up_in_its_midst(self) -> None:
        with ListenerRig(1 << 20) as rig, RawCaller(rig.port) as caller:
            caller.say(request())
            caller.next_of(Frame.DATA)
            caller.say(frame(Frame.RST_STREAM, 0, 1, WORD.pack(ErrorCode.CANCEL)))
            caller.say(LARGE_WINDOWS, request(3))
            while (said := caller.next_of(Frame.HEADERS)).stream != 3:
                pass
            assert caller.fields(said)[":status"] == "200"
            assert rig.budget.used_bytes in (0, 1 << 20)

    def test_a_call_that_is_given_up_before_it_is_answered(self) -> None:
        with ListenerRig(1 << 20) as rig, RawCaller(rig.port) as caller:
            rig.shard.may_answer.clear()
            caller.say(request())
            assert rig.shard.is_asked.wait(10.0)
            caller.say(frame(Frame.RST_STREAM, 0, 1, WORD.pack(ErrorCode.CANCEL)))
            caller.wait_until_heard()
            rig.shard.may_answer.set()
            caller.say(request(3))
            assert caller.next_of(Frame.HEADERS, Frame.DATA).stream == 3

    def test_who_takes_nothing_is_hung_up_on(self) -> None:
        with ListenerRig(64 << 20, stall_s=0.2) as rig:
            with RawCaller(rig.port) as caller:
                caller.say(request())
                caller.next_of(Frame.DATA)
                assert rig.budget.used_bytes == 64 << 20
                # It goes on saying things, and widens no window.
                caller.say(frame(Frame.PING, 0, 0, b"12345678"))
                rig.wait_until_idle()
            with RawCaller(rig.port) as caller:
                caller.say(LARGE_WINDOWS, request())
                assert rig.shard.is_asked.wait(10.0)
                rig.wait_until_idle()

    @pytest.mark.parametrize("half", [socket.SHUT_WR, socket.SHUT_RDWR])
    def test_who_hangs_up_in_the_midst(self, half: int) -> None:
        with ListenerRig(16 << 20) as rig, RawCaller(rig.port) as caller:
            caller.say(request())
            caller.next_of(Frame.DATA)
            caller.socket.shutdown(half)
            rig.wait_until_idle()

    def test_a_deadline_bounds_the_answer(self) -> None:
        with ListenerRig(16 << 20) as rig, RawCaller(rig.port) as caller:
            caller.say(request(grpc_timeout="200m"))
            caller.next_of(Frame.DATA)
            rig.wait_until_idle()
            assert caller.is_hung_up_on()

    def test_a_call_without_a_body(self, caller: RawCaller) -> None:
        caller.say(head(flags=Flag.END_HEADERS | Flag.END_STREAM))
        assert caller.answer()[2]["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])


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
