"""A push, whoever sends it: over gRPC, over a data connection, or on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.requests import push_bytes, read_push, update_of
from membank.bank_service.shard.contract import ShardApi
from membank.v1 import block_service_pb2 as pb
from membank.wire import convert
from membank.wire.buffers import BufferPool
from membank.wire.codec import Bytes
from membank.wire.data_messages import DataCodec, data_of
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.framing import CHUNK_BYTES, Payload, PayloadAssembler
from membank.wire.spec import Array

PUSH_DATA = DataCodec(pb.PushUpdatesRequest)
"""Messages of a push."""

POOLED_BYTES = 256 << 20
"""Memory kept for gradients to land in; far more are rarely received at a time."""


class IncomingPush:
    """A push whose bytes are reserved; made by `reserved`.

    Parameters
    ----------
    head
        Its first message.
    payloads
        What that announces.
    shard
        Who applies it.
    gradients
        Memory for its gradients.
    """

    def __init__(
        self,
        head: pb.PushUpdatesRequest,
        payloads: Sequence[Payload],
        shard: ShardApi,
        gradients: BufferPool,
    ) -> None:
        self.head = head
        """Its first message."""
        self.payloads = payloads
        """What is announced of each gradient."""
        self._shard = shard
        self._gradients = gradients

    def take_buffer(self, num_bytes: int) -> Bytes:
        """Return memory for a gradient, (num_bytes,) uint8."""
        return self._gradients.take(num_bytes)

    def apply(self, buffers: Sequence[Bytes]) -> pb.PushUpdatesResponse:
        """Apply the gradients.

        Parameters
        ----------
        buffers
            Bytes of each, flat uint8, with the CRC that is announced.

        Returns
        -------
        PushUpdatesResponse
            The answer.

        Raises
        ------
        MembankError
            What `update_of` and the shard raise.
        """
        update = update_of(self.head, buffers, self._shard.spec, self.take_buffer)
        result = self._shard.push(update)
        for item, gradient, buffer in zip(result.results, update.gradients, buffers, strict=True):
            if item.reason is Reason.BLOCK_DELETED:
                # It may have come after the wiping of pools that ended the removal.
                _wipe(buffer)
                _wipe(gradient.values)
        return pb.PushUpdatesResponse(
            results=[convert.result_to_pb(item) for item in result.results],
            duplicate=result.duplicate,
        )


def _wipe(array: Array) -> None:
    if array.flags.writeable:
        array.fill(0)


class StreamedGradients:
    """Puts the gradients of a push together from its messages, where they are to be applied from.

    Parameters
    ----------
    push
        The push.
    """

    def __init__(self, push: IncomingPush) -> None:
        self._assembler = PayloadAssembler(max_bytes=sum(p.num_bytes for p in push.payloads))
        for payload in push.payloads:
            self._assembler.expect(payload, partial(push.take_buffer, payload.num_bytes))

    def take(self, message: pb.PushUpdatesRequest | memoryview) -> None:
        """Take the next message, the first one included, or its data where it has nothing else.

        Raises
        ------
        InvalidArgumentError
            If it carries too much, or all together more than was announced.
        """
        data = data_of(message)
        if len(data) > 2 * CHUNK_BYTES:
            raise InvalidArgumentError(
                f"a message carries {len(data)} bytes; send chunks of {CHUNK_BYTES}",
                reason=Reason.MESSAGE_TOO_LARGE,
            )
        self._assembler.feed(data)

    def room(self, max_bytes: int) -> list[memoryview]:
        """Return where the next data are to land, as `PayloadAssembler.room` does."""
        return self._assembler.room(max_bytes)

    def landed(self, num_bytes: int) -> None:
        """Say that the next `num_bytes` are where `room` put them."""
        self._assembler.landed(num_bytes)

    def finish(self) -> list[Bytes]:
        """Return the bytes of each gradient; errors as of `PayloadAssembler.finish`."""
        return self._assembler.finish()


@contextmanager
def reserved(
    first: pb.PushUpdatesRequest | memoryview | None,
    shard: ShardApi,
    budget: ByteBudget,
    gradients: BufferPool,
) -> Iterator[IncomingPush]:
    """Check what a push announces; its bytes count as in flight for as long as the context lasts.

    Parameters
    ----------
    first
        Its first message; None = it has none.
    shard
        Who is to apply it.
    budget
        Bound on bytes in flight.
    gradients
        Memory for its gradients.

    Raises
    ------
    MembankError
        What `read_push` and the budget raise; `InvalidArgumentError` if the headers do not come
        first.
    """
    if first is None:
        raise InvalidArgumentError("the push is empty; its first message carries the headers")
    if isinstance(first, memoryview):
        raise InvalidArgumentError("the push begins with data; headers come first")
    payloads = read_push(first, shard.spec)
    # Reserved before a byte is allocated.
    with budget.reserve(push_bytes(first, shard.spec), what="push"):
        yield IncomingPush(first, payloads, shard, gradients)
