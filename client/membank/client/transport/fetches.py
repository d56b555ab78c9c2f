"""The seam that a fetch over gRPC goes through: grpcio's stream, or one that passes it by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from membank.client.inline import require_loop
from membank.client.transport.contract import FetchAnswer
from membank.client.transport.grpc_channel import GrpcChannel
from membank.client.transport.landing import Landing
from membank.client.transport.payloads import FETCH_DATA, FetchedPayloads
from membank.v1 import block_service_pb2 as block_pb
from membank.wire.spec import BlockRef


class Fetches(Protocol):
    """Makes `FetchBlocks` calls to one endpoint; belongs to the event loop that it was made in."""

    async def fetch(
        self,
        request: block_pb.FetchBlocksRequest,
        refs: Sequence[BlockRef],
        landing: Landing,
        *,
        timeout_s: float,
    ) -> FetchAnswer:
        """Return blocks of one revision.

        Parameters
        ----------
        request
            What to fetch.
        refs
            Its blocks.
        landing
            Where to.
        timeout_s
            Seconds that it may last.

        Raises
        ------
        MembankError
            What the service raised, or the nearest leaf where the call failed on the way;
            `CorruptionError` if what came is damaged.
        """

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Give connections up; calls that still run have `grace_s` seconds to end."""


class ChannelFetches:
    """Fetches over grpcio.

    Parameters
    ----------
    channel
        The channel; closed by whoever made it.
    max_answer_bytes
        Most bytes of an answer.
    """

    def __init__(self, channel: GrpcChannel, *, max_answer_bytes: int) -> None:
        self._channel = channel
        self._max_answer_bytes = max_answer_bytes
        # Its data pass the generated code by.
        self._method = channel.channel.unary_stream(
            "/membank.v1.BlockService/FetchBlocks",
            request_serializer=block_pb.FetchBlocksRequest.SerializeToString,
            response_deserializer=FETCH_DATA.deserialize,
        )

    async def fetch(
        self,
        request: block_pb.FetchBlocksRequest,
        refs: Sequence[BlockRef],
        landing: Landing,
        *,
        timeout_s: float,
    ) -> FetchAnswer:
        """Return blocks of one revision."""
        require_loop()
        payloads = FetchedPayloads(
            refs, landing, max_bytes=self._max_answer_bytes, where=self._channel.endpoint
        )
        call = self._method(request, timeout=timeout_s, metadata=self._channel.metadata)
        async for message in self._channel.stream("FetchBlocks", call):
            payloads.take(message)
        return payloads.finish()

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Do nothing: the channel ends the calls."""
