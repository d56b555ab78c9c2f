"""The way through shared memory to a shard on this machine, beside the way over gRPC.

Payloads do not travel: a fetch copies blocks from where the shard keeps them, a push says where in
this process the gradients lie. Whatever keeps that from working is answered by gRPC, and counted.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from membank.client.config import ClientConfig, SameHostConfig
from membank.client.transport.contract import (
    Connector,
    FetchAnswer,
    LayerListener,
    PushAnswer,
    SameHostDoor,
)
from membank.client.transport.counting import CallCounter
from membank.client.transport.grpc_transport import GrpcTransport, grpc_connector
from membank.client.transport.landing import Landing
from membank.client.transport.layered_landing import tell_whole
from membank.client.transport.lent_connections import LentConnections
from membank.client.transport.requests import fetch_request
from membank.client.transport.same_host_connection import SameHostConnection
from membank.wire.buffers import BufferPool
from membank.wire.errors import (
    DeadlineError,
    FailedPreconditionError,
    MembankError,
    UnavailableError,
)
from membank.wire.records import Update
from membank.wire.same_host import boot_id
from membank.wire.shared_memory import SharedMemory
from membank.wire.spec import Array, BlockRef

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class SameHostStats:
    """What went through shared memory."""

    num_fetches: int
    """Fetches from single shards that did."""
    num_pushes: int
    """Pushes to single shards that did."""
    num_borrows: int
    """Borrowings from single shards that did."""
    fallbacks: Mapping[str, int]
    """Calls that were made over gRPC instead, by what the shared memory lacked: ``not offered``,
    ``other host``, ``not let in``, ``broken``."""


class SameHostCounters(CallCounter):
    """Counts for `SameHostStats`; for one client, whose transports share it."""

    @property
    def stats(self) -> SameHostStats:
        """The counts."""
        counts = self.counts()
        return SameHostStats(
            num_fetches=counts.pop("fetch", 0),
            num_pushes=counts.pop("push", 0),
            num_borrows=counts.pop("borrow", 0),
            fallbacks=counts,
        )


class NoWayError(Exception):
    """Shared memory cannot be used; the text says why, as in `SameHostStats`. Never leaves a client."""


class SameHostTransport(GrpcTransport):
    """A connection over gRPC whose fetches and pushes go through shared memory where they can.

    Belongs to the event loop that it was made in.

    Parameters
    ----------
    endpoint
        Address, ``host:port``.
    config
        As for `GrpcTransport`.
    bounds
        Bounds of the way through shared memory.
    counters
        Counts what is done.
    pool
        Where blocks land; None = in one of its own.
    """

    def __init__(
        self,
        endpoint: str,
        config: ClientConfig,
        bounds: SameHostConfig,
        counters: SameHostCounters,
        *,
        pool: BufferPool | None = None,
    ) -> None:
        super().__init__(endpoint, config, pool=pool)
        self._endpoint = endpoint
        self._counters = counters
        self._staging = SharedMemory()
        self._connections: LentConnections[SameHostConnection] = LentConnections(
            bounds.max_connections, thread_name="membank-same-host"
        )
        # Apart from the others: who borrows much must not keep fetches out.
        self._views: LentConnections[SameHostConnection] = LentConnections(
            bounds.max_connections, thread_name="membank-borrow"
        )
        self._no_way: str | None = None
        """Why this endpoint has no such way, and never will; None = it may have."""

    @property
    def stats(self) -> SameHostStats:
        """What was counted, for all transports of the client."""
        return self._counters.stats

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
        """Return blocks of one revision, copied out of the shard's memory."""
        request = fetch_request(
            refs,
            bank=self._bank,
            held_versions=held_versions,
            dtype=dtype,
            min_revision=min_revision,
            snapshot=snapshot,
        )
        landing = Landing(self._pool, into)

        def through(connection: SameHostConnection, left_s: float) -> FetchAnswer:
            return connection.fetch(request, refs, landing, timeout_s=left_s)

        def over(left_s: float) -> Awaitable[FetchAnswer]:
            return self._calls.fetch(request, refs, landing, timeout_s=left_s)

        return await self._call("fetch", through, over, timeout_s)

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
        """Fetch blocks whole, all layers at once: out of the shard's memory none comes before another."""
        request = fetch_request(
            refs,
            bank=self._bank,
            held_versions=None,
            dtype=dtype,
            min_revision=min_revision,
            snapshot=snapshot,
        )
        landing = Landing(self._pool, into)

        def through(connection: SameHostConnection, left_s: float) -> FetchAnswer | None:
            return connection.fetch(request, refs, landing, timeout_s=left_s)

        async def over(left_s: float) -> None:
            await GrpcTransport.fetch_layers(
                self,
                refs,
                listener,
                layers_per_part=layers_per_part,
                dtype=dtype,
                min_revision=min_revision,
                snapshot=snapshot,
                into=into,
                timeout_s=left_s,
            )

        answer = await self._call("fetch", through, over, timeout_s)
        if answer is not None:
            tell_whole(listener, answer)

    @asynccontextmanager
    async def borrow(
        self, refs: Sequence[BlockRef], *, dtype: str, min_revision: int, timeout_s: float
    ) -> AsyncIterator[FetchAnswer]:
        """Show blocks where the shard keeps them, as long as the context lasts.

        Raises
        ------
        NoWayError
            If they can only be fetched.
        UnavailableError
            At the end, if the shard took the memory back before.
        """
        request = fetch_request(
            refs,
            bank=self._bank,
            held_versions=None,
            dtype=dtype,
            min_revision=min_revision,
            snapshot="",
        )
        ends = time.monotonic() + timeout_s
        self._require_way()
        async with self._views.lend(lambda: self._opened(ends), ends=ends) as connection:
            with self._translated():
                answer = await self._views.in_thread(
                    lambda: connection.view(request, refs, timeout_s=ends - time.monotonic()),
                    on_cancel=connection.abandon,
                )
            self._counters.count("borrow")
            try:
                yield answer
            except BaseException:
                # The connection is kept, and with it would be what was lent.
                with suppress(OSError):
                    connection.let_go()
                raise
            try:
                connection.let_go()
            except OSError as err:
                raise UnavailableError(
                    f"{self._endpoint} took the memory of borrowed blocks back before they were "
                    "returned; use them for less than its lease, and borrow again"
                ) from err

    async def push(self, update: Update, *, timeout_s: float) -> PushAnswer:
        """Apply gradients, which the shard takes out of this process's memory."""

        def through(connection: SameHostConnection, left_s: float) -> PushAnswer:
            return connection.push(update, bank=self._bank, staging=self._staging, timeout_s=left_s)

        def over(left_s: float) -> Awaitable[PushAnswer]:
            # Under the same request id: where the shard has applied it, it answers as it did.
            return GrpcTransport.push(self, update, timeout_s=left_s)

        return await self._call("push", through, over, timeout_s)

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Close all connections; calls that still run have `grace_s` seconds to end."""
        self._no_way = self._no_way or "closed"
        await super().close(grace_s=grace_s)
        await self._connections.close()
        await self._views.close()

    async def _call(
        self,
        what: str,
        through: Callable[[SameHostConnection, float], T],
        over: Callable[[float], Awaitable[T]],
        timeout_s: float,
    ) -> T:
        ends = time.monotonic() + timeout_s
        try:
            answer = await self._answer(through, ends)
        except NoWayError as err:
            # Counted at its end: inline it may have to be made once more.
            answer = await over(max(0.0, ends - time.monotonic()))
            what = str(err)
        self._counters.count(what)
        return answer

    async def _answer(self, through: Callable[[SameHostConnection, float], T], ends: float) -> T:
        self._require_way()
        with self._translated():
            return await self._connections.call(
                lambda connection: through(connection, ends - time.monotonic()),
                lambda: self._opened(ends),
                ends=ends,
            )

    def _require_way(self) -> None:
        if self._no_way is not None:
            raise NoWayError(self._no_way)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except MembankError:
            # The shard's answer; several leaves are errors of the system's kinds as well.
            raise
        except TimeoutError as err:
            raise DeadlineError(f"{self._endpoint} did not answer in time") from err
        except (OSError, LookupError) as err:
            raise NoWayError("broken") from err

    async def _opened(self, ends: float) -> SameHostConnection:
        door = await self._door(ends)
        try:
            return await self._connections.open(
                lambda: SameHostConnection.open(
                    door, self._endpoint, timeout_s=max(0.001, ends - time.monotonic())
                )
            )
        except OSError as err:
            # Also where the shard has connections enough; one may be free the next time.
            raise NoWayError("not let in") from err

    async def _door(self, ends: float) -> SameHostDoor:
        try:
            door = await self.get_same_host_door(timeout_s=max(0.001, ends - time.monotonic()))
        except FailedPreconditionError:
            door = None  # a shard that knows nothing of it
        if door is None:
            self._no_way = "not offered"
        elif door.boot_id != boot_id():
            self._no_way = "other host"
        if door is None or self._no_way is not None:
            raise NoWayError(self._no_way or "closed")
        return door


def same_host_connector(config: ClientConfig, counters: SameHostCounters) -> Connector:
    """Return what connects over gRPC, and through shared memory where the shard is at hand."""
    bounds = config.same_host
    if bounds is None:
        return grpc_connector(config)
    pool = BufferPool(config.pooled_bytes)
    return lambda endpoint: SameHostTransport(endpoint, config, bounds, counters, pool=pool)
