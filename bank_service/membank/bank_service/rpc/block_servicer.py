"""The data path over gRPC: a thin skin around a shard."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import chain
from typing import Protocol

import grpc

from membank.bank_service.rpc.auth import current_principal
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.fetching import answer_messages, fetched
from membank.bank_service.rpc.interceptor import check_alive
from membank.bank_service.rpc.pushing import POOLED_BYTES, StreamedGradients, reserved
from membank.bank_service.rpc.requests import check_bank
from membank.bank_service.rpc.same_host import SameHostDoor
from membank.bank_service.shard.contract import ShardApi
from membank.v1 import block_service_pb2 as pb
from membank.v1.block_service_pb2_grpc import BlockServiceServicer
from membank.wire import convert
from membank.wire.alternative import ALTERNATIVE_KEY
from membank.wire.buffers import BufferPool
from membank.wire.crc import crc32c
from membank.wire.errors import Reason, UnavailableError
from membank.wire.framing import WATCH_ON_KEY, iter_chunks
from membank.wire.records import BankInfo
from membank.wire.spec import BlockRef

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
    alternative
        What callers are told of another port for data (`membank.wire.alternative`); None = nothing.
    gradients
        Memory for gradients; None = of its own.
    """

    def __init__(
        self,
        shard: ShardApi,
        source: BankSource,
        budget: ByteBudget,
        *,
        max_watchers: int = 16,
        door: SameHostDoor | None = None,
        alternative: str | None = None,
        gradients: BufferPool | None = None,
    ) -> None:
        super().__init__(source)
        self._door = door
        self._alternative = alternative
        self._shard = shard
        self._budget = budget
        self._max_watchers = max_watchers
        self._watchers = threading.BoundedSemaphore(max_watchers)
        self._draining = threading.Event()
        self._gradients = gradients or BufferPool(POOLED_BYTES)

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

    def FetchBlocks(  # type: ignore[override]  # messages come serialized (`PayloadInterceptor`)
        self, request: pb.FetchBlocksRequest, context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        # docstring inherited
        check_alive(context)
        with fetched(request, self._shard, self._budget) as result:
            self._tell(context)
            for pieces in answer_messages(result, layers_per_part=request.layers_per_part):
                check_alive(context)
                yield b"".join(pieces)

    def PushUpdates(
        self,
        request_iterator: Iterator[pb.PushUpdatesRequest | memoryview],
        context: grpc.ServicerContext,
    ) -> pb.PushUpdatesResponse:
        """Apply gradients; messages of payload alone arrive as views (`PayloadInterceptor`)."""
        first = next(request_iterator, None)
        with reserved(first, self._shard, self._budget, self._gradients) as push:
            gradients = StreamedGradients(push)
            for message in chain([push.head], request_iterator):
                gradients.take(message)
            buffers = gradients.finish()
            # A caller that left will send the same request id again; do the work once, then.
            check_alive(context)
            self._tell(context)
            return push.apply(buffers)

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

    def _tell(self, context: grpc.ServicerContext) -> None:
        """Tell the caller of the port for data, if there is one."""
        if self._alternative is not None:
            context.send_initial_metadata(((ALTERNATIVE_KEY, self._alternative),))

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


def _not_served_here() -> UnavailableError:
    return UnavailableError(
        "blocks are served by the shards; take their endpoints from GetBank",
        reason=Reason.NOT_OWNER,
    )
