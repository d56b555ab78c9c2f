"""Fetches over a connection of their own, against servers whose every byte is written down here."""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

import grpc
import hpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fake_bank import FakeBank
from http2_scripts import (
    REFS,
    SETTINGS,
    Client,
    answer_messages,
    data,
    fetched_from,
    frames_in,
    head,
    headers_frame,
    message,
    refusal,
    sent_by,
    trailers,
    whole_answer,
)
from membank.client.transport.contract import FetchAnswer
from membank.client.transport.landing import Landing
from membank.client.transport.payloads import FETCH_DATA, FetchedPayloads
from membank.v1 import block_service_pb2 as block_pb
from membank.wire.buffers import BufferPool
from membank.wire.crc import crc32c
from membank.wire.errors import (
    AccessDeniedError,
    CorruptionError,
    DeadlineError,
    FailedPreconditionError,
    InternalError,
    MembankError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.framing import MAX_MESSAGE_BYTES
from membank.wire.http2 import end as http2_end
from membank.wire.http2.frames import ErrorCode, Flag, Frame, ProtocolError, Setting, frame
from membank.wire.http2.headers import encode_headers
from membank.wire.records import BlockHeader
from membank.wire.spec import BlockRef

BANK = FakeBank()
UNKNOWN_FRAME = frame(0xFA, 0xFF, 1, b"for later versions")
NOISE = (
    frame(Frame.PING, 0, 0, b"12345678"),
    frame(Frame.SETTINGS, 0, 0, struct.pack(">HI", Setting.MAX_FRAME_SIZE, 20_000)),
    frame(Frame.SETTINGS, Flag.ACK, 0),
    frame(Frame.WINDOW_UPDATE, 0, 0, struct.pack(">I", 5)),
    frame(Frame.WINDOW_UPDATE, 0, 1, struct.pack(">I", 5)),
    frame(Frame.PRIORITY, 0, 1, b"\0\0\0\0\x10"),
    UNKNOWN_FRAME,
)


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client()
    yield client
    client.close()


def check(answer: FetchAnswer) -> None:
    """Check that `REFS` of `BANK` have arrived."""
    assert tuple(block.ref for block in answer.blocks) == REFS
    for block in answer.blocks:
        np.testing.assert_array_equal(block.weight, BANK.held(block.ref).weight)


class TestReading:
    @pytest.mark.parametrize("drip", [1, 2, 3, 5, 8, 9, 10, 17, 64, 1000])
    def test_an_answer_in_pieces_of_any_size(self, drip: int) -> None:
        check(fetched_from(whole_answer(BANK), drip=drip))

    def test_frames_that_end_anywhere(self) -> None:
        bodies = b"".join(map(message, answer_messages(BANK)))
        # At every byte of what precedes the first payload, and here and there after that.
        for cut in {*range(140), *range(140, len(bodies), 37), len(bodies)}:
            frames = data(bodies[:cut]) + data(bodies[cut:])
            check(fetched_from(SETTINGS + head() + frames + trailers()))

    def test_frames_of_one_byte_among_all_that_may_come_between(self) -> None:
        bodies = b"".join(map(message, answer_messages(BANK)))
        frames = b"".join(
            data(bodies[at : at + 1], padding=at % 3 or None)
            + (NOISE[at // 40 % len(NOISE)] if at % 40 == 0 else b"")
            for at in range(len(bodies))
        )
        check(fetched_from(SETTINGS + head() + frames + trailers()))

    def test_blocks_that_share_messages(self) -> None:
        headers, *parts = answer_messages(BANK)
        payload = b"".join(part.data for part in parts)
        for size in (1, 7, 100, 5000):
            bodies = [message(headers)] + [
                message(block_pb.FetchBlocksResponse(data=payload[at : at + size]))
                for at in range(0, len(payload), size)
            ]
            check(fetched_from(SETTINGS + head() + b"".join(map(data, bodies)) + trailers()))

    def test_all_in_one_message(self) -> None:
        whole, *parts = answer_messages(BANK)
        whole.data = b"".join(part.data for part in parts)
        check(fetched_from(SETTINGS + head() + data(message(whole)) + trailers()))

    def test_headers_in_pieces_with_padding_and_priority(self) -> None:
        block = head()[9:]
        first = frame(
            Frame.HEADERS, Flag.PADDED | Flag.PRIORITY, 1, b"\2" + bytes(5) + block[:3] + bytes(2)
        )
        rest = frame(Frame.CONTINUATION, 0, 1, block[3:5]) + frame(
            Frame.CONTINUATION, Flag.END_HEADERS, 1, block[5:]
        )
        check(fetched_from(whole_answer(BANK).replace(head(), first + rest)))

    def test_informational_headers_are_passed_over(self) -> None:
        early = headers_frame([(":status", "103")])
        check(fetched_from(whole_answer(BANK).replace(head(), early + head())))


@dataclass
class Stream:
    """An answer as hypothesis thinks it up."""

    messages: list[block_pb.FetchBlocksResponse]
    script: bytes = field(repr=False)


@st.composite
def streams(draw: st.DrawFn) -> Stream:
    """Draw a way to send `REFS`: in any messages, frames and company."""
    whole, *parts = answer_messages(BANK)
    payload = b"".join(part.data for part in parts)
    messages = [
        block_pb.FetchBlocksResponse(revision=7, headers=whole.headers),
        *(
            block_pb.FetchBlocksResponse(data=payload[start:end])
            for start, end in _cuts(draw, len(payload), 5)
        ),
    ]
    if draw(st.booleans()):
        messages[0].MergeFrom(messages.pop(1))
    if draw(st.booleans()):
        messages.insert(1, block_pb.FetchBlocksResponse())
    body = b"".join(map(message, messages))
    frames = []
    for start, end in _cuts(draw, len(body), 8):
        padding = draw(st.none() | st.integers(0, 255))
        frames += [draw(st.sampled_from((b"", *NOISE))), data(body[start:end], padding=padding)]
    return Stream(messages, SETTINGS + head() + b"".join(frames) + trailers())


def _cuts(draw: st.DrawFn, length: int, most: int) -> list[tuple[int, int]]:
    inner = draw(st.lists(st.integers(0, length), max_size=most))
    points = sorted([0, *inner, length])
    return list(pairwise(points))


@settings(deadline=None, max_examples=30)
@given(streams(), st.none() | st.integers(1, 300))
def test_reads_what_the_generated_parser_reads(stream: Stream, drip: int | None) -> None:
    expected = FetchedPayloads(REFS, Landing(BufferPool(0)), max_bytes=1 << 30, where="")
    for item in stream.messages:
        expected.take(FETCH_DATA.deserialize(item.SerializeToString()))
    answer = fetched_from(stream.script, drip=drip)
    assert answer.revision == expected.finish().revision
    check(answer)


class TestRequests:
    def test_says_what_gRPC_wants(self, client: Client) -> None:
        client.server.sendall(whole_answer(BANK))
        check(client.fetch(timeout_s=5.0))
        sent = sent_by(client)
        (_, flags, stream, block) = next(each for each in sent if each[0] == Frame.HEADERS)
        (*_, body) = next(each for each in sent if each[0] == Frame.DATA)
        headers = {str(name): str(value) for name, value in hpack.Decoder().decode(block)}
        assert (flags, stream) == (Flag.END_HEADERS, 1)
        assert headers[":path"] == "/membank.v1.BlockService/FetchBlocks"
        assert headers["authorization"] == "Bearer sesame"
        assert 4000 < int(headers["grpc-timeout"].removesuffix("m")) <= 5000
        request = block_pb.FetchBlocksRequest.FromString(body[5:])
        assert len(request.refs) == len(REFS)

    def test_the_token_is_in_no_log(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        client.server.sendall(whole_answer(BANK))
        client.fetch()
        assert "sesame" not in caplog.text

    def test_headers_of_any_length(self) -> None:
        for length in (0, 1, 126, 127, 128, 254, 255, 300, 20_000):
            fields = [("x" * max(1, length), "y" * length), ("authorization", "secret")]
            decoded = list(hpack.Decoder().decode(encode_headers(fields), raw=True))
            assert [(name.decode(), value.decode()) for name, value in decoded] == fields
            assert [field.indexable for field in decoded] == [True, False]

    def test_pings_and_settings_are_acknowledged(self, client: Client) -> None:
        client.server.sendall(whole_answer(BANK).replace(head(), NOISE[0] + head()))
        client.fetch()
        sent = sent_by(client)
        assert (Frame.PING, Flag.ACK, 0, b"12345678") in sent
        assert (Frame.SETTINGS, Flag.ACK, 0, b"") in sent

    def test_one_after_the_other(self, client: Client) -> None:
        client.server.sendall(whole_answer(BANK))
        check(client.fetch())
        assert client.connection is not None
        assert client.connection.is_usable()
        bodies = b"".join(data(message(each), stream=3) for each in answer_messages(BANK))
        client.server.sendall(head(stream=3) + bodies + trailers(stream=3))
        check(client.fetch())

    def test_large_ones_wait_for_the_servers_window(self, client: Client) -> None:
        refs = [BlockRef(2, number) for number in range(30_000)]
        # Of the other end's making: it wants 100,000 bytes at first, and in frames of 20,000.
        window = struct.pack(">HI", Setting.INITIAL_WINDOW_SIZE, 100_000)
        frames = struct.pack(">HI", Setting.MAX_FRAME_SIZE, 20_000)
        client.server.sendall(frame(Frame.SETTINGS, 0, 0, window + frames))
        more = struct.pack(">I", 1 << 20)
        client.connect()
        thread = threading.Thread(target=_widen_when_asked, args=(client, more, len(refs)))
        thread.start()
        with pytest.raises(NotFoundError):
            client.fetch(refs)
        thread.join()

    def test_a_refusal_before_all_is_sent(self, client: Client) -> None:
        refs = [BlockRef(2, number) for number in range(30_000)]
        client.server.sendall(SETTINGS + refusal(NotFoundError("not here")))
        with pytest.raises(NotFoundError):
            client.fetch(refs)
        assert client.connection is not None
        assert not client.connection.is_usable()
        assert sent_by(client)[-1] == (Frame.RST_STREAM, 0, 1, struct.pack(">I", ErrorCode.CANCEL))


def _widen_when_asked(client: Client, more: bytes, num_refs: int) -> None:
    """Read a request within its window, then all of it, and refuse it."""
    sent = b""

    def received() -> int:
        return sum(len(f[3]) for f in frames_in(sent) if f[0] == Frame.DATA)

    while received() < 65_535:  # the connection's own window is smaller than the stream's
        sent += client.server.recv(1 << 20)
    assert received() == 65_535
    for stream in (0, 1):
        client.server.sendall(frame(Frame.WINDOW_UPDATE, 0, stream, more))
    while not any(f[0] == Frame.DATA and f[1] & Flag.END_STREAM for f in frames_in(sent)):
        sent += client.server.recv(1 << 20)
    parts = [f[3] for f in frames_in(sent) if f[0] == Frame.DATA]
    assert max(map(len, parts)) <= 20_000
    assert len(block_pb.FetchBlocksRequest.FromString(b"".join(parts)[5:]).refs) == num_refs
    client.server.sendall(refusal(NotFoundError("not here")))


class TestWindows:
    def test_are_widened_as_bytes_are_read(
        self, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http2_end, "WINDOW", 70_000)
        content = np.random.default_rng(0).random((2, 3, 8, 8_000), np.float32)
        header, parts = _block(content)
        bodies = b"".join(map(message, (header, *parts)))
        thread = threading.Thread(target=_send_within_windows, args=(client, bodies))
        thread.start()
        answer = client.fetch(REFS[:1])
        thread.join()
        np.testing.assert_array_equal(answer.blocks[0].weight, content)

    def test_more_than_they_allow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(http2_end, "WINDOW", 70_000)
        with pytest.raises(ProtocolError, match="windows"):
            fetched_from(SETTINGS + head() + data(bytes(70_001)))

    def test_a_slow_reader_makes_the_sender_wait(self, client: Client) -> None:
        content = np.zeros((2, 3, 8, 40_000), np.float32)
        header, parts = _block(content)
        go_on, landing = threading.Event(), SlowLanding(BufferPool(0))
        landing.go_on = go_on
        client.server.sendall(SETTINGS + head() + data(message(header)))
        thread = threading.Thread(
            target=client.fetch, args=(REFS[:1],), kwargs={"landing": landing}
        )
        thread.start()
        landing.is_asked.wait(10.0)
        client.server.setblocking(False)
        body = b"".join(data(message(part)) for part in parts)
        sent = 0
        with suppress(BlockingIOError):
            while sent < len(body):
                sent += client.server.send(body[sent:])
        # What the kernel holds, and no more.
        assert sent < 4 << 20
        go_on.set()
        client.server.setblocking(True)
        client.server.sendall(body[sent:] + trailers())
        thread.join()


class SlowLanding(Landing):
    """Places a block when it is told to."""

    go_on: threading.Event

    def __init__(self, pool: BufferPool) -> None:
        super().__init__(pool)
        self.is_asked = threading.Event()

    def place(self, header: BlockHeader) -> NDArray[np.uint8]:
        self.is_asked.set()
        self.go_on.wait(10.0)
        return super().place(header)


def _block(
    content: NDArray[np.float32],
) -> tuple[block_pb.FetchBlocksResponse, list[block_pb.FetchBlocksResponse]]:
    """Return a header for `content`, which no bank has, and its data in messages of 1 MiB."""
    header = answer_messages(BANK, REFS[:1])[0]
    header.headers[0].shape[:] = content.shape
    header.headers[0].num_bytes = content.nbytes
    header.headers[0].crc32c = crc32c(content)
    payload = content.tobytes()
    size = 1 << 20
    parts = [
        block_pb.FetchBlocksResponse(data=payload[at : at + size])
        for at in range(0, len(payload), size)
    ]
    return header, parts


def _send_within_windows(client: Client, body: bytes) -> None:
    """Send an answer, and no byte more than the client has asked for."""
    client.server.sendall(SETTINGS + head())
    sent, at, room = b"", 0, 70_000
    while at < len(body):
        while at == room:
            sent += client.server.recv(1 << 16)
            updates = [f for f in frames_in(sent) if f[0] == Frame.WINDOW_UPDATE]
            grown = {
                stream: sum(struct.unpack(">I", f[3])[0] for f in updates if f[2] == stream)
                for stream in (0, 1)
            }
            room = min(65_535 + grown[0], 70_000 + grown[1])
        part = body[at : min(at + 10_000, room)]
        client.server.sendall(data(part))
        at += len(part)
    client.server.sendall(trailers())


class TestErrors:
    def test_of_the_service(self) -> None:
        error = NotFoundError("not here", reason=Reason.UNKNOWN_CLUSTER, metadata={"block": "1:9"})
        with pytest.raises(NotFoundError) as caught:
            fetched_from(SETTINGS + refusal(error))
        assert caught.value.reason is Reason.UNKNOWN_CLUSTER
        assert caught.value.metadata == {"block": "1:9"}
        assert caught.value.message == "not here"

    def test_of_the_service_in_the_midst_of_a_message(self) -> None:
        bodies = message(answer_messages(BANK)[0])
        cut = data(bodies[:-10]) + refusal(UnavailableError("away", reason=Reason.FENCED))
        with pytest.raises(UnavailableError) as caught:
            fetched_from(SETTINGS + head() + cut)
        assert caught.value.reason is Reason.FENCED

    @pytest.mark.parametrize(
        ("status", "leaf"),
        [
            ("400", InternalError),
            ("403", AccessDeniedError),
            ("404", FailedPreconditionError),
            ("503", UnavailableError),
            ("418", InternalError),
        ],
    )
    def test_of_a_proxy(self, status: str, leaf: type[MembankError]) -> None:
        page = headers_frame([(":status", status), ("content-type", "text/html")])
        with pytest.raises(leaf):
            fetched_from(SETTINGS + page + data(b"<html>") + trailers(("x", "y")))

    def test_no_status(self) -> None:
        script = whole_answer(BANK).replace(trailers(), trailers(("x", "y")))
        with pytest.raises(InternalError):
            fetched_from(script)

    @pytest.mark.parametrize(
        ("code", "leaf"),
        [
            (ErrorCode.REFUSED_STREAM, UnavailableError),
            (ErrorCode.CANCEL, UnavailableError),
            (ErrorCode.ENHANCE_YOUR_CALM, ResourceExhaustedError),
            (ErrorCode.INADEQUATE_SECURITY, AccessDeniedError),
            (2, InternalError),
            (999, InternalError),
        ],
    )
    def test_a_stream_that_is_reset(self, code: int, leaf: type[MembankError]) -> None:
        reset = frame(Frame.RST_STREAM, 0, 1, struct.pack(">I", code))
        with pytest.raises(leaf):
            fetched_from(SETTINGS + head() + reset)

    def test_a_reset_after_the_answer_is_none(self) -> None:
        reset = frame(Frame.RST_STREAM, 0, 1, struct.pack(">I", ErrorCode.NO_ERROR))
        check(fetched_from(whole_answer(BANK) + reset))

    def test_a_server_that_dies(self) -> None:
        script = whole_answer(BANK)
        for length in (len(SETTINGS), len(SETTINGS) + 3, len(script) // 2, len(script) - 1):
            with pytest.raises(UnavailableError) as caught:
                fetched_from(script[:length])
            assert caught.value.reason is Reason.CONNECT_FAILED

    def test_damage(self) -> None:
        script = bytearray(whole_answer(BANK))
        script[len(script) // 2] ^= 1
        with pytest.raises(CorruptionError, match="CRC-32C"):
            fetched_from(bytes(script))

    def test_more_data_than_announced(self, client: Client) -> None:
        surplus = data(message(block_pb.FetchBlocksResponse(data=b"more")))
        client.server.sendall(whole_answer(BANK).removesuffix(trailers()) + surplus)
        with pytest.raises(CorruptionError, match="malformed"):
            client.fetch()
        assert client.connection is not None
        assert not client.connection.is_usable()
        assert sent_by(client)[-1][0] == Frame.RST_STREAM

    def test_less_data_than_announced(self) -> None:
        some = b"".join(map(data, map(message, answer_messages(BANK)[:-1])))
        with pytest.raises(CorruptionError, match="ended after"):
            fetched_from(SETTINGS + head() + some + trailers())

    def test_a_message_that_is_too_large(self) -> None:
        large = data(struct.pack(">BI", 0, MAX_MESSAGE_BYTES + 1))
        with pytest.raises(ResourceExhaustedError) as caught:
            fetched_from(SETTINGS + head() + large)
        assert caught.value.reason is Reason.MESSAGE_TOO_LARGE


class TestGoingAway:
    def test_with_the_answer_still_to_come(self, client: Client) -> None:
        going = frame(Frame.GOAWAY, 0, 0, struct.pack(">II", 1, 0) + b"bye")
        client.server.sendall(whole_answer(BANK).replace(head(), head() + going))
        check(client.fetch())
        assert client.connection is not None
        assert not client.connection.is_usable()

    def test_before_it_has_seen_the_request(self) -> None:
        going = frame(Frame.GOAWAY, 0, 0, struct.pack(">II", 0, 0))
        with pytest.raises(UnavailableError) as caught:
            fetched_from(SETTINGS + going)
        assert caught.value.reason is Reason.CONNECT_FAILED

    def test_between_requests(self, client: Client) -> None:
        client.server.sendall(whole_answer(BANK))
        client.fetch()
        assert client.connection is not None
        client.server.sendall(NOISE[0])
        assert client.connection.is_usable()
        assert sent_by(client)[-1] == (Frame.PING, Flag.ACK, 0, b"12345678")
        client.server.sendall(frame(Frame.GOAWAY, 0, 0, bytes(8)))
        assert not client.connection.is_usable()

    @pytest.mark.parametrize("surplus", [trailers(), data(b"more")])
    def test_more_than_the_answer(self, client: Client, surplus: bytes) -> None:
        client.server.sendall(whole_answer(BANK) + surplus)
        check(client.fetch())
        assert client.connection is not None
        assert not client.connection.is_usable()

    def test_a_connection_that_ended_between_requests(self, client: Client) -> None:
        client.server.sendall(whole_answer(BANK))
        client.fetch()
        client.server.close()
        assert client.connection is not None
        assert not client.connection.is_usable()


class TestSilence:
    def test_ends_with_the_deadline(self, client: Client) -> None:
        client.server.sendall(SETTINGS + head())
        with pytest.raises(DeadlineError):
            client.fetch(timeout_s=0.05)
        assert sent_by(client)[-1][0] == Frame.RST_STREAM

    @pytest.mark.parametrize(
        ("most", "expected"), [(1 << 60, DeadlineError), (1_000, ProtocolError)]
    )
    def test_a_stream_that_never_pauses_ends(
        self,
        client: Client,
        monkeypatch: pytest.MonkeyPatch,
        most: int,
        expected: type[Exception],
    ) -> None:
        # By the deadline, if it were not for the bound on frames that say nothing.
        monkeypatch.setattr(http2_end, "_MAX_IDLE_FRAMES", most)
        client.server.sendall(SETTINGS + head())
        stop = threading.Event()

        def babble() -> None:
            with suppress(OSError):
                while not stop.is_set():
                    client.server.sendall(UNKNOWN_FRAME * 100)

        thread = threading.Thread(target=babble)
        thread.start()
        with pytest.raises(expected):
            client.fetch(timeout_s=0.05 if expected is DeadlineError else 10.0)
        stop.set()
        client.end.shut_down()
        thread.join()

    def test_is_probed(self) -> None:
        client = Client(keepalive_s=0.02)
        client.server.sendall(SETTINGS + head())
        with pytest.raises(UnavailableError, match="silent"):
            client.fetch()
        assert any(each[0] == Frame.PING for each in sent_by(client))
        client.close()


@pytest.mark.parametrize(
    "script",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        frame(Frame.PING, 0, 0, b"12345678"),
        frame(Frame.SETTINGS, 0, 1),
        frame(Frame.SETTINGS, 0, 0, b"12345"),
        frame(Frame.SETTINGS, 0, 0, struct.pack(">HI", Setting.INITIAL_WINDOW_SIZE, 1 << 31)),
        frame(Frame.SETTINGS, 0, 0, struct.pack(">HI", Setting.MAX_FRAME_SIZE, 100)),
        SETTINGS + data(b"before headers"),
        SETTINGS + head(stream=3),
        SETTINGS + head() + data(b"elsewhere", stream=3),
        SETTINGS + head() + frame(Frame.DATA, Flag.PADDED, 1, b"\7short"),
        SETTINGS + head() + frame(Frame.DATA, Flag.PADDED, 1),
        SETTINGS + head() + head(),
        SETTINGS + frame(Frame.HEADERS, 0, 1, head()[9:]) + frame(Frame.PING, 0, 0, bytes(8)),
        SETTINGS + frame(Frame.HEADERS, 0, 1, b"") + frame(Frame.CONTINUATION, 0, 3, b""),
        SETTINGS + frame(Frame.HEADERS, Flag.PADDED | Flag.END_HEADERS, 1, b"\7"),
        SETTINGS + frame(Frame.HEADERS, Flag.END_HEADERS, 1, b"\xff\xff\xff"),
        SETTINGS + frame(Frame.HEADERS, Flag.END_HEADERS, 1, bytes(20_000)),
        SETTINGS + frame(Frame.HEADERS, 0, 1) + 5 * frame(Frame.CONTINUATION, 0, 1, bytes(16_000)),
        SETTINGS + frame(Frame.PUSH_PROMISE, Flag.END_HEADERS, 1, bytes(8)),
        SETTINGS + frame(Frame.CONTINUATION, 0, 1),
        SETTINGS + frame(Frame.PING, 0, 0, b"short"),
        SETTINGS + frame(Frame.GOAWAY, 0, 0, b"short"),
        SETTINGS + frame(Frame.RST_STREAM, 0, 1, b"more than four"),
        SETTINGS + frame(Frame.WINDOW_UPDATE, 0, 0, bytes(4)),
        SETTINGS + frame(Frame.WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"),
        SETTINGS + head() + data(message(b"", compressed=1)),
        SETTINGS + head() + data(message(b"\xff no message")),
        SETTINGS + head() + data(message(b"cut off")[:-1]) + trailers(),
    ],
)
def test_what_is_no_http2_or_no_grpc(script: bytes) -> None:
    with pytest.raises(ProtocolError):
        fetched_from(script)


def test_statuses_have_the_leaves_that_grpcio_would_give_them() -> None:
    for code in grpc.StatusCode:
        if code is grpc.StatusCode.OK:
            continue
        refused = trailers((":status", "200"), ("grpc-status", str(code.value[0])))
        with pytest.raises(MembankError) as caught:
            fetched_from(SETTINGS + refused)
        assert caught.value.code is code or isinstance(
            caught.value, InternalError | UnavailableError | FailedPreconditionError
        )
