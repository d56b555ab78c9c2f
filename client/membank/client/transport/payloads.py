"""Payload streams from the client's side: requests cut into chunks, answers put together."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from membank.client.transport.contract import FetchAnswer, PackInfo
from membank.client.transport.landing import Landing
from membank.client.transport.requests import dtype_name, push_head
from membank.v1 import admin_service_pb2 as admin_pb
from membank.v1 import block_service_pb2 as block_pb
from membank.wire.codec import FETCH_CODECS
from membank.wire.convert import header_from_pb, step_to_pb
from membank.wire.crc import crc32c
from membank.wire.data_messages import DataCodec, data_of
from membank.wire.errors import CorruptionError, InvalidArgumentError, Reason
from membank.wire.framing import (
    CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    Payload,
    PayloadAssembler,
    iter_chunks,
    iter_parts,
)
from membank.wire.http2.messages import framed
from membank.wire.http2.pieces import Piece
from membank.wire.records import BlockHeader, Update
from membank.wire.spec import DTYPES, BlockRef, BlockState
from membank.wire.steps import Step, Swap

FETCH_DATA = DataCodec(block_pb.FetchBlocksResponse)
"""Messages of an answer to a fetch."""
PUSH_DATA = DataCodec(block_pb.PushUpdatesRequest)
"""Messages of a push."""


def push_requests(update: Update, *, bank: str) -> Iterator[block_pb.PushUpdatesRequest | bytes]:
    """Return the messages of a push, for `PUSH_DATA`: headers, then data.

    The first one is made at once: gRPC turns an error of a request iterator into a cancellation.
    """
    arrays = [np.ascontiguousarray(gradient.values) for gradient in update.gradients]
    head = push_head(update, list(map(crc32c, arrays)), bank=bank)
    return chain([head], map(PUSH_DATA.encode, iter_parts(arrays)))


def push_pieces(update: Update, *, bank: str) -> list[Piece]:
    """Return the messages of a push as gRPC frames them, in pieces; gradients where they lie."""
    arrays = [np.ascontiguousarray(gradient.values) for gradient in update.gradients]
    head = push_head(update, list(map(crc32c, arrays)), bank=bank)
    pieces = framed([head.SerializeToString()])
    for parts in iter_parts(arrays):
        pieces += framed(PUSH_DATA.pieces(parts))
    return pieces


def transaction_requests(
    steps: Sequence[Step], *, bank: str, request_id: str, dry_run: bool
) -> Iterator[admin_pb.ApplyTransactionRequest]:
    """Return the messages of a transaction, as `push_requests` does.

    Raises
    ------
    InvalidArgumentError
        If an element type does not travel (BAD_DTYPE), or the steps are too many for one message.
    """
    sent = [_contiguous(step) if isinstance(step, Swap) else step for step in steps]
    head = admin_pb.ApplyTransactionRequest(
        bank=bank, request_id=request_id, steps=map(step_to_pb, sent), dry_run=dry_run
    )
    if head.ByteSize() > MAX_MESSAGE_BYTES:
        raise InvalidArgumentError(
            f"{len(sent)} steps take {head.ByteSize()} bytes without content; at most "
            f"{MAX_MESSAGE_BYTES} are sent: split the transaction",
            reason=Reason.MESSAGE_TOO_LARGE,
            metadata={"max_bytes": str(MAX_MESSAGE_BYTES)},
        )
    weights = [step.weight for step in sent if isinstance(step, Swap)]
    data = (admin_pb.ApplyTransactionRequest(data=chunk) for chunk in iter_chunks(weights))
    return chain([head], data)


def _contiguous(step: Swap) -> Swap:
    dtype_name(step.weight)
    return replace(step, weight=np.ascontiguousarray(step.weight))


async def import_requests(
    head: admin_pb.ImportTopicRequest, pack: BinaryIO | None, *, failures: list[OSError]
) -> AsyncIterator[admin_pb.ImportTopicRequest]:
    """Yield the messages of an import; reads `pack` (None = none) twice from its present position.

    gRPC turns an error of a request iterator into a cancellation, so one of reading is left in
    `failures` for the caller to raise.
    """
    if pack is None:
        yield head
        return
    try:
        start, num_bytes, crc = pack.tell(), 0, 0
        while chunk := await asyncio.to_thread(pack.read, CHUNK_BYTES):
            num_bytes, crc = num_bytes + len(chunk), crc32c(chunk, start=crc)
        head.num_bytes, head.crc32c = num_bytes, crc
        yield head
        pack.seek(start)
        while chunk := await asyncio.to_thread(pack.read, CHUNK_BYTES):
            yield admin_pb.ImportTopicRequest(data=chunk)
    except OSError as err:
        failures.append(err)
        raise


class FetchedPayloads:
    """Puts the answer to a fetch together, each block where `landing` says.

    Parameters
    ----------
    refs
        Blocks that were asked for.
    landing
        Where to.
    max_bytes
        Most bytes that the answer may have.
    where
        Who answers, for errors.

    Notes
    -----
    Every method raises `CorruptionError` if bytes are damaged or missing, or the answer is not one
    to these refs, and `InvalidArgumentError` if it would have more than `max_bytes`.
    """

    def __init__(
        self, refs: Sequence[BlockRef], landing: Landing, *, max_bytes: int, where: str
    ) -> None:
        self._refs = refs
        self._landing = landing
        self._where = where
        self._assembler = PayloadAssembler(max_bytes=max_bytes)
        self._headers: list[BlockHeader] = []
        self._revision: int | None = None
        landing.begin()

    def take(self, message: block_pb.FetchBlocksResponse | memoryview) -> None:
        """Take the next message of the answer, or its data where it has nothing else."""
        if not isinstance(message, memoryview):
            self._revision = message.revision if self._revision is None else self._revision
            for header in map(header_from_pb, message.headers):
                check_header(header, where=self._where)
                self._headers.append(header)
                self._expect(header, self._revision)
        _feed(self._assembler, data_of(message), where=self._where)

    def room(self, max_bytes: int) -> list[memoryview]:
        """Return where the next data are to land, as `PayloadAssembler.room` does."""
        try:
            return self._assembler.room(max_bytes)
        except InvalidArgumentError as err:
            raise malformed(self._where, err.message) from err

    def landed(self, num_bytes: int) -> None:
        """Say that the next `num_bytes` are where `room` put them."""
        self._assembler.landed(num_bytes)

    def finish(self) -> FetchAnswer:
        """Check everything and return the answer."""
        payloads = iter(_finish(self._assembler, where=self._where))
        blocks = self._landing.blocks(
            [(header, next(payloads) if header.num_bytes else None) for header in self._headers]
        )
        if [block.ref for block in blocks] != list(self._refs):
            problem = f"{len(blocks)} blocks for {len(self._refs)} that were asked for"
            raise malformed(self._where, problem)
        return FetchAnswer(revision=self._revision or 0, blocks=blocks)

    def _expect(self, header: BlockHeader, revision: int) -> None:
        if header.num_layers and not self._landing.takes_parts:
            raise malformed(self._where, f"a part of block {header.ref}, which nobody asked for")
        arrived = self._landing.when_arrived(header, revision)
        if not header.num_bytes:
            if arrived is not None:
                arrived()
            return
        what = f"{self._where}: block {header.ref}"
        if header.num_layers:
            what += f", layers {header.first_layer} to {header.first_layer + header.num_layers - 1}"
        payload = Payload(header.num_bytes, header.crc32c, what)
        place = partial(self._landing.place, header)
        self._assembler.expect(payload, place, when_whole=arrived)


async def read_document(
    messages: AsyncIterator[block_pb.GetTreeResponse], *, max_bytes: int, where: str
) -> bytes:
    """Put the tree document together; errors as of `FetchedPayloads`."""
    assembler = PayloadAssembler(max_bytes=max_bytes)
    is_first = True
    async for message in messages:
        if is_first:
            what = f"{where}: tree document"
            assembler.expect(Payload(message.num_bytes, message.crc32c, what))
            is_first = False
        if message.data:
            _feed(assembler, message.data, where=where)
    if is_first:
        raise malformed(where, "it is empty")
    return _finish(assembler, where=where)[0].tobytes()


async def write_pack(
    messages: AsyncIterator[admin_pb.ExportTopicResponse], target: BinaryIO, *, where: str
) -> PackInfo:
    """Write an exported pack to `target` as it comes; errors as of `FetchedPayloads`."""
    head: admin_pb.ExportTopicResponse | None = None
    written = crc = 0
    async for message in messages:
        head = head or message
        if message.data:
            written, crc = written + len(message.data), crc32c(message.data, start=crc)
            await asyncio.to_thread(target.write, message.data)
    if head is None or written != head.num_bytes:
        raise malformed(where, f"the pack ended after {written} bytes")
    if crc != head.crc32c:
        raise CorruptionError(
            f"{where}: the pack has CRC-32C {crc:08x}, announced was {head.crc32c:08x}; "
            "discard it and export again"
        )
    return PackInfo(num_bytes=written, crc32c=crc, revision=head.revision)


async def read_pack_head(
    messages: AsyncIterator[admin_pb.ExportTopicResponse], *, where: str
) -> PackInfo:
    """Return what is said of a pack that stays with the bank; errors as of `FetchedPayloads`."""
    head: admin_pb.ExportTopicResponse | None = None
    async for message in messages:
        head = head or message
    if head is None:
        raise malformed(where, "it is empty")
    return PackInfo(num_bytes=head.num_bytes, crc32c=head.crc32c, revision=head.revision)


def _feed(assembler: PayloadAssembler, data: bytes | memoryview, *, where: str) -> None:
    try:
        assembler.feed(data)
    except InvalidArgumentError as err:
        raise malformed(where, err.message) from err


def _finish(assembler: PayloadAssembler, *, where: str) -> list[npt.NDArray[np.uint8]]:
    try:
        return assembler.finish()
    except InvalidArgumentError as err:
        raise malformed(where, err.message) from err


def check_header(header: BlockHeader, *, where: str) -> None:
    """Raise `CorruptionError` unless a block's size is that of its shape."""
    codec = FETCH_CODECS.get(header.dtype)
    shape = header.shape
    if header.num_layers:
        # Layers of an encoding are no part of its payload.
        codec = codec if header.dtype in DTYPES and shape else None
        shape = (header.num_layers, *shape[1:])
    announced = None if codec is None else codec.num_bytes(math.prod(shape))
    travels = header.state is BlockState.ACTIVE and not header.unchanged
    if header.num_bytes != (announced if travels else 0):
        raise malformed(
            where, f"block {header.ref} of shape {header.shape} has {header.num_bytes} bytes"
        )


def malformed(where: str, problem: str) -> CorruptionError:
    """Return the error of an answer that says what cannot be."""
    # The service's fault, not an argument of the caller's.
    return CorruptionError(
        f"{where}: the answer is malformed: {problem}", metadata={"endpoint": where}
    )
