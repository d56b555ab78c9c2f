"""Fetches whose first layers are used while the others are still on their way."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from membank.client.admin.calls import GatewayCalls
from membank.client.blocks import ShardedBlocks
from membank.client.checks import check_answer_bytes
from membank.client.deadline import Deadline
from membank.client.memory import FetchedBlocks
from membank.client.retrying import is_retryable
from membank.client.streaming.board import LayerBoard, RevisionsDifferError
from membank.client.streaming.layers import AsyncLayeredMemory
from membank.client.transport.landing import CallerBuffers
from membank.wire.errors import FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.records import Block
from membank.wire.spec import DTYPES, Array, BankSpec, BlockRef

_LEAVE_S = 1.0
"""Time for an answer whose last layer has come to end by itself, so that its connection can be used
again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """A stream that was asked for, checked."""

    refs: tuple[BlockRef, ...]
    layers_per_part: int
    dtype: str
    into: Mapping[BlockRef, Array]
    snapshot: str


class StreamingCalls(GatewayCalls):
    """The part of `AsyncBankClient` that fetches layer by layer."""

    @abstractmethod
    async def fetch_blocks(
        self,
        refs: Iterable[BlockRef],
        *,
        dtype: str | None = None,
        held: Mapping[BlockRef, Block] | None = None,
        into: Mapping[BlockRef, Array] | None = None,
        snapshot: str | None = None,
        timeout_s: float | None = None,
    ) -> FetchedBlocks:
        """Fetch blocks whole."""

    @abstractmethod
    def _note_answer(self, snapshot: str, revision: int) -> None:
        """Take note of the revision of an answer; called from any thread."""

    @asynccontextmanager
    async def stream(
        self,
        path: Sequence[BlockRef],
        *,
        layers_per_part: int = 1,
        dtype: str | None = None,
        into: Mapping[BlockRef, Array] | None = None,
        snapshot: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[AsyncLayeredMemory]:
        """Fetch the blocks of a path layer by layer, to use the first ones while others travel.

        The blocks are those that `fetch` returns, and of one revision. Entering waits for nothing;
        the memory does, layer by layer. Until the first layers have come, calls are made again
        as for `fetch`. After that versions are known and layers used, so an error is final.

        From a shard on this machine nothing travels, and with ``config.cache`` blocks come through
        the cache: both have all layers at once, as have shards that answer from different
        revisions, one of which must be asked again.

        Parameters
        ----------
        path
            Blocks, usually from `route`.
        layers_per_part
            Layers that travel together and become usable together, >= 1.
        dtype
            Element type to get: float32, bfloat16 or float16; None = as kept in the bank. Not
            ``int8``, whose payload is not cut by layers.
        into
            As for `fetch_blocks`.
        snapshot
            As for `fetch`.
        timeout_s
            Deadline of the last layer, however slowly layers are used.

        Yields
        ------
        AsyncLayeredMemory
            The layers. When the context ends, what has not come is given up; what has stays.

        Raises
        ------
        NotFoundError
            If one is no block of the bank.
        InvalidArgumentError
            If `layers_per_part`, the dtype or a buffer is wrong, or the answer would exceed
            ``config.max_answer_bytes``.
        """
        deadline = self._session.deadline(timeout_s)
        spec = await self._session.spec(deadline)
        wanted = _Wanted(
            refs=tuple(dict.fromkeys(BlockRef(*ref) for ref in path)),
            layers_per_part=layers_per_part,
            dtype=dtype or spec.dtype,
            into=into or {},
            snapshot=self._session.config.snapshot if snapshot is None else snapshot,
        )
        _check(wanted, spec)
        check_answer_bytes(
            spec, wanted.refs, wanted.dtype, max_bytes=self._session.config.max_answer_bytes
        )
        buffers = CallerBuffers(spec, wanted.into, wanted.refs, wanted.dtype)
        board = LayerBoard(
            spec, wanted.refs, lambda revision: self._note_answer(wanted.snapshot, revision)
        )
        receiving = asyncio.create_task(
            self._receive(board, wanted, spec, buffers.arrays, deadline), name="membank-stream"
        )
        try:
            yield AsyncLayeredMemory(board)
        finally:
            await _ended(receiving, board)

    async def _receive(
        self,
        board: LayerBoard,
        wanted: _Wanted,
        spec: BankSpec,
        into: Mapping[BlockRef, Array],
        deadline: Deadline,
    ) -> None:
        """Fill the board; what keeps that from happening is told to those who wait."""
        try:
            if wanted.refs and self._session.config.cache is None:
                # Where revisions differ, nothing is shown, and whole blocks are asked for until
                # they agree.
                with suppress(RevisionsDifferError):
                    await self._receive_layers(board, wanted, spec, into, deadline)
            if board.is_settled:
                return
            fetched = await self.fetch_blocks(
                wanted.refs,
                dtype=wanted.dtype,
                into=wanted.into,
                snapshot=wanted.snapshot,
                timeout_s=deadline.remaining_s("stream"),
            )
            board.fill(fetched)
        except asyncio.CancelledError:
            board.fail(FailedPreconditionError("the stream was left before this layer had come"))
            raise
        except Exception as err:
            board.fail(err)

    async def _receive_layers(
        self,
        board: LayerBoard,
        wanted: _Wanted,
        spec: BankSpec,
        into: Mapping[BlockRef, Array],
        deadline: Deadline,
    ) -> None:
        shards = self._session.shards
        blocks = ShardedBlocks(shards, spec, self._session.config)

        async def attempt(timeout_s: float) -> None:
            # All of an earlier attempt, before any answer of this one: the two must not be mixed.
            board.part(wanted.refs).restart()
            async with asyncio.TaskGroup() as calls:
                for endpoint, group in shards.group(wanted.refs, spec).items():
                    for part in blocks.parts(group, wanted.dtype):
                        call = shards.transport(endpoint).fetch_layers(
                            part,
                            board.part(part),
                            layers_per_part=min(wanted.layers_per_part, spec.num_layers),
                            dtype=wanted.dtype,
                            min_revision=self._session.revision,
                            snapshot=wanted.snapshot,
                            into=into,
                            timeout_s=timeout_s,
                        )
                        calls.create_task(call)

        async def attempt_or_break_off(timeout_s: float) -> None:
            try:
                await attempt(timeout_s)
            except ExceptionGroup as errors:
                # The other calls were cancelled at the first error: all are needed.
                failure = min(errors.exceptions, key=is_retryable)
                raise (_BrokenOffError(failure) if board.is_settled else failure) from None

        try:
            await blocks.with_retries(
                attempt_or_break_off,
                what=f"stream of {len(wanted.refs)} blocks",
                deadline=deadline,
            )
        except _BrokenOffError as err:
            raise err.failure from None


class _BrokenOffError(Exception):
    """A failure after something had been used, so that nothing is called again."""

    def __init__(self, failure: Exception) -> None:
        super().__init__(failure)
        self.failure = failure


def _check(wanted: _Wanted, spec: BankSpec) -> None:
    for ref in wanted.refs:
        spec.check_ref(ref)
    if wanted.layers_per_part < 1:
        raise InvalidArgumentError(
            f"layers_per_part is {wanted.layers_per_part}; accepted: >= 1",
            reason=Reason.BAD_CONFIG,
        )
    if wanted.dtype not in DTYPES:
        raise InvalidArgumentError(
            f"blocks are not streamed as {wanted.dtype}; accepted: {', '.join(DTYPES)}, or `fetch`",
            reason=Reason.BAD_DTYPE,
        )


async def _ended(receiving: asyncio.Task[None], board: LayerBoard) -> None:
    """Wait until nothing is received any more, so that nobody writes into the caller's memory."""
    cancellation: asyncio.CancelledError | None = None
    patience_s: float | None = _LEAVE_S if board.is_whole else 0.0
    while not receiving.done():
        try:
            await asyncio.wait([receiving], timeout=patience_s)
        except asyncio.CancelledError as err:
            cancellation = err
        if patience_s is not None:
            receiving.cancel()
        patience_s = None
    board.fail(FailedPreconditionError("the stream was left before this layer had come"))
    if cancellation is not None:
        raise cancellation
