"""The data path for callers on the same machine: payloads lie in shared memory and do not travel.

A caller asks for the door over gRPC (`GetSameHostDoor`), where it is authenticated, and knocks with
the ticket that it gets. Only a process of the same user on the same kernel can; whoever cannot goes
on over gRPC. Blocks are read where they lie: the connection holds them until its next message or
its end, so a caller that dies leaves nothing behind. Gradients are copied before they are looked
at: what becomes of the caller's memory afterwards is of no concern.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack, suppress

from membank.bank_service.rpc.admission import leaving
from membank.bank_service.rpc.auth import BLOCK_SERVICE, Principal, require_role
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.fetching import fetched
from membank.bank_service.rpc.pushing import POOLED_BYTES, IncomingPush, reserved
from membank.bank_service.shard.contract import ShardApi
from membank.bank_service.store.block_memory import block_memory
from membank.v1 import block_service_pb2 as pb
from membank.v1 import same_host_pb2 as host_pb
from membank.wire import convert
from membank.wire.buffers import BufferPool
from membank.wire.copying import copy_checked
from membank.wire.crc import as_uint8
from membank.wire.errors import (
    CorruptionError,
    InvalidArgumentError,
    Reason,
    to_status_proto,
)
from membank.wire.framing import Payload
from membank.wire.same_host import MAX_DESCRIPTORS, MessageSocket, abstract_address, boot_id
from membank.wire.shared_memory import Bytes, MappedSegments, Place, pack
from membank.wire.spec import Array

_LOG = logging.getLogger(__name__)

_MAX_TICKETS = 1_024
_TICKET_S = 10.0
_SEND_S = 10.0

Answer = tuple[host_pb.SameHostResponse, Sequence[int]]
"""A message and the descriptors that go along."""


class SameHostDoor:
    """Listens for callers on this machine; serves each connection by a thread of its own.

    Parameters
    ----------
    shard
        The shard that they call.
    budget
        Bound on payload bytes in flight, shared with the calls over gRPC.
    max_connections
        Most connections at a time; further callers are sent away, and go on over gRPC.
    lease_s
        Seconds for which a caller may read what it has fetched before its connection is ended.
    gradients
        Memory for gradients; None = of its own.
    """

    # `_lock` guards `_tickets` and `_connections`.

    def __init__(
        self,
        shard: ShardApi,
        budget: ByteBudget,
        *,
        max_connections: int = 32,
        lease_s: float = 30.0,
        gradients: BufferPool | None = None,
    ) -> None:
        self._calls = _Calls(shard, budget, gradients or BufferPool(POOLED_BYTES))
        self._max_connections = max_connections
        self._lease_s = lease_s
        self._tickets: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        self._name = f"membank-{uuid.uuid4().hex}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(abstract_address(self._name))
        self._listener.listen(max_connections)
        self._thread = threading.Thread(target=self._accept, name="membank-door", daemon=True)
        self._thread.start()

    @property
    def num_connections(self) -> int:
        """Callers that are connected now."""
        with self._lock:
            return len(self._connections)

    def show(self, principal: Principal) -> pb.GetSameHostDoorResponse:
        """Return where the door is, and a ticket that stands for `principal`."""
        ticket = secrets.token_bytes(32)
        with self._lock:
            self._tickets[ticket] = (principal, time.monotonic() + _TICKET_S)
            while len(self._tickets) > _MAX_TICKETS:
                self._tickets.popitem(last=False)
        return pb.GetSameHostDoorResponse(boot_id=boot_id(), socket_name=self._name, ticket=ticket)

    def close(self) -> None:
        """Let nobody in any more and end the connections; calls under way are done to their end."""
        with self._lock:
            self._is_closed = True
            connections = list(self._connections)
        with suppress(OSError):
            # Closing it would leave the thread in `accept` for ever.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for connection in connections:
            connection.end()
        for connection in connections:
            connection.join()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                accepted, _ = self._listener.accept()
            except OSError as err:
                if not self._is_closed:
                    _LOG.warning("a caller on this machine could not be let in: %s", err)
                continue
            messages = MessageSocket(accepted)
            connection = _Connection(self, messages)
            if not self._admit(connection):
                messages.close()

    def _admit(self, connection: _Connection) -> bool:
        with self._lock:
            if self._is_closed or len(self._connections) >= self._max_connections:
                return False
            # Before anybody can see it: a thread that was not started cannot be waited for.
            try:
                connection.start()
            except RuntimeError as err:
                # A lack of threads passes; without this one nobody would be let in any more.
                _LOG.warning("a caller on this machine could not be let in: %s", err)
                return False
            self._connections.add(connection)
            return True

    def _redeem(self, ticket: bytes) -> Principal | None:
        """Return whom a ticket stands for, and make it void; None = nobody."""
        with self._lock:
            principal, until = self._tickets.pop(ticket, (None, 0.0))
        return principal if time.monotonic() < until else None

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


class _Connection(threading.Thread):
    """One caller, served one request at a time."""

    def __init__(self, door: SameHostDoor, messages: MessageSocket) -> None:
        super().__init__(name="membank-same-host", daemon=True)
        self._door = door
        self._messages = messages
        self._segments = MappedSegments()
        self._lease = ExitStack()
        """Holds what the caller may be reading, and the bytes that are reserved for it."""
        self._is_leased = False

    def run(self) -> None:
        # docstring inherited
        try:
            principal = self._let_in()
            while principal is not None:
                self._serve(principal)
        except OSError as err:
            _LOG.debug("a connection of this machine ended: %s", err)
        finally:
            self._lease.close()
            self._messages.close()
            self._door._forget(self)

    def end(self) -> None:
        """End the connection once the request that is being served is."""
        self._messages.shut_down()

    def _let_in(self) -> Principal | None:
        if self._messages.peer_uid != os.geteuid():
            return None
        self._messages.set_timeout(_TICKET_S)
        request = self._receive()
        principal = self._door._redeem(request.ticket)
        if principal is not None:
            self._messages.send(host_pb.SameHostResponse(welcome=host_pb.SameHostWelcome()))
        return principal

    def _serve(self, principal: Principal) -> None:
        self._messages.set_timeout(self._door._lease_s if self._is_leased else None)
        request = self._receive()
        self._lease.close()
        self._is_leased = False
        if request.HasField("release"):
            return
        try:
            response, descriptors = self._answer(principal, request)
        except Exception as err:
            self._lease.close()
            response, descriptors = _failed(err), ()
        self._messages.set_timeout(_SEND_S)
        self._messages.send(response, descriptors)

    def _receive(self) -> host_pb.SameHostRequest:
        request, descriptors = self._messages.receive(host_pb.SameHostRequest)
        try:
            for number in request.segments:
                self._segments.adopt(number, descriptors.pop(0))
        except IndexError as err:
            raise ConnectionError("a segment came without its descriptor") from err
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return request

    def _answer(self, principal: Principal, request: host_pb.SameHostRequest) -> Answer:
        calls = self._door._calls
        match request.WhichOneof("kind"):
            case "fetch":
                require_role(principal, BLOCK_SERVICE + "FetchBlocks")
                response, descriptors = calls.fetch(request.fetch, self._lease)
                self._is_leased = bool(response.blocks.places)
                if not self._is_leased:
                    self._lease.close()  # there is nothing to read, and so nothing to release
                return response, descriptors
            case "push":
                require_role(principal, BLOCK_SERVICE + "PushUpdates")
                return calls.push(request.push, self._segments)
            case kind:
                raise InvalidArgumentError(f"a request of kind {kind} is not known here")


class _Calls:
    """The data path of a shard, in terms of shared memory."""

    def __init__(self, shard: ShardApi, budget: ByteBudget, gradients: BufferPool) -> None:
        self._shard = shard
        self._budget = budget
        self._gradients = gradients

    def fetch(self, request: pb.FetchBlocksRequest, lease: ExitStack) -> Answer:
        """Find blocks; what `lease` holds keeps them where they are."""
        result = lease.enter_context(fetched(request, self._shard, self._budget))
        weights = [block.weight for block in result.blocks if block.weight is not None]
        places, holder = _places(weights)
        lease.callback(_let_go, [weights, holder])
        segments = {place.segment: place.descriptor for place in places}
        blocks = host_pb.SameHostBlocks(
            revision=result.revision,
            headers=[convert.header_to_pb(block.header) for block in result.blocks],
            places=[host_pb.SharedPlace(segment=p.segment, offset=p.offset) for p in places],
        )
        return host_pb.SameHostResponse(segments=segments, blocks=blocks), [*segments.values()]

    def push(self, request: host_pb.SameHostPush, segments: MappedSegments) -> Answer:
        """Apply gradients that lie in memory of the caller."""
        with reserved(request.head, self._shard, self._budget, self._gradients) as push:
            if len(request.places) != len(push.payloads):
                raise InvalidArgumentError(
                    f"{len(request.places)} places for {len(push.payloads)} gradients"
                )
            buffers = [
                _taken_over(payload, place, segments, push)
                for payload, place in zip(push.payloads, request.places, strict=True)
            ]
            return host_pb.SameHostResponse(pushed=push.apply(buffers)), ()


def _taken_over(
    payload: Payload, place: host_pb.SharedPlace, segments: MappedSegments, push: IncomingPush
) -> Bytes:
    """Copy a gradient out of the caller's memory, which may change while that is done."""
    try:
        view = segments.view(place.segment, place.offset, payload.num_bytes)
    except LookupError as err:
        raise InvalidArgumentError(f"{payload.what}: {err}") from err
    buffer = push.take_buffer(payload.num_bytes)
    actual = copy_checked(buffer, view)
    if actual != payload.crc32c:
        raise CorruptionError(
            f"{payload.what}: CRC-32C is {actual:08x}, expected {payload.crc32c:08x}; the "
            "memory was changed before the push was answered",
            reason=Reason.CHECKSUM_MISMATCH,
        )
    return buffer


def _places(weights: Sequence[Array]) -> tuple[list[Place], Bytes | None]:
    """Return where weights lie in shared memory, and what was copied there for that.

    Copied are those that lie elsewhere: small ones, and what was made for this answer alone, such
    as another element type. And all, where they are in more segments than go along with a message.
    """
    memory = block_memory()
    found = [memory.locate(weight) for weight in weights]
    if len({place.segment for place in found if place is not None}) >= MAX_DESCRIPTORS:
        found = [None] * len(weights)
    absent = [weight for weight, place in zip(weights, found, strict=True) if place is None]
    if not absent:
        return [place for place in found if place is not None], None
    parts, bundle = pack([weight.nbytes for weight in absent], memory)
    for part, weight in zip(parts, absent, strict=True):
        part[:] = as_uint8(weight)
    packed = iter(parts)
    return [place or memory.place_of(next(packed)) for place in found], bundle


def _let_go(held: list[object]) -> None:
    held.clear()


def _failed(error: Exception) -> host_pb.SameHostResponse:
    status = to_status_proto(leaving(error, "a call on this machine"))
    return host_pb.SameHostResponse(status=status.SerializeToString())
