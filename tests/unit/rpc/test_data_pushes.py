"""Pushes to the port for data, by clients whose every byte is written down here, and by grpcio."""

from __future__ import annotations

import gc
import shutil
import struct
import subprocess
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import grpc
import pytest

from http2_callers import RawCaller, error_in, framed_message, head
from membank.v1 import block_service_pb2 as block_pb
from membank.v1.block_service_pb2_grpc import BlockServiceStub
from membank.wire.errors import (
    AccessDeniedError,
    CorruptionError,
    InternalError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.http2.frames import SETTING, WORD, ErrorCode, Flag, Frame, Setting, frame
from membank.wire.spec import BlockRef
from push_rigs import PUSH_PATH, PushRig, push_body, push_messages

LARGE_BYTES = 12 << 20


@pytest.fixture
def rig() -> Iterator[PushRig]:
    with PushRig() as rig:
        yield rig


@pytest.fixture
def caller(rig: PushRig) -> Iterator[RawCaller]:
    with RawCaller(rig.port) as caller:
        yield caller


def frames(body: bytes, *, stream: int = 1, frame_bytes: int = 16_384) -> bytes:
    """Return a body in frames, the last of which ends the stream."""
    cuts = [*range(0, len(body), frame_bytes), len(body)]
    return b"".join(
        frame(Frame.DATA, Flag.END_STREAM if end == len(body) else 0, stream, body[start:end])
        for start, end in pairwise(cuts)
    )


def begin(
    stream: int = 1, *, authorization: str | None = None, timeout: str | None = None
) -> bytes:
    return head(stream, path=PUSH_PATH, authorization=authorization, grpc_timeout=timeout)


def answer_to(caller: RawCaller) -> block_pb.PushUpdatesResponse:
    headers, body, trailers = caller.answer()
    assert (headers[":status"], headers["content-type"]) == ("200", "application/grpc")
    assert trailers == {"grpc-status": "0"}
    assert struct.unpack_from(">BI", body) == (0, len(body) - 5)
    return block_pb.PushUpdatesResponse.FromString(body[5:])


def refusal_of(caller: RawCaller) -> MembankError:
    return error_in(caller.answer()[2])


def check_push(rig: PushRig, caller: RawCaller, stream: int) -> None:
    """Check that a push on another stream arrives."""
    update = rig.update(f"check-{stream}", seed=stream)
    caller.say(begin(stream), frames(push_body(update), stream=stream))
    answer = answer_to(caller)
    assert [result.accepted for result in answer.results] == [True]
    assert rig.shard.updates[-1].request_id == update.request_id
    assert rig.shard.gradient() == update.gradients[0].values.tobytes()
    assert rig.budget.used_bytes == 0


class TestLanding:
    @pytest.mark.parametrize("frame_bytes", [1, 7, 1_000, 16_384])
    @pytest.mark.parametrize("chunk_bytes", [500, 1_000, 9_600])
    def test_messages_and_frames_of_any_size(
        self, rig: PushRig, caller: RawCaller, chunk_bytes: int, frame_bytes: int
    ) -> None:
        update = rig.update()
        body = push_body(update, chunk_bytes=chunk_bytes)
        caller.say(begin(), frames(body, frame_bytes=frame_bytes))
        answer_to(caller)
        (applied,) = rig.shard.updates
        assert (applied.request_id, applied.step, applied.learning_rate_scale) == ("p1", 4, 1.0)
        assert applied.gradients[0].values.shape == rig.shard.spec.block_shape(1)
        assert rig.shard.gradient() == update.gradients[0].values.tobytes()

    def test_data_in_the_first_message_and_messages_of_nothing(
        self, rig: PushRig, caller: RawCaller
    ) -> None:
        update = rig.update()
        first, *rest = push_messages(update)
        first.data = rest.pop(0).data
        messages = [first, block_pb.PushUpdatesRequest(), *rest, block_pb.PushUpdatesRequest()]
        body = b"".join(framed_message(each.SerializeToString()) for each in messages)
        caller.say(begin(), frames(body))
        answer_to(caller)
        assert rig.shard.gradient() == update.gradients[0].values.tobytes()

    def test_a_request_id_is_applied_once(self, rig: PushRig, caller: RawCaller) -> None:
        for stream, is_known in ((1, False), (3, True)):
            caller.say(begin(stream), frames(push_body(rig.update()), stream=stream))
            assert answer_to(caller).duplicate == is_known
        assert len(rig.shard.updates) == 1

    def test_a_large_one_waits_for_no_window(self) -> None:
        with PushRig(LARGE_BYTES) as rig, RawCaller(rig.port) as caller:
            (name, window), *_ = [
                pair
                for pair in SETTING.iter_unpack(caller.next_of(Frame.SETTINGS).payload)
                if pair[0] == Setting.INITIAL_WINDOW_SIZE
            ]
            assert name == Setting.INITIAL_WINDOW_SIZE
            assert window > LARGE_BYTES + 65_536
            update = rig.update()
            body = push_body(update, chunk_bytes=1 << 20)
            caller.say(begin(), frames(body, frame_bytes=4 << 20))
            answer_to(caller)
            assert rig.shard.gradient() == update.gradients[0].values.tobytes()

    def test_bytes_are_reserved_while_they_come(self, rig: PushRig, caller: RawCaller) -> None:
        body = push_body(rig.update())
        rig.shard.may_answer.clear()
        caller.say(begin(), frames(body))
        assert rig.shard.is_asked.wait(10.0)
        assert rig.budget.used_bytes == 9_600
        rig.shard.may_answer.set()
        answer_to(caller)
        assert rig.budget.used_bytes == 0


class TestRefusing:
    @pytest.mark.parametrize(
        ("changed", "kind"),
        [
            ({"bank": "another"}, NotFoundError),
            ({"request_id": ""}, InvalidArgumentError),
            ({"learning_rate_scale": -1.0}, InvalidArgumentError),
        ],
    )
    def test_what_the_headers_say(
        self,
        rig: PushRig,
        caller: RawCaller,
        changed: dict[str, object],
        kind: type[MembankError],
    ) -> None:
        caller.say(begin(), frames(push_body(rig.update(), changed=changed)))
        assert isinstance(refusal_of(caller), kind)
        assert not rig.shard.is_asked.is_set()
        check_push(rig, caller, 3)

    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b"", "the push is empty"),
            (framed_message(block_pb.PushUpdatesRequest(data=b"x").SerializeToString()), "begins"),
            (framed_message(b"\xff\xff\xff"), "cannot be read"),
        ],
    )
    def test_what_does_not_begin_with_headers(
        self, rig: PushRig, caller: RawCaller, body: bytes, said: str
    ) -> None:
        caller.say(begin(), frame(Frame.DATA, Flag.END_STREAM, 1, body))
        error = refusal_of(caller)
        assert isinstance(error, InvalidArgumentError)
        assert said in error.message
        check_push(rig, caller, 3)

    def test_bytes_that_were_damaged(self, rig: PushRig, caller: RawCaller) -> None:
        body = bytearray(push_body(rig.update()))
        body[-1] ^= 1
        caller.say(begin(), frames(bytes(body)))
        error = refusal_of(caller)
        assert isinstance(error, CorruptionError)
        assert error.reason is Reason.CHECKSUM_MISMATCH
        assert not rig.shard.is_asked.is_set()
        check_push(rig, caller, 3)

    @pytest.mark.parametrize("more", [-1, 1])
    def test_more_or_less_than_was_announced(
        self, rig: PushRig, caller: RawCaller, more: int
    ) -> None:
        messages = push_messages(rig.update())
        last = messages.pop()
        extra = [last, last] if more > 0 else []
        body = b"".join(framed_message(m.SerializeToString()) for m in [*messages, *extra])
        caller.say(begin(), frames(body))
        assert isinstance(refusal_of(caller), InvalidArgumentError)
        assert not rig.shard.is_asked.is_set()
        check_push(rig, caller, 3)

    @pytest.mark.parametrize(
        ("message", "code"),
        [(b"\1\0\0\0\0", "INTERNAL"), (struct.pack(">BI", 0, 9 << 20), "RESOURCE_EXHAUSTED")],
    )
    @pytest.mark.parametrize("is_first", [True, False])
    def test_messages_that_are_not_taken(
        self, rig: PushRig, caller: RawCaller, message: bytes, code: str, is_first: bool
    ) -> None:
        sent = [] if is_first else push_messages(rig.update())[:-1]
        before = b"".join(framed_message(each.SerializeToString()) for each in sent)
        caller.say(begin(), frames(before + message + bytes(50)))
        assert caller.answer()[2]["grpc-status"] == str(grpc.StatusCode[code].value[0])
        check_push(rig, caller, 3)

    def test_comes_before_all_is_sent(self, rig: PushRig, caller: RawCaller) -> None:
        body = push_body(rig.update(ref=BlockRef(1, 99)))
        first, rest = body[:3_000], body[3_000:]
        # In the midst of a frame.
        caller.say(begin(), frame(Frame.DATA, 0, 1, body)[: 9 + len(first)])
        assert isinstance(refusal_of(caller), NotFoundError)
        assert caller.next_of(Frame.RST_STREAM).payload == WORD.pack(ErrorCode.NO_ERROR)
        caller.say(rest)
        check_push(rig, caller, 3)

    def test_what_does_not_fit_into_the_budget(self) -> None:
        with PushRig(budget_bytes=15_000) as rig, RawCaller(rig.port) as caller:
            with rig.budget.reserve(10_000, what="test"):
                caller.say(begin(), frames(push_body(rig.update())))
                error = refusal_of(caller)
            assert isinstance(error, ResourceExhaustedError)
            assert "retry_after_ms" in error.metadata
            check_push(rig, caller, 3)
        with PushRig(budget_bytes=5_000) as rig, RawCaller(rig.port) as caller:
            caller.say(begin(), frames(push_body(rig.update())))
            error = refusal_of(caller)
            assert isinstance(error, InvalidArgumentError)
            assert error.reason is Reason.MESSAGE_TOO_LARGE

    @pytest.mark.parametrize("error", [UnavailableError("away"), OSError("disk"), TimeoutError()])
    def test_errors_of_the_shard(self, rig: PushRig, caller: RawCaller, error: Exception) -> None:
        rig.shard.error = error
        caller.say(begin(), frames(push_body(rig.update())))
        kind = UnavailableError if isinstance(error, UnavailableError) else InternalError
        assert isinstance(refusal_of(caller), kind)
        rig.shard.error = None
        check_push(rig, caller, 3)

    def test_memory_of_what_was_refused_is_used_again(self) -> None:
        with PushRig(12 << 17) as rig, RawCaller(rig.port) as caller:
            body = bytearray(push_body(rig.update(), chunk_bytes=1 << 20))
            body[-1] ^= 1
            gc.disable()
            try:
                for stream in (1, 3, 5):
                    caller.say(begin(stream), frames(bytes(body), stream=stream))
                    refusal_of(caller)
                    caller.say(frame(Frame.PING, 0, 0, b"12345678"))
                    caller.next_of(Frame.PING)
                    assert rig.gradients.idle_bytes == 12 << 17
            finally:
                gc.enable()

    def test_a_role_that_may_not(self, tmp_path: Path) -> None:
        tokens = tmp_path / "tokens"
        tokens.write_text("sesame rita reader\nopen tom trainer\n")
        with PushRig(token_file=tokens) as rig, RawCaller(rig.port) as caller:
            body = push_body(rig.update())
            caller.say(begin(authorization="Bearer sesame"), frames(body))
            assert isinstance(refusal_of(caller), AccessDeniedError)
            assert not rig.shard.is_asked.is_set()
            caller.say(begin(3, authorization="Bearer open"), frames(body, stream=3))
            answer_to(caller)


class TestSenders:
    def test_who_stalls_is_hung_up_on(self) -> None:
        with PushRig(stall_s=0.3) as rig, RawCaller(rig.port) as caller:
            caller.say(begin(), frame(Frame.DATA, 0, 1, push_body(rig.update())[:4_000]))
            assert caller.is_hung_up_on()
            rig.wait_until_idle()
            assert not rig.shard.is_asked.is_set()

    def test_whose_deadline_passes_is_hung_up_on(self, rig: PushRig, caller: RawCaller) -> None:
        body = push_body(rig.update())
        caller.say(begin(timeout="300m"), frame(Frame.DATA, 0, 1, body[:4_000]))
        assert caller.is_hung_up_on()
        rig.wait_until_idle()
        assert not rig.shard.is_asked.is_set()

    def test_who_leaves_has_pushed_nothing(self, rig: PushRig) -> None:
        with RawCaller(rig.port) as caller:
            caller.say(begin(), frame(Frame.DATA, 0, 1, push_body(rig.update())[:4_000]))
            caller.wait_until_heard()
        rig.wait_until_idle()
        assert not rig.shard.is_asked.is_set()

    def test_who_gives_up_has_pushed_nothing(self, rig: PushRig, caller: RawCaller) -> None:
        caller.say(
            begin(),
            frame(Frame.DATA, 0, 1, push_body(rig.update())[:4_000]),
            frame(Frame.RST_STREAM, 0, 1, WORD.pack(ErrorCode.CANCEL)),
        )
        check_push(rig, caller, 3)
        assert len(rig.shard.updates) == 1

    def test_who_gives_up_once_all_is_sent_has_pushed_nothing(
        self, rig: PushRig, caller: RawCaller
    ) -> None:
        given_up = frame(Frame.RST_STREAM, 0, 1, WORD.pack(ErrorCode.CANCEL))
        # One piece on the way, so that the one is there with the other.
        caller.say(begin(), frames(push_body(rig.update())), given_up)
        check_push(rig, caller, 3)
        assert len(rig.shard.updates) == 1

    def test_who_sends_slowly_is_waited_for(self) -> None:
        with PushRig(stall_s=1.0) as rig, RawCaller(rig.port) as caller:
            update = rig.update()
            caller.say(begin())
            for each in push_messages(update, chunk_bytes=2_000):
                threading.Event().wait(0.25)
                encoded = framed_message(each.SerializeToString())
                caller.say(frame(Frame.DATA, 0, 1, encoded))
            caller.say(frame(Frame.DATA, Flag.END_STREAM, 1))
            answer_to(caller)
            assert rig.shard.gradient() == update.gradients[0].values.tobytes()

    def test_who_ends_within_a_message_is_hung_up_on(self, rig: PushRig, caller: RawCaller) -> None:
        caller.say(begin(), frames(push_body(rig.update())[:-1]))
        assert caller.next_of(Frame.GOAWAY).payload[4:] == WORD.pack(ErrorCode.PROTOCOL_ERROR)
        assert caller.is_hung_up_on()
        assert not rig.shard.is_asked.is_set()


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

    @pytest.mark.parametrize("num_bytes", [96, 9_600, LARGE_BYTES])
    def test_pushes(self, num_bytes: int) -> None:
        with (
            PushRig(num_bytes) as rig,
            grpc.insecure_channel(f"localhost:{rig.port}") as channel,
        ):
            for number in range(3):
                update = rig.update(f"p{number}", seed=number)
                answer = _pushed(channel, push_messages(update, chunk_bytes=1 << 20))
                assert [result.version for result in answer.results] == [1]
                assert rig.shard.gradient() == update.gradients[0].values.tobytes()

    def test_over_tls(self, tls: tuple[Path, Path]) -> None:
        credentials = grpc.ssl_channel_credentials(tls[0].read_bytes())
        with (
            PushRig(LARGE_BYTES, tls=tls) as rig,
            grpc.secure_channel(f"localhost:{rig.port}", credentials) as channel,
        ):
            update = rig.update()
            _pushed(channel, push_messages(update, chunk_bytes=1 << 20))
            assert rig.shard.gradient() == update.gradients[0].values.tobytes()

    def test_is_told_of_errors(self, rig: PushRig) -> None:
        with grpc.insecure_channel(f"localhost:{rig.port}") as channel:
            for _ in range(2):
                with pytest.raises(grpc.RpcError, match="99"):
                    _pushed(channel, push_messages(rig.update(ref=BlockRef(1, 99))))
            _pushed(channel, push_messages(rig.update()))
        assert len(rig.shard.updates) == 1


def _pushed(
    channel: grpc.Channel, messages: list[block_pb.PushUpdatesRequest]
) -> block_pb.PushUpdatesResponse:
    call = BlockServiceStub(channel).PushUpdates
    return call(iter(messages), timeout=10, wait_for_ready=True)
