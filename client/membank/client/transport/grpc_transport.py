"""The transport that speaks gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import TYPE_CHECKING

from membank.client.config import ClientConfig
from membank.client.transport.contract import (
    Connector,
    FetchAnswer,
    LayerListener,
    PushAnswer,
    SameHostDoor,
    WatchAnswer,
)
from membank.client.transport.data_calls import ChannelCalls, DataCalls
from membank.client.transport.data_port import DataPort
from membank.client.transport.direct_calls import DirectCalls, DirectStats
from membank.client.transport.grpc_admin import GrpcAdminTransport
from membank.client.transport.grpc_channel import GrpcChannel
from membank.client.transport.landing import Landing
from membank.client.transport.layered_landing import LayeredLanding
from membank.client.transport.payloads import read_document
from membank.client.transport.requests import fetch_request
from membank.v1 import block_service_pb2 as block_pb
from membank.v1.block_service_pb2_grpc import BlockServiceStub
from membank.wire.buffers import BufferPool
from membank.wire.convert import event_from_pb, info_from_pb, ref_to_pb
from membank.wire.framing import WATCH_ON_KEY
from membank.wire.records import BankInfo, Update
from membank.wire.spec import Array, BlockRef

if TYPE_CHECKING:
    # The stubs alone know it.
    from membank.v1.block_service_pb2_grpc import BlockServiceAsyncStub


class GrpcTransport(GrpcAdminTransport):
    """A connection to one endpoint over gRPC; belongs to the event loop that it was made in.

    Parameters
    ----------
    endpoint
        Address, ``host:port``.
    config
        Bank, limits, TLS and credentials.
    pool
        Where fetched blocks land; None = one of this connection's own.

    Raises
    ------
    InvalidArgumentError
        If the endpoint is no ``host:port``.
    FailedPreconditionError
        If a credential would be sent over the network without TLS, or a file cannot be read.
    """

    def __init__(
        self, endpoint: str, config: ClientConfig, *, pool: BufferPool | None = None
    ) -> None:
        channel = GrpcChannel(endpoint, config)
        super().__init__(channel, config)
        self._blocks: BlockServiceAsyncStub = BlockServiceStub(channel.channel)
        self._pool = pool or BufferPool(config.pooled_bytes)
        data_port = DataPort()
        self._calls: DataCalls = ChannelCalls(
            channel, max_answer_bytes=config.max_answer_bytes, data_port=data_port
        )
        self._direct: DirectCalls | None = None
        if config.max_data_connections:
            self._calls = self._direct = DirectCalls(endpoint, config, self._calls, data_port)

    @property
    def direct_stats(self) -> DirectStats:
        """How many calls passed grpcio by, and why others did not."""
        if self._direct is None:
            return DirectStats()
        return self._direct.stats

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Close all connections; calls that still run have `grace_s` seconds to end."""
        await asyncio.gather(self._calls.close(grace_s=grace_s), super().close(grace_s=grace_s))

    async def get_bank(self, *, timeout_s: float) -> BankInfo:
        """Return spec, revision and placement."""
        call = self._blocks.GetBank(
            block_pb.GetBankRequest(bank=self._bank),
            timeout=timeout_s,
            metadata=self._channel.metadata,
        )
        return info_from_pb(await self._channel.unary("GetBank", call))

    async def get_tree(self, *, timeout_s: float) -> bytes:
        """Return the tree document."""
        call = self._blocks.GetTree(
            block_pb.GetTreeRequest(bank=self._bank),
            timeout=timeout_s,
            metadata=self._channel.metadata,
        )
        return await read_document(
            self._channel.stream("GetTree", call),
            max_bytes=self._max_answer_bytes,
            where=self._channel.endpoint,
        )

    async def get_same_host_door(self, *, timeout_s: float) -> SameHostDoor | None:
        """Return where shared memory is to be had; None = nowhere."""
        call = self._blocks.GetSameHostDoor(
            block_pb.GetSameHostDoorRequest(bank=self._bank),
            timeout=timeout_s,
            metadata=self._channel.metadata,
        )
        answer = await self._channel.unary("GetSameHostDoor", call)
        if not answer.socket_name:
            return None
        return SameHostDoor(
            boot_id=answer.boot_id, socket_name=answer.socket_name, ticket=answer.ticket
        )

    async def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held_versions: Sequence[int | None] | None = None,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
        into: Mapping[BlockRef, Array] | None = None,
        timeout_s: float,
    ) -> FetchAnswer:
        """Return blocks of one revision, at least `min_revision`, or of a snapshot."""
        request = fetch_request(
            refs,
            bank=self._bank,
            held_versions=held_versions,
            dtype=dtype,
            min_revision=min_revision,
            snapshot=snapshot,
        )
        landing = Landing(self._pool, into)
        return await self._calls.fetch(request, refs, landing, timeout_s=timeout_s)

    async def fetch_layers(
        self,
        refs: Sequence[BlockRef],
        listener: LayerListener,
        *,
        layers_per_part: int,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
        into: Mapping[BlockRef, Array] | None = None,
        timeout_s: float,
    ) -> None:
        """Fetch blocks layer by layer."""
        request = fetch_request(
            refs,
            bank=self._bank,
            held_versions=None,
            dtype=dtype,
            min_revision=min_revision,
            snapshot=snapshot,
            layers_per_part=layers_per_part,
        )
        landing = LayeredLanding(
            self._pool,
            into,
            listener,
            max_bytes=self._max_answer_bytes,
            where=self._channel.endpoint,
        )
        await self._calls.fetch(request, refs, landing, timeout_s=timeout_s)

    async def push(self, update: Update, *, timeout_s: float) -> PushAnswer:
        """Apply gradients."""
        return await self._calls.push(update, bank=self._bank, timeout_s=timeout_s)

    async def watch(
        self, refs: Sequence[BlockRef], *, admin_only: bool
    ) -> AsyncGenerator[WatchAnswer]:
        """Yield changes until it is closed; the first answer says that the watch is on."""
        request = block_pb.WatchBlocksRequest(
            bank=self._bank, refs=map(ref_to_pb, refs), admin_only=admin_only
        )
        # No deadline: the keepalive ends a watch whose other end is gone.
        call = self._blocks.WatchBlocks(request, metadata=self._channel.metadata)
        try:
            # A shard sends this as soon as the subscription is on; a call that failed sends none.
            metadata = await self._channel.unary("WatchBlocks", call.initial_metadata())
            # Not by `dict`: before grpcio 1.80 the keys of this mapping were its items.
            if any(key == WATCH_ON_KEY for key, _ in metadata):
                yield WatchAnswer(events=())
            async for message in self._channel.stream("WatchBlocks", call):
                yield WatchAnswer(
                    events=tuple(map(event_from_pb, message.events)),
                    num_dropped=message.num_dropped,
                )
        finally:
            call.cancel()


def grpc_connector(config: ClientConfig) -> Connector:
    """Return what connects to endpoints over gRPC with `config`."""
    pool = BufferPool(config.pooled_bytes)

    def connect(endpoint: str) -> GrpcTransport:
        return GrpcTransport(endpoint, config, pool=pool)

    return connect
