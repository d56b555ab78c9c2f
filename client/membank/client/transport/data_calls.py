"""The seam that the data path over gRPC goes through: grpcio's streams, or ones that pass it by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from membank.client.inline import require_loop
from membank.client.transport.contract import FetchAnswer, PushAnswer
from membank.client.transport.data_port import DataPort
from membank.client.transport.grpc_channel import GrpcChannel
from membank.client.transport.landing import Landing
from membank.client.transport.payloads import FETCH_DATA, PUSH_DATA, FetchedPayloads, push_requests
from membank.client.transport.requests import push_answer
from membank.v1 import block_service_pb2 as block_pb
from membank.wire.alternative import ALTERNATIVE_KEY, Alternative
from membank.wire.records import Update
from membank.wire.spec import BlockRef


class DataCalls(Protocol):
    """Makes the calls of the data path to one endpoint; belongs to the event loop it was made in."""

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

    async def push(self, update: Update, *, bank: str, timeout_s: float) -> PushAnswer:
        """Apply gradients.

        Parameters
        ----------
        update
            The push; not changed before this returns.
        bank
            Name of the bank; "" = the one that is served.
        timeout_s
            Seconds that it may last.

        Raises
        ------
        MembankError
            As for `fetch`. Where no service answered, the push may or may not have been applied;
            the same one again, with its request id, is harmless.
        """

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Give connections up; calls that still run have `grace_s` seconds to end."""


class ChannelCalls:
    """Calls over grpcio.

    Parameters
    ----------
    channel
        The channel; closed by whoever made it.
    max_answer_bytes
        Most bytes of an answer.
    data_port
        Hears of the endpoint's port for data.
    """

    def __init__(self, channel: GrpcChannel, *, max_answer_bytes: int, data_port: DataPort) -> None:
        self._channel = channel
        self._max_answer_bytes = max_answer_bytes
        self._data_port = data_port
        # Their data pass the generated code by.
        self._fetch_blocks = channel.channel.unary_stream(
            "/membank.v1.BlockService/FetchBlocks",
            request_serializer=block_pb.FetchBlocksRequest.SerializeToString,
            response_deserializer=FETCH_DATA.deserialize,
        )
        self._push_updates = channel.channel.stream_unary(
            "/membank.v1.BlockService/PushUpdates",
            request_serializer=PUSH_DATA.serialize,
            response_deserializer=block_pb.PushUpdatesResponse.FromString,
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
        call = self._fetch_blocks(request, timeout=timeout_s, metadata=self._channel.metadata)
        async for message in self._channel.stream("FetchBlocks", call):
            payloads.take(message)
        return payloads.finish()

    async def push(self, update: Update, *, bank: str, timeout_s: float) -> PushAnswer:
        """Apply gradients."""
        require_loop()
        call = self._push_updates(
            push_requests(update, bank=bank),
            timeout=timeout_s,
            metadata=self._channel.metadata,
        )
        answer = push_answer(await self._channel.upload("PushUpdates", call))
        # Not by `dict`: before grpcio 1.80 the keys of this mapping were its items.
        for key, value in await self._channel.unary("PushUpdates", call.initial_metadata()):
            if key == ALTERNATIVE_KEY:
                self._learn(str(value))
        return answer

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Do nothing: the channel ends the calls."""

    def _learn(self, value: str) -> None:
        told = Alternative.of_header(value, is_secured=self._channel.is_secured)
        if told is not None:
            self._data_port.told(told)
