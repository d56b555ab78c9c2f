"""The door for callers on the same machine: what it gives, whom it lets in, what it leaves behind."""

from __future__ import annotations

import os
import socket
import struct
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from google.rpc import status_pb2

from membank.bank_service.rpc.auth import LOCAL_PRINCIPAL, Principal, Role
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.same_host import SameHostDoor
from membank.bank_service.shard import Shard
from membank.bank_service.shard.contract import SetState
from membank.bank_service.store import Bank
from membank.client.transport.contract import FetchAnswer, PushAnswer
from membank.client.transport.contract import SameHostDoor as Door
from membank.client.transport.landing import Landing
from membank.client.transport.requests import fetch_request, push_head
from membank.client.transport.same_host_connection import SameHostConnection
from membank.v1 import same_host_pb2 as host_pb
from membank.wire.buffers import BufferPool
from membank.wire.crc import crc32c
from membank.wire.errors import (
    AccessDeniedError,
    CorruptionError,
    InternalError,
    NotFoundError,
    Reason,
    from_status_proto,
)
from membank.wire.records import Gradient, Update
from membank.wire.same_host import MessageSocket, abstract_address
from membank.wire.shared_memory import MappedSegments, SharedMemory
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState, LevelSpec

TIMEOUT_S = 10.0
SMALL, LARGE, OTHER = BlockRef(1, 0), BlockRef(2, 1), BlockRef(2, 2)
SPEC = BankSpec(
    name="host",
    num_layers=4,
    width=64,
    levels=(LevelSpec(fan_out=2, block_width=1), LevelSpec(fan_out=2, block_width=256)),
    num_partitions=2,
)
"""Blocks of 3 KB, which are packed, and of 786 KB, which are read where they lie."""


class Rig:
    """A shard, its door, and callers."""

    def __init__(self, shard: Shard, *, budget_bytes: int = 64 << 20, **options: object) -> None:
        self.shard = shard
        self.budget = ByteBudget(budget_bytes)
        self.door = SameHostDoor(shard, self.budget, **options)  # type: ignore[arg-type]
        self.staging = SharedMemory()
        self._pool = BufferPool(64 << 20)

    def where(self, principal: Principal = LOCAL_PRINCIPAL) -> Door:
        """Return an address with a fresh ticket."""
        shown = self.door.show(principal)
        return Door(boot_id=shown.boot_id, socket_name=shown.socket_name, ticket=shown.ticket)

    def connect(self, principal: Principal = LOCAL_PRINCIPAL) -> SameHostConnection:
        """Return a connection."""
        return SameHostConnection.open(self.where(principal), "here", timeout_s=TIMEOUT_S)

    def raw(self) -> MessageSocket:
        """Return a connection that has been let in, without a client around it."""
        where = self.where()
        end = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        end.connect(abstract_address(where.socket_name))
        messages = MessageSocket(end)
        messages.set_timeout(TIMEOUT_S)
        messages.send(host_pb.SameHostRequest(ticket=where.ticket))
        messages.receive(host_pb.SameHostResponse)
        return messages

    def fetch(
        self, connection: SameHostConnection, refs: list[BlockRef], **options: object
    ) -> FetchAnswer:
        """Fetch blocks."""
        arguments = {"held_versions": None, "dtype": None, "min_revision": 0, "snapshot": ""}
        request = fetch_request(refs, bank="", **(arguments | options))  # type: ignore[arg-type]
        return connection.fetch(request, refs, Landing(self._pool), timeout_s=TIMEOUT_S)

    def push(
        self, connection: SameHostConnection, ref: BlockRef, values: Array, base: int = 0
    ) -> PushAnswer:
        """Push a gradient."""
        return connection.push(
            an_update(ref, values, base), bank="", staging=self.staging, timeout_s=TIMEOUT_S
        )

    def await_nobody(self) -> None:
        """Wait until the connections of callers that left have ended."""
        while connections := list(self.door._connections):
            for connection in connections:
                connection.join(TIMEOUT_S)
                assert not connection.is_alive()


@pytest.fixture
def open_rig(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    with ExitStack() as stack:
        Bank.create(str(tmp_path / "bank"), SPEC)
        shard = Shard.open(str(tmp_path / "bank"))
        stack.callback(shard.close)

        def open_one(**options: object) -> Rig:
            rig = Rig(shard, **options)  # type: ignore[arg-type]
            stack.callback(rig.door.close)
            return rig

        yield open_one


@pytest.fixture
def rig(open_rig: Callable[..., Rig]) -> Rig:
    return open_rig()


def an_update(ref: BlockRef, values: Array, base: int = 0) -> Update:
    gradient = Gradient(ref=ref, base_version=base, values=values)
    return Update(request_id=uuid.uuid4().hex, step=1, gradients=(gradient,))


def a_gradient(ref: BlockRef) -> Array:
    return np.random.default_rng(0).standard_normal(SPEC.block_shape(ref.level), np.float32)


def num_descriptors() -> int:
    """Count open files; the arena, which all tests share, keeps and gives up its own as it likes."""
    folder = Path("/proc/self/fd")
    return sum("memfd:" not in _target(folder / name) for name in os.listdir(folder))


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # that of the listing itself
        return "memfd:"


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("refs", [[SMALL], [LARGE], [LARGE, SMALL, OTHER]])
def test_a_fetch_gives_what_the_shard_gives(
    rig: Rig, refs: list[BlockRef], dtype: str | None
) -> None:
    connection = rig.connect()
    rig.push(connection, LARGE, a_gradient(LARGE))
    answer = rig.fetch(connection, refs, dtype=dtype)
    expected = rig.shard.fetch(refs, dtype=dtype)
    assert answer.revision == expected.revision
    for ours, theirs in zip(answer.blocks, expected.blocks, strict=True):
        assert ours.header == theirs.header
        assert ours.weight is not None
        assert theirs.weight is not None
        assert ours.weight.tobytes() == theirs.weight.tobytes()
        assert not ours.weight.flags.writeable
    connection.close()


def test_what_is_held_or_withheld_has_no_bytes(rig: Rig) -> None:
    connection = rig.connect()
    (unchanged,) = rig.fetch(connection, [LARGE], held_versions=[0]).blocks
    assert unchanged.header.unchanged
    assert unchanged.weight is None
    rig.shard.prepare(1, [SetState(ref=LARGE, state=BlockState.WITHHELD)], dry_run=True)
    connection.close()


def test_a_push_does_what_the_shard_does(rig: Rig, tmp_path: Path) -> None:
    Bank.create(str(tmp_path / "twin"), rig.shard.spec)
    twin = Shard.open(str(tmp_path / "twin"))
    connection = rig.connect()
    values = a_gradient(LARGE)
    answer = rig.push(connection, LARGE, values)
    twin.push(an_update(LARGE, values))
    assert [result.version for result in answer.results] == [1]
    ours, theirs = rig.shard.fetch([LARGE]).blocks[0], twin.fetch([LARGE]).blocks[0]
    assert ours.header == theirs.header
    stale = rig.push(connection, LARGE, values, base=5)
    assert stale.results[0].reason is Reason.VERSION_MISMATCH
    twin.close()
    connection.close()


def test_a_push_that_comes_twice_is_applied_once(rig: Rig) -> None:
    update = an_update(SMALL, a_gradient(SMALL))
    answers = []
    for _ in range(2):
        connection = rig.connect()
        answers.append(connection.push(update, bank="", staging=rig.staging, timeout_s=TIMEOUT_S))
        connection.close()
    assert [answer.duplicate for answer in answers] == [False, True]
    assert rig.shard.fetch([SMALL]).blocks[0].version == 1


def test_errors_of_the_shard_are_told_and_the_connection_goes_on(rig: Rig) -> None:
    connection = rig.connect()
    with pytest.raises(NotFoundError):
        rig.fetch(connection, [BlockRef(2, 99)])
    with pytest.raises(NotFoundError):
        rig.fetch(connection, [LARGE], snapshot="none")
    assert rig.budget.used_bytes == 0
    assert rig.fetch(connection, [LARGE]).blocks[0].weight is not None
    connection.close()


def test_a_gradient_that_changed_on_the_way_is_refused(rig: Rig) -> None:
    messages, memory = rig.raw(), SharedMemory()
    update = an_update(LARGE, a_gradient(LARGE))
    array = memory.take(update.gradients[0].values.nbytes)
    array[:] = 0
    place = memory.place_of(array)
    push = host_pb.SameHostPush(
        head=push_head(update, [crc32c(update.gradients[0].values)], bank=""),
        places=[host_pb.SharedPlace(segment=place.segment, offset=place.offset)],
    )
    request = host_pb.SameHostRequest(segments=[place.segment], push=push)
    messages.send(request, [place.descriptor])
    response, _ = messages.receive(host_pb.SameHostResponse)
    error = from_status_proto(status_pb2.Status.FromString(response.status))
    assert isinstance(error, CorruptionError)
    assert rig.shard.fetch([LARGE]).blocks[0].version == 0
    messages.close()


def test_a_place_that_there_is_not_is_an_error(rig: Rig) -> None:
    messages = rig.raw()
    update = an_update(LARGE, a_gradient(LARGE))
    push = host_pb.SameHostPush(
        head=push_head(update, [0], bank=""), places=[host_pb.SharedPlace(segment=7)]
    )
    messages.send(host_pb.SameHostRequest(push=push))
    response, _ = messages.receive(host_pb.SameHostResponse)
    assert (
        from_status_proto(status_pb2.Status.FromString(response.status)).reason
        is Reason.BAD_ARGUMENT
    )
    messages.close()


def test_a_defect_is_told_without_its_inside(open_rig: Callable[..., Rig]) -> None:
    rig = open_rig()
    rig.door._calls._shard = BrokenShard(rig.shard)  # type: ignore[assignment]
    connection = rig.connect()
    with pytest.raises(InternalError, match="request") as caught:
        rig.fetch(connection, [LARGE])
    assert "secret" not in str(caught.value)
    connection.close()


class BrokenShard:
    """A shard with a defect."""

    def __init__(self, shard: Shard) -> None:
        self.spec = shard.spec

    def fetch(self, *arguments: object, **options: object) -> None:
        raise ZeroDivisionError("secret")


# ---- who is let in


def test_a_ticket_is_good_once(rig: Rig) -> None:
    where = rig.where()
    SameHostConnection.open(where, "here", timeout_s=TIMEOUT_S).close()
    with pytest.raises(ConnectionError):
        SameHostConnection.open(where, "here", timeout_s=TIMEOUT_S)


def test_nobody_comes_in_without_a_ticket(rig: Rig) -> None:
    where = replace(rig.where(), ticket=b"x" * 32)
    with pytest.raises(ConnectionError):
        SameHostConnection.open(where, "here", timeout_s=TIMEOUT_S)
    rig.await_nobody()


def test_another_user_is_not_let_in(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    where = rig.where()
    with monkeypatch.context() as patch:
        patch.setattr(MessageSocket, "peer_uid", 12345)
        with pytest.raises(PermissionError):
            SameHostConnection.open(where, "here", timeout_s=TIMEOUT_S)
        rig.await_nobody()


def test_roles_hold_here_too(rig: Rig) -> None:
    connection = rig.connect(Principal("reader", Role.READER))
    assert rig.fetch(connection, [LARGE]).blocks
    with pytest.raises(AccessDeniedError):
        rig.push(connection, LARGE, a_gradient(LARGE))
    assert rig.fetch(connection, [LARGE]).blocks[0].version == 0
    connection.close()


def test_a_full_house_sends_callers_away(open_rig: Callable[..., Rig]) -> None:
    rig = open_rig(max_connections=1)
    first = rig.connect()
    with pytest.raises(OSError, match=r"closed|reset|Broken"):
        rig.connect()
    first.close()
    rig.await_nobody()
    rig.connect().close()


# ---- what is left behind


def test_a_lack_of_threads_passes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "membank-same-host":
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as scarce:
        scarce.setattr(threading.Thread, "start", refuse)
        with pytest.raises(OSError, match=r"closed|reset|Broken"):
            rig.connect()
    rig.connect().close()


def test_what_was_fetched_is_reserved_until_it_is_released(rig: Rig) -> None:
    messages = rig.raw()
    request = fetch_request(
        [LARGE], bank="", held_versions=None, dtype=None, min_revision=0, snapshot=""
    )
    messages.send(host_pb.SameHostRequest(fetch=request))
    _, descriptors = messages.receive(host_pb.SameHostResponse)
    assert rig.budget.used_bytes == SPEC.weight_bytes(2)
    for descriptor in descriptors:
        os.close(descriptor)
    messages.send(host_pb.SameHostRequest(release=host_pb.SameHostRelease()))
    # The next answer comes after the release.
    messages.send(
        host_pb.SameHostRequest(
            fetch=fetch_request(
                [], bank="", held_versions=None, dtype=None, min_revision=0, snapshot=""
            )
        )
    )
    messages.receive(host_pb.SameHostResponse)
    assert rig.budget.used_bytes == 0
    messages.close()


def test_an_answer_without_content_is_no_lease(open_rig: Callable[..., Rig]) -> None:
    rig = open_rig(lease_s=0.01)
    messages = rig.raw()
    request = fetch_request(
        [LARGE], bank="", held_versions=[0], dtype=None, min_revision=0, snapshot=""
    )
    for _ in range(2):
        messages.send(host_pb.SameHostRequest(fetch=request))
        response, _ = messages.receive(host_pb.SameHostResponse)
        assert response.blocks.headers[0].unchanged
        assert rig.budget.used_bytes == 0
        # The shard would have ended the connection by then.
        messages.set_timeout(0.05)
        with pytest.raises(TimeoutError):
            messages.receive(host_pb.SameHostResponse)
        messages.set_timeout(10)
    messages.close()


def test_a_leased_block_stays_as_it_is_while_it_is_updated(rig: Rig) -> None:
    before = rig.shard.fetch([LARGE]).blocks[0]
    assert before.weight is not None
    content = before.weight.tobytes()
    del before
    messages, segments = rig.raw(), MappedSegments()
    request = fetch_request(
        [LARGE], bank="", held_versions=None, dtype=None, min_revision=0, snapshot=""
    )
    messages.send(host_pb.SameHostRequest(fetch=request))
    response, descriptors = messages.receive(host_pb.SameHostResponse)
    segments.adopt(response.segments[0], descriptors[0])
    (place,) = response.blocks.places
    seen = segments.view(place.segment, place.offset, len(content))
    for version in range(5):
        rig.shard.push(an_update(LARGE, a_gradient(LARGE), base=version))
    assert seen.tobytes() == content
    messages.close()


@pytest.mark.parametrize("is_leased", [False, True])
def test_a_caller_that_dies_leaves_nothing(rig: Rig, is_leased: bool) -> None:
    before = num_descriptors()
    messages = rig.raw()
    if is_leased:
        request = fetch_request(
            [LARGE, SMALL], bank="", held_versions=None, dtype=None, min_revision=0, snapshot=""
        )
        messages.send(host_pb.SameHostRequest(fetch=request))
        _, descriptors = messages.receive(host_pb.SameHostResponse)
        for descriptor in descriptors:
            os.close(descriptor)
    held = num_descriptors()
    messages.close()
    rig.await_nobody()
    assert rig.budget.used_bytes == 0
    assert num_descriptors() < held
    if not is_leased:
        assert num_descriptors() == before


def test_a_caller_that_stops_reading_loses_its_lease(open_rig: Callable[..., Rig]) -> None:
    rig = open_rig(lease_s=0.05)
    messages = rig.raw()
    request = fetch_request(
        [LARGE], bank="", held_versions=None, dtype=None, min_revision=0, snapshot=""
    )
    messages.send(host_pb.SameHostRequest(fetch=request))
    _, descriptors = messages.receive(host_pb.SameHostResponse)
    for descriptor in descriptors:
        os.close(descriptor)
    with pytest.raises(ConnectionError):
        messages.receive(host_pb.SameHostResponse)
    rig.await_nobody()
    assert rig.budget.used_bytes == 0
    messages.close()


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack("<II", 1 << 31, 0),
        struct.pack("<II", 4, 0) + b"\xff\xff\xff\xff",
        struct.pack("<II", 4, 3) + b"\0\0\0\0",
        struct.pack("<II", 100, 0) + b"short",
        b"\0",
    ],
)
def test_what_cannot_be_understood_ends_the_connection(rig: Rig, garbage: bytes) -> None:
    before = num_descriptors()
    messages = rig.raw()
    messages._socket.sendall(garbage)
    messages._socket.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionError):
        messages.receive(host_pb.SameHostResponse)
    messages.close()
    rig.await_nobody()
    assert num_descriptors() == before
    connection = rig.connect()
    assert rig.fetch(connection, [SMALL]).blocks
    connection.close()


def test_descriptors_of_no_segment_are_closed(rig: Rig) -> None:
    messages = rig.raw()
    before = num_descriptors()
    handle = os.open("/dev/null", os.O_RDONLY)
    request = fetch_request(
        [], bank="", held_versions=None, dtype=None, min_revision=0, snapshot=""
    )
    messages.send(host_pb.SameHostRequest(fetch=request), [handle])
    os.close(handle)
    messages.receive(host_pb.SameHostResponse)
    assert num_descriptors() == before
    messages.close()


def test_the_end_of_the_door_ends_its_connections(rig: Rig) -> None:
    connection = rig.connect()
    rig.door.close()
    with pytest.raises(OSError):  # which one depends on who is quicker
        rig.fetch(connection, [LARGE])
    assert rig.door.num_connections == 0
    connection.close()
