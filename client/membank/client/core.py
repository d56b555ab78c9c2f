"""The client's one implementation, asynchronous; `BankClient` is this behind a thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from membank.client.admin.admin import AdminCalls
from membank.client.blocks import BlockSource, ShardedBlocks
from membank.client.borrowing import BorrowCalls
from membank.client.cache.blocks import CachedBlocks, CacheStats
from membank.client.cache.session import cached
from membank.client.checks import (
    check_answer_bytes,
    check_arrays,
    check_bases,
    check_scale,
)
from membank.client.config import ClientConfig
from membank.client.inline import is_inline
from membank.client.memory import FetchedBlocks, Memory
from membank.client.opened import AsyncOpenedBank, open_bank
from membank.client.retriever import Embedder
from membank.client.routing import RoutingCalls
from membank.client.session import Session, new_request_id
from membank.client.streaming.calls import StreamingCalls
from membank.client.transport.contract import Connector, PushAnswer
from membank.client.transport.landing import CallerBuffers
from membank.client.transport.requests import encoded, gradient_to_send
from membank.client.transport.same_host import (
    SameHostCounters,
    SameHostStats,
    same_host_connector,
)
from membank.client.watching import Changes, watch_shards
from membank.wire.codec import Encoded
from membank.wire.errors import (
    FailedPreconditionError,
    NotFoundError,
    Reason,
)
from membank.wire.records import Block, Update
from membank.wire.spec import Array, BankSpec, BlockRef


class AsyncBankClient(RoutingCalls, StreamingCalls, BorrowCalls, AdminCalls):
    """A bank as seen over the network; belongs to the event loop that it was made in.

    Made by `connect`. Calls may run concurrently. Every call takes a `timeout_s` in seconds
    (None = the configured deadline), retries included; only where no service answered, or where it
    was overloaded, is a call made again. Beside what its docstring names, every call raises
    `UnavailableError` where shards do not answer within the budget, `DeadlineError` where time ran
    out, `UnauthenticatedError` and `AccessDeniedError`.

    Parameters
    ----------
    session
        What the calls share.
    embedder
        Embeds texts for `route`; None = the one that the bank's tree holds (``lsa`` only).
    counters
        Counts what goes through shared memory.
    """

    def __init__(
        self,
        session: Session,
        *,
        embedder: Embedder | None = None,
        counters: SameHostCounters | None = None,
    ) -> None:
        super().__init__(session, embedder=embedder)
        self._counters = counters or SameHostCounters()
        self._blocks: BlockSource | None = None
        self._cache: CachedBlocks | None = None
        self._pinned_revision: int | None = None

    @classmethod
    async def connect(
        cls,
        endpoint: str,
        *,
        config: ClientConfig | None = None,
        embedder: Embedder | None = None,
        connector: Connector | None = None,
    ) -> Self:
        """Connect to a service and learn its bank.

        A service without a bank is accepted where the configuration names none: `create_bank` is
        what is left to do.

        Parameters
        ----------
        endpoint
            Address, ``host:port``, of the gateway, or of any shard (admin calls need the gateway).
        config
            Configuration; None = the defaults.
        embedder
            Embeds texts for `route`; None = the one that the bank's tree holds (``lsa`` only).
        connector
            Connects to endpoints; None = over gRPC, and to shards on this machine through shared
            memory.

        Raises
        ------
        UnavailableError
            If nothing answers there within ``config.connect_timeout_s``.
        NotFoundError
            If the service does not serve the bank that the configuration names.
        InvalidArgumentError
            If the endpoint is no ``host:port``.
        """
        config = config or ClientConfig()
        counters = SameHostCounters()
        connector = connector or same_host_connector(config, counters)
        client = cls(Session(endpoint, config, connector), embedder=embedder, counters=counters)
        try:
            await client._greet()
        except BaseException:
            await client.close()
            raise
        return client

    @classmethod
    async def open(
        cls,
        where: str | os.PathLike[str],
        *,
        snapshot: str = "",
        keyring: str | os.PathLike[str] = "",
        embedder: Embedder | None = None,
    ) -> AsyncOpenedBank:
        """Open a bank from its files, read-only, without a service; see `BankClient.open`.

        Parameters
        ----------
        where
            Path or URL of the bank.
        snapshot
            Snapshot to read; empty = the present state.
        keyring
            Path or URL of the keyring, of a sealed bank.
        embedder
            Embeds texts for `route`; None = the one that the bank's tree holds (``lsa`` only).
        """
        opened = await asyncio.to_thread(
            open_bank, where, snapshot=snapshot, keyring=keyring, embedder=embedder
        )
        return AsyncOpenedBank(opened)

    async def _greet(self) -> None:
        try:
            await self.info(timeout_s=self._session.config.connect_timeout_s)
        except NotFoundError:
            if self._session.config.bank:
                raise

    async def close(self) -> None:
        """Close the connections; calls that still run end with `UnavailableError`."""
        if self._cache is not None:
            await self._cache.close()
        await self._session.shards.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def endpoint(self) -> str:
        """Address that the client was given."""
        return self._session.endpoint

    @property
    def config(self) -> ClientConfig:
        """Configuration of the client."""
        return self._session.config

    @property
    def cache_stats(self) -> CacheStats | None:
        """What the cache did and holds; None where there is none, or nothing was fetched yet."""
        return None if self._cache is None else self._cache.stats

    @property
    def same_host_stats(self) -> SameHostStats:
        """What went through shared memory, and why what did not."""
        return self._counters.stats

    @property
    def spec(self) -> BankSpec:
        """Spec of the bank, as learnt.

        Raises
        ------
        NotFoundError
            If the service has no bank yet.
        """
        known = self._session.shards.known_info
        if known is None:
            raise NotFoundError(
                f"{self.endpoint} has no bank yet; create one", reason=Reason.UNKNOWN_BANK
            )
        return known.spec

    async def fetch(
        self,
        path: Sequence[BlockRef],
        *,
        dtype: str | None = None,
        held: Mapping[BlockRef, Block] | None = None,
        into: Mapping[BlockRef, Array] | None = None,
        snapshot: str | None = None,
        timeout_s: float | None = None,
    ) -> Memory:
        """Fetch the blocks of a path that may be used.

        Parameters
        ----------
        path
            Blocks, usually from `route`; several paths at a time may share blocks.
        dtype
            Element type to get: float32, bfloat16 or float16; None = as kept in the bank; or
            ``int8``: a quarter of the bytes travel, and float32 is returned, of the accuracy that
            docs/wire.md states.
        held
            An earlier answer; a block whose version is still right is taken from there and does not
            travel.
        into
            Buffers of the caller's for some of the blocks; see `fetch_blocks`.
        snapshot
            Snapshot to read, "" = the present state; None = ``config.snapshot``.
        timeout_s
            Deadline.

        Returns
        -------
        Memory
            The blocks, all of one revision, that of the snapshot where one is read. A withheld or deleted block ends its path: it and those
            under it are left out, and `Memory.ended_at` names it.

        Raises
        ------
        NotFoundError
            If one is no block of the bank, or there is no such snapshot.
        InvalidArgumentError
            If the dtype is unknown or the answer would exceed ``config.max_answer_bytes``.
        FailedPreconditionError
            If ``config.snapshot`` is the name of another snapshot now.
        CorruptionError
            If bytes were damaged on the way.

        Notes
        -----
        No answer is of an older revision than one this client has seen before, but for those of a
        snapshot. From a snapshot, too, nothing is read that is withheld or deleted by now.
        """
        fetched = await self.fetch_blocks(
            path, dtype=dtype, held=held, into=into, snapshot=snapshot, timeout_s=timeout_s
        )
        return Memory.of_path(self.spec, fetched)

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
        """Fetch blocks for themselves, such as those of a batch; none ends a path.

        As `fetch`, but a withheld or deleted block is in the answer, without weight and with its
        state. A block that is named twice is fetched once.

        Parameters
        ----------
        refs
            The blocks.
        dtype
            As for `fetch`.
        held
            An earlier answer.
        into
            Buffers of the caller's for some of the blocks, (L, P, R, D) of the element type that
            the weights will have, writable, C-contiguous, without overlap. They hold the weights afterwards, and the
            answer has read-only views of them. Content lands there straight from the connection;
            with `held` or a cache it is copied there at the end, also where it did not travel.
            Undefined after an error; untouched for a block without weight. None = memory that the
            client uses again once nobody refers to the weights (``config.pooled_bytes``).
        snapshot
            Snapshot to read, "" = the present state; None = ``config.snapshot``.
        timeout_s
            Deadline.
        """
        deadline = self._session.deadline(timeout_s)
        spec = await self._session.spec(deadline)
        wanted = list(dict.fromkeys(BlockRef(*ref) for ref in refs))
        for ref in wanted:
            spec.check_ref(ref)
        dtype = dtype or spec.dtype
        check_answer_bytes(spec, wanted, dtype, max_bytes=self.config.max_answer_bytes)
        buffers = CallerBuffers(spec, into or {}, wanted, dtype)
        # What somebody holds already stays as it is until the answer is whole.
        lands = not held and self.config.cache is None
        snapshot = self.config.snapshot if snapshot is None else snapshot
        fetched = await self._source(spec).fetch(
            wanted,
            held=held or {},
            dtype=dtype,
            min_revision=self._session.revision,
            snapshot=snapshot,
            into=buffers.arrays if lands else None,
            deadline=deadline,
        )
        self._note_answer(snapshot, fetched.revision)
        return buffers.fill(fetched) if buffers.arrays else fetched

    async def push(
        self,
        gradients: Mapping[BlockRef, Array | Encoded],
        *,
        base: Mapping[BlockRef, int],
        step: int = 0,
        learning_rate_scale: float = 1.0,
        wire: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> PushAnswer:
        """Apply gradients to blocks, each once, and return when the shards' journals hold them.

        Parameters
        ----------
        gradients
            Gradient of each block, (L, P, R, D) float32, bfloat16 or float16, CPU; must not change
            before the answer; not retained. Or what an encoding made of it.
        base
            Version that each gradient was computed on, such as ``memory.versions``; may have more.
        step
            Training step of the sender; recorded.
        learning_rate_scale
            Multiplies the bank's learning rates for this push; finite, >= 0.
        wire
            What gradients travel as: float32, bfloat16, float16, ``int8`` or ``sparse``; None = as
            they are. What rounding takes away is lost; `CompressedPushes` sends it later.
        request_id
            Id of the request; None = a new one. A push that was applied under the same id is not
            applied again.
        timeout_s
            Deadline.

        Returns
        -------
        PushAnswer
            One result per gradient; one that was refused (too old a base, a withheld block) says why
            and does not touch the others.

        Raises
        ------
        InvalidArgumentError
            If a shape, dtype or value is wrong, or a base version is missing.
        NotFoundError
            If one is no block of the bank.
        UnavailableError, DeadlineError
            If a shard does not answer. Its part may or may not have been applied; the same push with
            the same request id brings it to an end.
        """
        deadline = self._session.deadline(timeout_s)
        spec = await self._session.spec(deadline)
        max_bytes = self._session.config.max_push_bytes
        check_arrays(spec, gradients, what="gradients", max_bytes=max_bytes)
        check_bases(gradients, base)
        check_scale(learning_rate_scale)
        if not gradients:
            return PushAnswer(results=(), duplicate=False)
        if wire is not None:
            if not is_inline():
                gradients = await asyncio.to_thread(encoded, gradients, wire)
            else:
                gradients = encoded(gradients, wire)
        update = Update(
            request_id=request_id or new_request_id(),
            step=step,
            gradients=tuple(
                gradient_to_send(BlockRef(*ref), base[ref], values)
                for ref, values in gradients.items()
            ),
            learning_rate_scale=learning_rate_scale,
        )
        return await self._source(spec).push(update, deadline=deadline)

    async def watch(
        self, refs: Iterable[BlockRef] = (), *, admin_only: bool = False
    ) -> AsyncGenerator[Changes]:
        """Yield changes of blocks from now on, from all shards, until closed.

        The first item has no changes and says that from here on none is missed. Streams that break
        are opened again; the item after that says that there was a gap.

        Parameters
        ----------
        refs
            Blocks of interest; empty = all.
        admin_only
            True leaves out changes by gradient updates.

        Yields
        ------
        Changes
            Changes of one shard in the order in which they took effect.

        Raises
        ------
        UnavailableError
            If a shard stays away for longer than the retry budget.
        """
        spec = await self._session.spec(self._session.deadline(None))
        wanted = tuple(dict.fromkeys(BlockRef(*ref) for ref in refs))
        changes = watch_shards(
            self._session.shards, spec, wanted, admin_only=admin_only, config=self.config
        )
        try:
            async for change in changes:
                yield change
        finally:
            await changes.aclose()

    def _note_answer(self, snapshot: str, revision: int) -> None:
        if not snapshot:
            self._session.note_revision(revision)
        if not snapshot or snapshot != self.config.snapshot:
            return
        if self._pinned_revision is None:
            self._pinned_revision = revision
        if self._pinned_revision != revision:
            # Who is pinned for life must not find itself serving another state under an old name.
            raise FailedPreconditionError(
                f"snapshot {snapshot!r} was made anew: it pins revision {revision} now, and this "
                f"client has read it at {self._pinned_revision}; connect anew",
                reason=Reason.UNKNOWN_SNAPSHOT,
                metadata={"snapshot": snapshot, "revision": str(revision)},
            )

    def _source(self, spec: BankSpec) -> BlockSource:
        if self._blocks is None:
            sharded = ShardedBlocks(self._session.shards, spec, self.config)
            self._session.report_listeners.append(sharded.removals.hear_report)
            self._blocks = sharded
            if self.config.cache is not None:
                self._blocks = self._cache = cached(sharded, self._session, spec)
        return self._blocks
