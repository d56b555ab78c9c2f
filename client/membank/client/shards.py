"""Which shard serves what: the placement as last learnt, and the connections to its endpoints."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from membank.client.inline import require_loop
from membank.client.transport.contract import Connector, Transport
from membank.wire.errors import (
    FailedPreconditionError,
    MembankError,
    Reason,
    UnavailableError,
)
from membank.wire.records import BankInfo
from membank.wire.spec import BankSpec, BlockRef

_LOGGER = logging.getLogger(__name__)

# The shard is where it was, and will answer when it has caught up.
_PLACE_IS_RIGHT = frozenset({Reason.BEHIND_REVISION, Reason.TRANSACTION_IN_PROGRESS})


class ShardMap:
    """Finds the shard of a block, and learns anew where shards are.

    Belongs to one event loop, which alone changes what is known; threads in `run_inline` look it up.
    `_lock` makes one refresh serve all calls that need one.

    Parameters
    ----------
    endpoint
        Address of the gateway, or of any shard.
    connector
        Connects to endpoints.
    grace_s
        Seconds that calls to an endpoint that serves nothing any more may take to end.
    """

    def __init__(self, endpoint: str, connector: Connector, *, grace_s: float) -> None:
        self.endpoint = endpoint
        self._connector = connector
        self._grace_s = grace_s
        self._transports: dict[str, Transport] = {}
        self._info: BankInfo | None = None
        self._endpoints: dict[int, str] = {}
        self._num_refreshes = 0
        self._lock = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def num_refreshes(self) -> int:
        """Number of times that the placement was learnt."""
        return self._num_refreshes

    @property
    def known_info(self) -> BankInfo | None:
        """What was learnt last; None before the first answer."""
        return self._info

    def gateway(self) -> Transport:
        """Return the connection to the address that the client was given."""
        return self.transport(self.endpoint)

    def transport(self, endpoint: str) -> Transport:
        """Return the connection to `endpoint`.

        Raises
        ------
        FailedPreconditionError
            If the client is closed.
        """
        if self._is_closed:
            raise FailedPreconditionError("the client is closed; connect a new one")
        transport = self._transports.get(endpoint)
        if transport is None:
            require_loop()
            transport = self._transports[endpoint] = self._connector(endpoint)
        return transport

    async def info(self, *, timeout_s: float) -> BankInfo:
        """Return what was learnt last, or ask where nothing was."""
        return self._info or await self.refresh(timeout_s=timeout_s)

    async def refresh(self, *, timeout_s: float, seen: int | None = None) -> BankInfo:
        """Ask for the bank's description, and adopt its placement.

        Parameters
        ----------
        timeout_s
            Seconds it may take.
        seen
            `num_refreshes` before the call that failed; where another call has refreshed since,
            its answer is taken. None always asks.

        Raises
        ------
        FailedPreconditionError
            If another bank is served there now.
        MembankError
            What `Transport.get_bank` raises.
        """
        require_loop()
        async with self._lock:
            if self._info is None or seen is None or seen == self._num_refreshes:
                info = await self._ask(timeout_s)
                self._adopt(info)
            return self._info  # type: ignore[return-value]  # adopted at the latest just now

    async def recover(self, error: MembankError, *, timeout_s: float, seen: int) -> None:
        """Learn where shards are after `error`; where nobody can tell, keep what is known."""
        if not isinstance(error, UnavailableError) or error.reason in _PLACE_IS_RIGHT:
            return
        try:
            await self.refresh(timeout_s=timeout_s, seen=seen)
        except UnavailableError as err:
            _LOGGER.debug("placement was not refreshed: %s", err)

    def forget(self) -> None:
        """Forget the bank, such as when another is created in its place."""
        self._info = None
        self._endpoints = {}

    def group(self, refs: Iterable[BlockRef], spec: BankSpec) -> dict[str, list[BlockRef]]:
        """Return `refs` by the endpoint of their shard, in order.

        Raises
        ------
        NotFoundError
            If one is no block of the bank.
        UnavailableError
            If no shard serves the partition of one now.
        """
        groups: dict[str, list[BlockRef]] = {}
        for ref in refs:
            spec.check_ref(ref)
            partition = spec.partition_of(ref)
            endpoint = self._endpoints.get(partition)
            if not endpoint:
                raise UnavailableError(
                    f"no shard serves partition {partition} of bank {spec.name} at present",
                    metadata={"bank": spec.name, "partition": str(partition)},
                )
            groups.setdefault(endpoint, []).append(ref)
        return groups

    def endpoints(self) -> set[str]:
        """Return the endpoints of all shards."""
        return {endpoint for endpoint in self._endpoints.values() if endpoint}

    async def close(self) -> None:
        """Close all connections; calls that still run end with `UnavailableError`."""
        self._is_closed = True
        transports, self._transports = list(self._transports.values()), {}
        for task in self._closing:
            task.cancel()
        await asyncio.gather(
            *(transport.close() for transport in transports),
            *self._closing,
            return_exceptions=True,
        )

    async def _ask(self, timeout_s: float) -> BankInfo:
        try:
            return await self.gateway().get_bank(timeout_s=timeout_s)
        except UnavailableError as err:
            failure = err
        # The gateway may be down while shards are up; every shard knows the placement.
        for endpoint in self.endpoints() - {self.endpoint}:
            try:
                return await self.transport(endpoint).get_bank(timeout_s=timeout_s)
            except UnavailableError as err:
                _LOGGER.debug("%s does not answer either: %s", endpoint, err)
        raise failure

    def _adopt(self, info: BankInfo) -> None:
        known = self._info
        if known is not None and known.spec.bank_id != info.spec.bank_id:
            raise FailedPreconditionError(
                f"{self.endpoint} serves another bank now: {info.spec.name} with id "
                f"{info.spec.bank_id}, before {known.spec.bank_id}; connect anew",
                reason=Reason.UNKNOWN_BANK,
                metadata={"bank_id": info.spec.bank_id},
            )
        self._num_refreshes += 1
        is_older = known is not None and info.placement.generation < known.placement.generation
        if is_older and known is not None:
            # A shard that has not heard of the last move answers with what was.
            return
        self._info = info
        self._endpoints = {owner.partition: owner.endpoint for owner in info.placement.owners}
        self._retire(set(self._transports) - self.endpoints() - {self.endpoint})

    def _retire(self, endpoints: set[str]) -> None:
        for endpoint in endpoints:
            task = asyncio.create_task(self._transports.pop(endpoint).close(grace_s=self._grace_s))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
