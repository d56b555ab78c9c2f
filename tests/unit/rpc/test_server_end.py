"""The server's end of HTTP/2, called by clients whose every byte is written down here."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import suppress

import grpc
import pytest

from http2_callers import (
    LARGE_WINDOWS,
    WINDOW,
    ListenerRig,
    RawCaller,
    check,
    head,
    message,
    payload_of,
    request,
    setting,
    wider,
)
from membank.wire.http2 import end as http2_end
from membank.wire.http2.frames import PREFACE, WORD, ErrorCode, Flag, Frame, Setting, frame

UNKNOWN_FRAME = frame(0xFA, 0xFF, 1, b"for later versions")


@pytest.fixture
def rig() -> Iterator[ListenerRig]:
    with ListenerRig() as rig:
        yield rig


@pytest.fixture
def caller(rig: ListenerRig) -> Iterator[RawCaller]:
    with RawCaller(rig.port) as caller:
        yield caller


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

    def test_headers_that_fill_a_large_frame(self, rig: ListenerRig, caller: RawCaller) -> None:
        # As large as the server says that frames and headers may be.
        caller.say(request(1, noted="x" * 50_000))
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
            frame(Frame.HEADERS, Flag.END_HEADERS, 1, bytes(70_000)),
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
