"""The data path over gRPC: a thin skin around a shard."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import grpc

from membank.bank_service.rpc.auth import current_principal
from membank.bank_service.rpc.budget import ByteBudget, Reservation
from membank.bank_service.rpc.interceptor import check_alive
from membank.bank_service.rpc.same_host import SameHostDoor
from membank.bank_service.shard.contract import FetchResult, ShardApi
from membank.v1 import block_service_pb2 as pb
from membank.v1.block_service_pb2_grpc import BlockServiceServicer
from membank.wire import convert
from membank.wire.crc import crc32c
from membank.wire.errors import (
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.framing import (
    CHUNK_BYTES,
    WATCH_ON_KEY,
    Payload,
    PayloadAssembler,
    iter_chunks,
)
from membank.wire.records import BankInfo, Gradient, Update
from membank.wire.spec import Array, BankSpec, BlockRef, dtype_of

MAX_REFS = 65_536
"""Most blocks that one request may name."""

_HEADERS_PER_MESSAGE = 8_192
_WATCH_WAIT_S = 0.5
"""How soon a watcher notices that its caller is gone or the server stops."""


class BankSource(Protocol):
    """What clients ask about a bank before they touch its blocks."""

    def info(self) -> BankInfo:
        """Return spec, revision and placement; `NotFoundError` while there is no bank."""

    def tree(self) -> bytes:
        """Return the tree document; `NotFoundError` with reason NO_TREE where there is none."""


class BankInfoServicer(BlockServiceServicer):
    """Describes a bank and sends callers to its shards for the rest.

    Parameters
    ----------
    source
        What is known of the bank.
    """

    def __init__(self, source: BankSource) -> None:
        self._source = source

    def GetBank(
        self, request: pb.GetBankRequest, context: grpc.ServicerContext
    ) -> pb.GetBankResponse:
        # docstring inherited
        check_alive(context)
        info = self._source.info()
        check_bank(request.bank, info.spec)
        return convert.info_to_pb(info)

    def GetTree(
        self, request: pb.GetTreeRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GetTreeResponse]:
        # docstring inherited
        check_alive(context)
        check_bank(request.bank, self._source.info().spec)
        document = self._source.tree()
        first = pb.GetTreeResponse(num_bytes=len(document), crc32c=crc32c(document))
        for chunk in iter_chunks([document]):
            first.data = chunk
            yield first
            first = pb.GetTreeResponse()

    def FetchBlocks(
        self, request: pb.FetchBlocksRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.FetchBlocksResponse]:
        # docstring inherited
        raise _not_served_here()

    def PushUpdates(
        self, request_iterator: Iterator[pb.PushUpdatesRequest], context: grpc.ServicerContext
    ) -> pb.PushUpdatesResponse:
        # docstring inherited
        raise _not_served_here()

    def WatchBlocks(
        self, request: pb.WatchBlocksRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchBlocksResponse]:
        # docstring inherited
        raise _not_served_here()

    def GetSameHostDoor(
        self, request: pb.GetSameHostDoorRequest, context: grpc.ServicerContext
    ) -> pb.GetSameHostDoorResponse:
        # docstring inherited
        check_alive(context)
        return pb.GetSameHostDoorResponse()


class BlockServicer(BankInfoServicer):
    """Serves the blocks of one shard.

    Parameters
    ----------
    shard
        The shard.
    source
        What is known of the bank.
    budget
        Bound on payload bytes in flight, shared by all calls.
    max_watchers
        Most concurrent `WatchBlocks` calls; each holds a thread of the server.
    door
        Where callers on this machine are let in; None = nowhere.
    """

    def __init__(
        self,
        shard: ShardApi,
        source: BankSource,
        budget: ByteBudget,
        *,
        max_watchers: int = 16,
        door: SameHostDoor | None = None,
    ) -> None:
        super().__init__(source)
        self._door = door
        self._shard = shard
        self._budget = budget
        self._max_watchers = max_watchers
        self._watchers = threading.BoundedSemaphore(max_watchers)
        self._draining = threading.Event()

    def drain(self) -> None:
        """End the subscriptions, which would otherwise last as long as their callers."""
        self._draining.set()

    def GetSameHostDoor(
        self, request: pb.GetSameHostDoorRequest, context: grpc.ServicerContext
    ) -> pb.GetSameHostDoorResponse:
        # docstring inherited
        check_bank(request.bank, self._shard.spec)
        if self._door is None:
            return pb.GetSameHostDoorResponse()
        return self._door.show(current_principal.get())

    def FetchBlocks(
        self, request: pb.FetchBlocksRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.FetchBlocksResponse]:
        # docstring inherited
        spec = self._shard.spec
        check_bank(request.bank, spec)
        refs = _checked_refs(spec, convert.refs_from_pb(request.refs))
        held = _held_versions(request, len(refs))
        dtype = convert.dtype_from_pb(request.dtype)
        # What the caller holds is likely unchanged; asking for a large cache again must be cheap.
        wanted = [ref for ref, version in zip(refs, held, strict=True) if version is None]
        with self._budget.reserve(_weight_bytes(spec, wanted, dtype), what="fetch") as reservation:
            check_alive(context)
            result = self._shard.fetch(
                refs,
                held_versions=held,
                dtype=dtype,
                min_revision=request.min_revision,
                snapshot=request.snapshot,
            )
            reservation.resize(sum(block.header.num_bytes for block in result.blocks))
            for message in _fetch_messages(result):
                check_alive(context)
                yield message

    def PushUpdates(
        self, request_iterator: Iterator[pb.PushUpdatesRequest], context: grpc.ServicerContext
    ) -> pb.PushUpdatesResponse:
        # docstring inherited
        head = next(request_iterator, None)
        if head is None:
            raise InvalidArgumentError("the push is empty; its first message carries the headers")
        spec = self._shard.spec
        check_bank(head.bank, spec)
        _check_push(head, spec)
        with self._budget.reserve(0, what="push") as reservation:
            arrays = _receive_gradients(head, request_iterator, spec, reservation)
            update = Update(
                request_id=head.request_id,
                step=head.step,
                gradients=tuple(
                    Gradient(
                        ref=convert.ref_from_pb(header.ref),
                        base_version=header.base_version,
                        values=array,
                        crc32c=header.crc32c,
                    )
                    for header, array in zip(head.headers, arrays, strict=True)
                ),
                learning_rate_scale=(
                    head.learning_rate_scale if head.HasField("learning_rate_scale") else 1.0
                ),
            )
            # A caller that left will send the same request id again; do the work once, then.
            check_alive(context)
            result = self._shard.push(update)
        return pb.PushUpdatesResponse(
            results=[convert.result_to_pb(item) for item in result.results],
            duplicate=result.duplicate,
        )

    def WatchBlocks(
        self, request: pb.WatchBlocksRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchBlocksResponse]:
        # docstring inherited
        spec = self._shard.spec
        check_bank(request.bank, spec)
        refs = convert.refs_from_pb(request.refs)
        for ref in refs:
            spec.check_ref(ref)
        if not self._watchers.acquire(blocking=False):
            raise UnavailableError(
                f"{self._max_watchers} watchers are subscribed already; retry later",
                reason=Reason.OVERLOADED,
            )
        try:
            yield from self._watch(refs, request.admin_only, context)
        finally:
            self._watchers.release()

    def _watch(
        self, refs: tuple[BlockRef, ...], admin_only: bool, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchBlocksResponse]:
        subscription = self._shard.subscribe(refs, admin_only=admin_only)
        try:
            # Tells the caller that from now on nothing is missed.
            context.send_initial_metadata(((WATCH_ON_KEY, "1"),))
            while context.is_active() and not self._draining.is_set():
                events, num_dropped = subscription.next_events(_WATCH_WAIT_S)
                if events or num_dropped:
                    yield pb.WatchBlocksResponse(
                        events=[convert.event_to_pb(event) for event in events],
                        num_dropped=num_dropped,
                    )
        finally:
            subscription.close()
        raise UnavailableError("the shard is stopping; subscribe again at its new endpoint")


def check_bank(name: str, spec: BankSpec) -> None:
    """Raise `NotFoundError` unless `name` is empty or the name of the served bank."""
    if name and name != spec.name:
        raise NotFoundError(
            f"bank {name!r} is not served here; this service serves {spec.name!r}",
            reason=Reason.UNKNOWN_BANK,
            metadata={"bank": name, "served": spec.name},
        )


def _not_served_here() -> UnavailableError:
    return UnavailableError(
        "blocks are served by the shards; take their endpoints from GetBank",
        reason=Reason.NOT_OWNER,
    )


def _checked_refs(spec: BankSpec, refs: tuple[BlockRef, ...]) -> tuple[BlockRef, ...]:
    if len(refs) > MAX_REFS:
        raise InvalidArgumentError(
            f"{len(refs)} blocks in one request; at most {MAX_REFS} are accepted",
            reason=Reason.MESSAGE_TOO_LARGE,
        )
    for ref in refs:
        spec.check_ref(ref)
    return refs


def _held_versions(request: pb.FetchBlocksRequest, count: int) -> list[int | None]:
    held = request.held_version_plus_one
    if not held:
        return [None] * count
    if len(held) != count:
        raise InvalidArgumentError(
            f"held_version_plus_one has {len(held)} entries for {count} refs"
        )
    return [value - 1 if value else None for value in held]


def _weight_bytes(spec: BankSpec, refs: Sequence[BlockRef], dtype: str | None) -> int:
    itemsize = dtype_of(dtype or spec.dtype).itemsize
    return sum(spec.block_params(ref.level) for ref in refs) * itemsize


def _fetch_messages(result: FetchResult) -> Iterator[pb.FetchBlocksResponse]:
    headers = [convert.header_to_pb(block.header) for block in result.blocks]
    chunks = iter_chunks(block.weight for block in result.blocks if block.weight is not None)
    batches = [
        headers[start : start + _HEADERS_PER_MESSAGE]
        for start in range(0, len(headers), _HEADERS_PER_MESSAGE)
    ] or [[]]
    message = pb.FetchBlocksResponse(revision=result.revision)
    for batch in batches[:-1]:
        message.headers.extend(batch)
        yield message
        message = pb.FetchBlocksResponse()
    # The last headers share a message with the first bytes: a small fetch is one message.
    message.headers.extend(batches[-1])
    message.data = next(chunks, b"")
    yield message
    for chunk in chunks:
        yield pb.FetchBlocksResponse(data=chunk)


def _check_push(head: pb.PushUpdatesRequest, spec: BankSpec) -> None:
    if not head.request_id:
        raise InvalidArgumentError("a push needs a request id (UUID), so that a retry is harmless")
    scale = head.learning_rate_scale
    if not (math.isfinite(scale) and scale >= 0):
        raise InvalidArgumentError(f"learning_rate_scale is {scale}; accepted: finite and >= 0")
    if not head.headers:
        raise InvalidArgumentError("the push names no block in its first message")
    refs = [convert.ref_from_pb(header.ref) for header in head.headers]
    _checked_refs(spec, tuple(refs))
    if len(set(refs)) != len(refs):
        raise InvalidArgumentError("the push names a block twice; add its gradients first")


def _receive_gradients(
    head: pb.PushUpdatesRequest,
    rest: Iterator[pb.PushUpdatesRequest],
    spec: BankSpec,
    reservation: Reservation,
) -> list[Array]:
    payloads = []
    for header in head.headers:
        ref = convert.ref_from_pb(header.ref)
        expected = spec.block_params(ref.level) * dtype_of(_gradient_dtype(header)).itemsize
        if header.num_bytes != expected:
            raise InvalidArgumentError(
                f"gradient of block {ref} has {header.num_bytes} bytes; its shape "
                f"{spec.block_shape(ref.level)} takes {expected}",
                reason=Reason.BAD_SHAPE,
                metadata={"block": str(ref)},
            )
        payloads.append(
            Payload(num_bytes=header.num_bytes, crc32c=header.crc32c, what=f"gradient of {ref}")
        )
    total = sum(payload.num_bytes for payload in payloads)
    # Reserved before a byte is allocated.
    reservation.grow(total)
    assembler = PayloadAssembler(max_bytes=total)
    for payload in payloads:
        assembler.expect(payload)
    for data in _data_of(head, rest):
        assembler.feed(data)
    return [
        buffer.view(dtype_of(_gradient_dtype(header))).reshape(spec.block_shape(header.ref.level))
        for header, buffer in zip(head.headers, assembler.finish(), strict=True)
    ]


def _gradient_dtype(header: pb.UpdateHeader) -> str:
    dtype = convert.dtype_from_pb(header.dtype)
    if dtype is None:
        raise InvalidArgumentError("a gradient needs its dtype", reason=Reason.BAD_DTYPE)
    return dtype


def _data_of(head: pb.PushUpdatesRequest, rest: Iterator[pb.PushUpdatesRequest]) -> Iterator[bytes]:
    yield head.data
    for message in rest:
        if len(message.data) > 2 * CHUNK_BYTES:
            raise InvalidArgumentError(
                f"a message carries {len(message.data)} bytes; send chunks of {CHUNK_BYTES}",
                reason=Reason.MESSAGE_TOO_LARGE,
            )
        yield message.data
