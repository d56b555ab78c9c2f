"""The data path over a real gRPC server on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import cast

import grpc
import numpy as np
import pytest

from membank.bank_service.shard import ShardApi
from membank.bank_service.shard.contract import FetchResult
from membank.v1 import block_service_pb2 as pb
from membank.v1 import types_pb2 as types_pb
from membank.wire import convert
from membank.wire.codec import Sparse, push_codec
from membank.wire.crc import crc32c
from membank.wire.errors import MembankError, Reason
from membank.wire.format import decode_tree
from membank.wire.framing import CHUNK_BYTES
from membank.wire.records import Block, BlockHeader
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState
from membank.wire.steps import Withhold
from rpc_rig import RpcRig, error_of
from shard_rig import RIG_SPEC, asked

TOPIC, LEAF = BlockRef(1, 1), BlockRef(2, 2)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[RpcRig]:
    with RpcRig(tmp_path / "bank") as rig:
        yield rig


def to_pb(ref: BlockRef) -> types_pb.BlockRef:
    return types_pb.BlockRef(level=ref.level, cluster=ref.cluster)


def fetch(
    rig: RpcRig, refs: Sequence[BlockRef], **fields: object
) -> tuple[list[types_pb.BlockHeader], bytes, int]:
    request = pb.FetchBlocksRequest(refs=[to_pb(ref) for ref in refs], **fields)  # type: ignore[arg-type]
    headers: list[types_pb.BlockHeader] = []
    data, revisions = b"", []
    for message in rig.blocks.FetchBlocks(request):
        headers.extend(message.headers)
        data += message.data
        revisions.append(message.revision)
    return headers, data, revisions[0]


def push_messages(
    gradients: dict[BlockRef, Array], *, request_id: str = "p1", chunk_bytes: int = 64
) -> Iterator[pb.PushUpdatesRequest]:
    yield pb.PushUpdatesRequest(
        request_id=request_id,
        headers=[
            pb.UpdateHeader(
                ref=to_pb(ref),
                base_version=0,
                dtype=types_pb.DATA_TYPE_FLOAT32,
                num_bytes=array.nbytes,
                crc32c=crc32c(array),
            )
            for ref, array in gradients.items()
        ],
    )
    data = b"".join(array.tobytes() for array in gradients.values())
    for start in range(0, len(data), chunk_bytes):
        yield pb.PushUpdatesRequest(data=data[start : start + chunk_bytes])


def encoded_push(
    payloads: dict[BlockRef, Array], name: str, *, request_id: str = "p1"
) -> Iterator[pb.PushUpdatesRequest]:
    first, *rest = push_messages(payloads, request_id=request_id)
    for header in first.headers:
        header.dtype = convert.dtype_to_pb(name)
    return iter([first, *rest])


def ones(ref: BlockRef) -> Array:
    return np.ones(RIG_SPEC.block_shape(ref.level), np.float32)


def failure(rig: RpcRig, messages: Iterable[pb.PushUpdatesRequest]) -> MembankError:
    with pytest.raises(grpc.RpcError) as caught:
        rig.blocks.PushUpdates(iter(messages))
    return error_of(caught.value)


# Messages that the transport takes before it holds the server back: its own buffers, and a window.
_AHEAD = 8


class LargeBlocks:
    """Answers every fetch by blocks of 1 MiB, and knows how many were taken to be sent."""

    def __init__(self, num_blocks: int) -> None:
        self.taken: set[int] = set()
        self._blocks = tuple(LargeBlock(number, self.taken) for number in range(num_blocks))

    @property
    def num_taken(self) -> int:
        return len(self.taken)

    @property
    def api(self) -> ShardApi:
        return cast("ShardApi", self)

    @property
    def spec(self) -> BankSpec:
        return RIG_SPEC

    @property
    def revision(self) -> int:
        return 1

    def fetch(self, *_: object, **__: object) -> FetchResult:
        return FetchResult(revision=1, blocks=cast("tuple[Block, ...]", self._blocks))


class LargeBlock:
    """A block that notes when its weight is taken."""

    def __init__(self, number: int, taken: set[int]) -> None:
        self._number = number
        self._taken = taken
        self._weight = np.full(CHUNK_BYTES, number, np.uint8)
        self.header = BlockHeader(
            ref=TOPIC, version=1, num_bytes=CHUNK_BYTES, crc32c=crc32c(self._weight)
        )

    @property
    def weight(self) -> Array:
        self._taken.add(self._number)
        return self._weight


def wait_until_idle(rig: RpcRig) -> None:
    """Wait until no call holds bytes any more."""
    ends = time.monotonic() + 10
    while rig.budget.used_bytes:
        assert time.monotonic() < ends, "the bytes of a call that has ended are still taken"
        rig.blocks.GetBank(pb.GetBankRequest())


def test_fetch_sends_headers_and_bytes_of_every_block(rig: RpcRig) -> None:
    refs = [LEAF, TOPIC]
    headers, data, revision = fetch(rig, refs)
    assert revision == 0
    assert [(h.ref.level, h.ref.cluster) for h in headers] == [tuple(ref) for ref in refs]
    expected = b"".join(
        block.weight.tobytes() for block in rig.shard.fetch(refs).blocks if block.weight is not None
    )
    assert data == expected
    first = headers[0]
    assert crc32c(data[: first.num_bytes]) == first.crc32c
    assert tuple(first.shape) == RIG_SPEC.block_shape(2)


def test_a_small_fetch_is_one_message(rig: RpcRig) -> None:
    request = pb.FetchBlocksRequest(refs=[to_pb(TOPIC), to_pb(LEAF)])
    assert len(list(rig.blocks.FetchBlocks(request))) == 1


def test_a_held_version_costs_a_header(rig: RpcRig) -> None:
    headers, data, _ = fetch(rig, [TOPIC, LEAF], held_version_plus_one=[1, 0])
    assert headers[0].unchanged
    assert headers[0].num_bytes == 0
    assert not headers[1].unchanged
    assert len(data) == headers[1].num_bytes


def test_fetch_converts_to_the_dtype_asked_for(rig: RpcRig) -> None:
    headers, data, _ = fetch(rig, [TOPIC], dtype=types_pb.DATA_TYPE_BFLOAT16)
    assert headers[0].dtype == types_pb.DATA_TYPE_BFLOAT16
    assert len(data) == RIG_SPEC.block_params(1) * 2


def test_a_snapshot_is_read_at_its_revision(rig: RpcRig) -> None:
    rig.bank.push(TOPIC, "p1")
    then = fetch(rig, [TOPIC, LEAF])
    rig.bank.operations.create_snapshot(asked("s"), "then")
    rig.bank.push(TOPIC, "p2")
    headers, data, revision = fetch(rig, [TOPIC, LEAF], snapshot="then")
    assert (headers, data) == then[:2]
    assert revision == 1
    held, none, _ = fetch(rig, [TOPIC], snapshot="then", held_version_plus_one=[2])
    assert held[0].unchanged
    assert none == b""
    held, sent, _ = fetch(rig, [TOPIC], snapshot="then", held_version_plus_one=[3])
    assert not held[0].unchanged
    assert sent == data[: held[0].num_bytes]


def test_a_withheld_block_has_a_header_and_no_bytes(rig: RpcRig) -> None:
    rig.bank.operations.apply(asked("r1"), [Withhold(topic=TOPIC)])
    headers, data, revision = fetch(rig, [TOPIC])
    assert convert.state_from_pb(headers[0].state) is BlockState.WITHHELD
    assert (data, revision) == (b"", 1)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"refs": [types_pb.BlockRef(level=1, cluster=99)]}, Reason.UNKNOWN_CLUSTER),
        ({"refs": [types_pb.BlockRef(level=9, cluster=0)]}, Reason.UNKNOWN_LEVEL),
        ({"bank": "other"}, Reason.UNKNOWN_BANK),
        ({"refs": [to_pb(TOPIC)], "held_version_plus_one": [1, 2]}, Reason.BAD_ARGUMENT),
        ({"refs": [to_pb(TOPIC)], "min_revision": 7}, Reason.BEHIND_REVISION),
        ({"refs": [to_pb(TOPIC)] * 65_537}, Reason.MESSAGE_TOO_LARGE),
        ({"refs": [to_pb(TOPIC)], "dtype": 77}, Reason.BAD_DTYPE),
        ({"refs": [to_pb(TOPIC)], "snapshot": "none"}, Reason.UNKNOWN_SNAPSHOT),
        ({"refs": [to_pb(TOPIC)], "snapshot": "../bank"}, Reason.UNKNOWN_SNAPSHOT),
        ({"refs": [to_pb(TOPIC)], "snapshot": "a/b"}, Reason.UNKNOWN_SNAPSHOT),
        ({"refs": [to_pb(TOPIC)], "snapshot": "x" * 5_000}, Reason.UNKNOWN_SNAPSHOT),
    ],
)
def test_a_wrong_fetch_is_a_typed_error(
    rig: RpcRig, fields: dict[str, object], reason: Reason
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        list(rig.blocks.FetchBlocks(pb.FetchBlocksRequest(**fields)))  # type: ignore[arg-type]
    assert error_of(caught.value).reason is reason


def test_push_applies_gradients_that_come_in_pieces(rig: RpcRig) -> None:
    before = rig.bank.status(TOPIC).crc32c
    answer = rig.blocks.PushUpdates(push_messages({TOPIC: ones(TOPIC), LEAF: ones(LEAF)}))
    assert [(r.accepted, r.version) for r in answer.results] == [(True, 1), (True, 1)]
    assert rig.bank.status(TOPIC).crc32c != before


@pytest.mark.parametrize(("name", "share"), [("int8", 1.0), ("sparse", 1.0), ("sparse", 0.1)])
def test_an_encoded_push_does_what_the_decoded_one_does(
    rig: RpcRig, tmp_path: Path, name: str, share: float
) -> None:
    codec = Sparse(share) if name == "sparse" else push_codec(name)
    values = np.random.default_rng(0).standard_normal(RIG_SPEC.block_shape(1), np.float32)
    payload = codec.encode(values)
    rig.blocks.PushUpdates(encoded_push({TOPIC: payload}, name))
    with RpcRig(tmp_path / "twin") as twin:
        decoded = codec.decode(payload, values.shape)
        twin.blocks.PushUpdates(push_messages({TOPIC: decoded}))
        assert rig.bank.status(TOPIC) == twin.bank.status(TOPIC)
    assert rig.budget.used_bytes == 0


def test_an_encoded_gradient_is_replayed(rig: RpcRig) -> None:
    values = np.random.default_rng(0).standard_normal(RIG_SPEC.block_shape(1), np.float32)
    rig.blocks.PushUpdates(encoded_push({TOPIC: push_codec("int8").encode(values)}, "int8"))
    before = rig.bank.status(TOPIC)
    rig.bank.kill_shards()
    rig.bank.open_shards()
    assert rig.bank.status(TOPIC) == before


def test_a_gradient_of_nothing_is_one(rig: RpcRig) -> None:
    nothing = np.empty(0, np.uint8)
    answer = rig.blocks.PushUpdates(encoded_push({TOPIC: nothing, LEAF: nothing}, "sparse"))
    assert [result.accepted for result in answer.results] == [True, True]


def test_wrong_encoded_pushes_change_nothing(rig: RpcRig) -> None:
    size = RIG_SPEC.block_params(1)
    int8 = push_codec("int8").encode(np.ones(size, np.float32))
    outside = Sparse().encode(np.ones(size + 1, np.float32))[-16:].copy()
    outside.view(np.uint32)[:2] = (0, size)
    cases: list[tuple[Array, str, Reason]] = [
        (int8[:-1], "int8", Reason.BAD_SHAPE),
        (int8[:-4], "sparse", Reason.BAD_SHAPE),
        (Sparse().encode(np.ones(size + 1, np.float32)), "sparse", Reason.BAD_SHAPE),
        (outside, "sparse", Reason.BAD_SHAPE),
    ]
    for payload, name, reason in cases:
        assert failure(rig, encoded_push({TOPIC: payload}, name)).reason is reason
    # A service that does not know an encoding says so; this one knows none of this number.
    messages = list(encoded_push({TOPIC: int8}, "int8"))
    messages[0].headers[0].dtype = types_pb.DataType.ValueType(99)
    assert failure(rig, messages).reason is Reason.BAD_DTYPE
    assert rig.bank.status(TOPIC).version == 0
    assert rig.budget.used_bytes == 0


def test_what_a_small_payload_stands_for_counts(tmp_path: Path) -> None:
    with RpcRig(tmp_path / "bank", budget_bytes=RIG_SPEC.block_params(1) * 4 + 8) as rig:
        one = Sparse(1e-9).encode(ones(TOPIC))
        assert rig.blocks.PushUpdates(encoded_push({TOPIC: one}, "sparse")).results[0].accepted
        error = failure(rig, encoded_push({TOPIC: one, LEAF: one}, "sparse", request_id="p2"))
        assert error.reason is Reason.MESSAGE_TOO_LARGE


def test_a_repeated_push_is_not_applied_again(rig: RpcRig) -> None:
    rig.blocks.PushUpdates(push_messages({TOPIC: ones(TOPIC)}))
    answer = rig.blocks.PushUpdates(push_messages({TOPIC: ones(TOPIC)}))
    assert answer.duplicate
    assert rig.bank.status(TOPIC).version == 1


def test_wrong_pushes_change_nothing(rig: RpcRig) -> None:
    good = list(push_messages({TOPIC: ones(TOPIC)}))
    head = good[0]

    def changed(**fields: object) -> pb.PushUpdatesRequest:
        message = pb.PushUpdatesRequest()
        message.CopyFrom(head)
        for name, value in fields.items():
            setattr(message, name, value)
        return message

    damaged = pb.PushUpdatesRequest(data=good[1].data[:-1] + b"\1")
    short = pb.PushUpdatesRequest()
    short.CopyFrom(head)
    short.headers[0].num_bytes -= 4
    untyped = pb.PushUpdatesRequest()
    untyped.CopyFrom(head)
    untyped.headers[0].dtype = types_pb.DATA_TYPE_UNSPECIFIED
    twice = pb.PushUpdatesRequest()
    twice.CopyFrom(head)
    twice.headers.append(head.headers[0])
    cases: list[tuple[list[pb.PushUpdatesRequest], Reason]] = [
        ([], Reason.BAD_ARGUMENT),
        ([changed(request_id=""), *good[1:]], Reason.BAD_ARGUMENT),
        ([changed(bank="other"), *good[1:]], Reason.UNKNOWN_BANK),
        ([changed(learning_rate_scale=float("nan")), *good[1:]], Reason.BAD_ARGUMENT),
        ([pb.PushUpdatesRequest(request_id="p1")], Reason.BAD_ARGUMENT),
        (good[:-1], Reason.BAD_ARGUMENT),
        ([*good, pb.PushUpdatesRequest(data=b"more")], Reason.BAD_ARGUMENT),
        ([head, damaged, *good[2:]], Reason.CHECKSUM_MISMATCH),
        ([short, *good[1:]], Reason.BAD_SHAPE),
        ([untyped, *good[1:]], Reason.BAD_DTYPE),
        ([twice, *good[1:]], Reason.BAD_ARGUMENT),
        (
            [head, pb.PushUpdatesRequest(data=b"x" * (2 * CHUNK_BYTES + 1))],
            Reason.MESSAGE_TOO_LARGE,
        ),
    ]
    for messages, reason in cases:
        assert failure(rig, messages).reason is reason
    assert rig.bank.status(TOPIC).version == 0
    assert rig.budget.used_bytes == 0


def test_a_push_that_is_cancelled_is_not_applied(rig: RpcRig) -> None:
    messages = list(push_messages({TOPIC: ones(TOPIC)}))
    call: list[grpc.Future[pb.PushUpdatesResponse]] = []
    begun = threading.Event()

    def cut() -> Iterator[pb.PushUpdatesRequest]:
        yield messages[0]
        begun.wait()
        call[0].cancel()

    call.append(rig.blocks.PushUpdates.future(cut()))
    begun.set()
    with pytest.raises((grpc.RpcError, grpc.FutureCancelledError)):
        call[0].result()
    assert rig.bank.status(TOPIC).version == 0


def test_a_passed_deadline_is_an_error_of_its_own(rig: RpcRig) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        # A deadline of this very moment can still be met.
        rig.blocks.GetBank(pb.GetBankRequest(), timeout=-1.0)
    assert error_of(caught.value).reason is Reason.DEADLINE_PASSED


def test_bytes_in_flight_are_bounded_and_the_refusal_says_when_to_retry(tmp_path: Path) -> None:
    num_bytes = RIG_SPEC.weight_bytes(1)
    with RpcRig(tmp_path / "bank", budget_bytes=num_bytes) as rig:
        with rig.budget.reserve(1, what="somebody else"), pytest.raises(grpc.RpcError) as caught:
            fetch(rig, [TOPIC])
        error = error_of(caught.value)
        assert error.reason is Reason.OVERLOADED
        assert int(error.metadata["retry_after_ms"]) > 0
        assert fetch(rig, [TOPIC])[1]
        with pytest.raises(grpc.RpcError) as caught:
            fetch(rig, [TOPIC, LEAF])
        # Alone it is too large: a retry would never help.
        assert error_of(caught.value).reason is Reason.MESSAGE_TOO_LARGE
        assert failure(rig, push_messages({TOPIC: ones(TOPIC), LEAF: ones(LEAF)})).reason is (
            Reason.MESSAGE_TOO_LARGE
        )
        # What is held and unchanged is not sent, however large it is.
        headers, data, _ = fetch(rig, [TOPIC, LEAF], held_version_plus_one=[1, 1])
        assert (len(headers), data) == (2, b"")
        # What turns out to have changed counts after all.
        rig.bank.push(TOPIC, "p1")
        rig.bank.push(LEAF, "p2")
        with pytest.raises(grpc.RpcError) as caught:
            fetch(rig, [TOPIC, LEAF], held_version_plus_one=[1, 1])
        assert error_of(caught.value).reason is Reason.MESSAGE_TOO_LARGE
        assert rig.budget.used_bytes == 0


def test_tree_travels_whole(rig: RpcRig) -> None:
    first, *rest = rig.blocks.GetTree(pb.GetTreeRequest())
    document = first.data + b"".join(message.data for message in rest)
    assert (len(document), crc32c(document)) == (first.num_bytes, first.crc32c)
    assert decode_tree(document, key="tree").labels[TOPIC] == "label of 1-1"


def test_watch_tells_changes_from_the_moment_it_answers(rig: RpcRig) -> None:
    call = rig.blocks.WatchBlocks(pb.WatchBlocksRequest(admin_only=True))
    call.initial_metadata()
    rig.bank.push(TOPIC, "p1")
    rig.bank.operations.apply(asked("r1"), [Withhold(topic=LEAF)])
    event = next(iter(call)).events[0]
    assert (event.ref.level, event.ref.cluster, event.revision) == (2, 2, 1)
    assert convert.state_from_pb(event.state) is BlockState.WITHHELD
    call.cancel()


def test_watchers_are_bounded(rig: RpcRig) -> None:
    calls = [rig.blocks.WatchBlocks(pb.WatchBlocksRequest()) for _ in range(2)]
    for call in calls:
        call.initial_metadata()
    with pytest.raises(grpc.RpcError) as caught:
        next(iter(rig.blocks.WatchBlocks(pb.WatchBlocksRequest())))
    assert error_of(caught.value).reason is Reason.OVERLOADED
    for call in calls:
        call.cancel()


def test_a_stopping_server_ends_its_watchers(tmp_path: Path) -> None:
    with RpcRig(tmp_path / "bank") as rig:
        call = rig.blocks.WatchBlocks(pb.WatchBlocksRequest())
        call.initial_metadata()
        rig.server.stop()
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(call))
        assert error_of(caught.value).reason is Reason.SHARD_UNAVAILABLE


def test_messages_of_data_alone_are_what_the_generated_code_writes(tmp_path: Path) -> None:
    shard = LargeBlocks(3)
    with RpcRig(tmp_path / "bank", shard=shard.api) as rig:
        read = rig.channel.unary_stream(
            "/membank.v1.BlockService/FetchBlocks",
            request_serializer=pb.FetchBlocksRequest.SerializeToString,
            response_deserializer=bytes,
        )
        sent = list(read(pb.FetchBlocksRequest(refs=[to_pb(TOPIC)])))
    for encoded in sent:
        assert pb.FetchBlocksResponse.FromString(encoded).SerializeToString() == encoded
    data = [pb.FetchBlocksResponse.FromString(encoded).data for encoded in sent]
    # The headers go ahead; a message of data alone is at most one chunk.
    assert data[0] == b""
    assert [len(each) for each in data[1:]] == [CHUNK_BYTES] * 3


def test_a_slow_reader_does_not_make_the_server_read_ahead(tmp_path: Path) -> None:
    shard = LargeBlocks(48)
    with RpcRig(tmp_path / "bank", shard=shard.api, budget_bytes=64 << 20) as rig:
        call = rig.blocks.FetchBlocks(pb.FetchBlocksRequest(refs=[to_pb(TOPIC)]))
        for num_read in range(1, 4):
            next(call)
            # Time in which the server would go on, if the reader did not hold it back.
            for _ in range(20):
                rig.blocks.GetBank(pb.GetBankRequest())
            assert shard.num_taken <= num_read + _AHEAD
        assert rig.budget.used_bytes == 48 << 20
        call.cancel()
        wait_until_idle(rig)


@pytest.mark.slow
def test_a_reader_that_leaves_ends_the_work(tmp_path: Path) -> None:
    shard = LargeBlocks(48)
    with RpcRig(tmp_path / "bank", shard=shard.api) as rig:
        call = rig.blocks.FetchBlocks(pb.FetchBlocksRequest(refs=[to_pb(TOPIC)]), timeout=2.0)
        next(call)
        while call.is_active():
            rig.blocks.GetBank(pb.GetBankRequest())
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until_idle(rig)
        assert shard.num_taken < 48
