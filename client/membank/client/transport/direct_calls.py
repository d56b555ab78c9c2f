"""Calls of the data path that pass grpcio by, where that works; where not, grpcio makes them."""

from __future__ import annotations

import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from membank.client.config import ClientConfig, TlsConfig
from membank.client.inline import require_loop
from membank.client.transport.contract import FetchAnswer, PushAnswer
from membank.client.transport.counting import CallCounter
from membank.client.transport.data_calls import DataCalls
from membank.client.transport.data_connection import Address, DataConnection, MisdirectedError
from membank.client.transport.data_port import CONNECT_TIMEOUT_S, DataPort
from membank.client.transport.grpc_channel import host_of
from membank.client.transport.landing import Landing
from membank.client.transport.lent_connections import LentConnections
from membank.client.transport.payloads import FetchedPayloads
from membank.v1 import block_service_pb2 as block_pb
from membank.wire.alternative import Alternative
from membank.wire.errors import DeadlineError, MembankError
from membank.wire.http2.frames import ProtocolError
from membank.wire.records import Update
from membank.wire.spec import BlockRef

T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)

_FETCH = "FetchBlocks"
_PUSH = "PushUpdates"

_CONNECT_TIMEOUT_S = 5.0
_PAUSE_S = 1.0
"""Time in which nobody tries to connect again: an address that swallows what is sent there would
cost every call `_CONNECT_TIMEOUT_S`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DirectStats:
    """What passed grpcio by."""

    num_fetches: int = 0
    """Fetches from single shards that did."""
    num_pushes: int = 0
    """Pushes to single shards that did; all of them went to a port for data."""
    num_data_port: int = 0
    """Fetches and pushes that went to the port for data of a shard."""
    num_data_port_failures: int = 0
    """How often such a port could not be reached, broke, or was another server's; for a while then,
    fetches go to the endpoint itself and grpcio makes the pushes."""
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    """Calls that grpcio made instead, by why: ``not connected``, ``not understood``, or ``data
    port`` where that was another server's or not understood. Pushes to a shard that has told of no
    such port are not counted."""


class _NoWayError(Exception):
    """grpcio has to do it; the text says why, as in `DirectStats`."""


class _ElsewhereError(Exception):
    """The connection is not to the port for data."""


class DirectCalls:
    """The data path over connections of its own.

    Parameters
    ----------
    endpoint
        Address, ``host:port``.
    config
        Limits, TLS and credentials.
    otherwise
        Makes the calls that this cannot; not closed.
    data_port
        What is known of the endpoint's port for data.
    """

    def __init__(
        self, endpoint: str, config: ClientConfig, otherwise: DataCalls, data_port: DataPort
    ) -> None:
        self._endpoint = endpoint
        self._config = config
        self._otherwise = otherwise
        self._connections: LentConnections[DataConnection] = LentConnections(
            config.max_data_connections, thread_name="membank-data"
        )
        self._data_port = data_port
        self._paused_until = 0.0
        self._is_not_understood = False
        self._counter = CallCounter()

    @property
    def stats(self) -> DirectStats:
        """What was counted."""
        counts = self._counter.counts()
        return DirectStats(
            num_fetches=counts.pop(_FETCH, 0),
            num_pushes=counts.pop(_PUSH, 0),
            num_data_port=self._data_port.num_served,
            num_data_port_failures=self._data_port.num_failures,
            fallbacks=counts,
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
        ends = time.monotonic() + timeout_s

        def work(connection: DataConnection) -> FetchAnswer:
            payloads = FetchedPayloads(
                refs, landing, max_bytes=self._config.max_answer_bytes, where=self._endpoint
            )
            connection.fetch(request, payloads, ends=ends)
            return payloads.finish()

        def otherwise(left_s: float) -> Awaitable[FetchAnswer]:
            return self._otherwise.fetch(request, refs, landing, timeout_s=left_s)

        return await self._counted(_FETCH, self._call(_FETCH, work, ends), otherwise, ends)

    async def push(self, update: Update, *, bank: str, timeout_s: float) -> PushAnswer:
        """Apply gradients."""
        ends = time.monotonic() + timeout_s

        def work(connection: DataConnection) -> PushAnswer:
            if connection.to is None:
                raise _ElsewhereError
            return connection.push(update, bank=bank, ends=ends)

        def otherwise(left_s: float) -> Awaitable[PushAnswer]:
            # Under the same request id: what has arrived already is not applied twice.
            return self._otherwise.push(update, bank=bank, timeout_s=left_s)

        if self._data_port.wanted() is None:
            return await otherwise(timeout_s)
        return await self._counted(_PUSH, self._pushed(work, ends), otherwise, ends)

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Close all connections; calls that still run have `grace_s` seconds to end."""
        await self._connections.close(grace_s=grace_s)

    async def _counted(
        self,
        what: str,
        call: Awaitable[T],
        otherwise: Callable[[float], Awaitable[T]],
        ends: float,
    ) -> T:
        try:
            answer = await call
        except _NoWayError as err:
            # Before it is counted: on the loop it is made, and counted, once more.
            require_loop()
            self._counter.count(str(err))
            return await otherwise(max(0.0, ends - time.monotonic()))
        self._counter.count(what)
        return answer

    async def _pushed(self, work: Callable[[DataConnection], T], ends: float) -> T:
        while True:
            try:
                return await self._call(_PUSH, work, ends)
            except _ElsewhereError:
                # One that is left from before the port was known; the next one is, or is opened.
                if self._data_port.wanted() is None:
                    raise _NoWayError("not connected") from None

    async def _call(self, method: str, work: Callable[[DataConnection], T], ends: float) -> T:
        if self._is_not_understood:
            raise _NoWayError("not understood")

        def done(connection: DataConnection) -> T:
            try:
                answer = work(connection)
            except (MisdirectedError, ProtocolError) as err:
                if connection.to is None:
                    raise
                self._data_port.failed(connection.to)
                connection.retire()
                raise _NoWayError("data port") from err
            finally:
                self._heed(connection)
            if connection.to is not None:
                self._data_port.served()
            return answer

        try:
            return await self._connections.call(done, lambda: self._opened(ends), ends=ends)
        except MembankError:
            # Several leaves are errors of the system's kinds as well.
            raise
        except TimeoutError as err:
            raise DeadlineError(f"{self._endpoint} {method}: no connection came free") from err
        except ProtocolError as err:
            # A proxy in between, or a defect of either end; grpcio may cope, and names it if not.
            _LOGGER.warning("%s is called through grpcio from now on: %s", self._endpoint, err)
            self._is_not_understood = True
            raise _NoWayError("not understood") from err

    def _heed(self, connection: DataConnection) -> None:
        """Take what the endpoint has told, and give up connections that are not where it says."""
        if connection.told is not None:
            self._data_port.told(connection.told)
        if connection.to is not None and connection.has_broken:
            self._data_port.failed(connection.to)
        if self._data_port.wanted() not in (None, connection.to):
            connection.retire()

    async def _opened(self, ends: float) -> DataConnection:
        if (port := self._data_port.wanted()) is not None:
            try:
                return await self._connected(min(ends, time.monotonic() + CONNECT_TIMEOUT_S), port)
            except (OSError, ProtocolError) as err:
                # Such as a firewall that knows the other port alone.
                _LOGGER.info("%s: no data over port %d: %s", self._endpoint, port.port, err)
                self._data_port.failed(port)
        now = time.monotonic()
        if now < self._paused_until:
            raise _NoWayError("not connected")
        try:
            return await self._connected(min(ends, now + _CONNECT_TIMEOUT_S), None)
        except OSError as err:
            # grpcio fails as well, most likely, and says how in its own words.
            self._paused_until = time.monotonic() + _PAUSE_S
            raise _NoWayError("not connected") from err

    async def _connected(self, ends: float, port: Alternative | None) -> DataConnection:
        return await self._connections.open(
            lambda: DataConnection.open(_address(self._endpoint, self._config, port), ends=ends)
        )


def _address(endpoint: str, config: ClientConfig, port: Alternative | None) -> Address:
    """Return what to connect to, with the token and certificates that the files hold now."""
    token = config.read_token()
    return Address(
        endpoint=endpoint,
        host=host_of(endpoint),
        port=int(endpoint.rpartition(":")[2]),
        authorization=None if token is None else f"Bearer {token.reveal()}",
        tls=None if config.tls is None else _context(config.tls),
        server_name=None if config.tls is None else config.tls.server_name,
        keepalive_s=config.keepalive_s,
        keepalive_timeout_s=config.keepalive_timeout_s,
        alternative=port,
    )


def _context(tls: TlsConfig) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=tls.root_certificates)
    context.set_alpn_protocols(["h2"])
    return context
