"""Where callers of the data path connect; a thread for each of them."""

from __future__ import annotations

import logging
import math
import os
import secrets
import select
import socket
import ssl
import threading
import time
from contextlib import suppress

from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.direct.calls import DataCalls
from membank.bank_service.rpc.direct.http2 import ServerEnd
from membank.bank_service.rpc.pushing import POOLED_BYTES
from membank.bank_service.rpc.server import (
    ServerConfig,
    authenticator_of,
    check_port_free,
    join_address,
)
from membank.bank_service.shard.contract import ShardApi
from membank.wire.alternative import Alternative
from membank.wire.buffers import BufferPool
from membank.wire.errors import FailedPreconditionError
from membank.wire.http2.buffered_socket import BufferedSocket
from membank.wire.http2.frames import PROBE, ErrorCode, ProtocolError, StreamResetError

_LOG = logging.getLogger(__name__)

_GREETING_S = 10.0
"""Time in which a new caller must have asked for something."""
_PAUSE_S = 0.1


class DataListener:
    """Listens for callers of a shard's data path, from its construction on.

    It speaks gRPC to any client, and serves `FetchBlocks` and `PushUpdates` alone. All other calls
    go to the server of grpcio, whose answers tell of this one.

    Parameters
    ----------
    config
        Where and how; `data_port` is none of None.
    shard
        The shard that they call.
    budget
        Bound on payload bytes in flight, shared with all other ways in.
    max_connections
        Most connections at a time, each a thread; further callers are sent away, and call grpcio.
    idle_s
        Seconds after which a connection without calls is ended.
    stall_s
        Seconds in which a caller must take the next piece of an answer, or send the next message of
        a push: nobody who does nothing holds memory for longer.
    gradients
        Memory that gradients land in; None = of its own.

    Raises
    ------
    FailedPreconditionError
        If the port is taken (PORT_IN_USE), the host is not of this machine, or the certificate is
        unusable.
    """

    # `_lock` guards `_connections`.

    def __init__(
        self,
        config: ServerConfig,
        shard: ShardApi,
        budget: ByteBudget,
        *,
        max_connections: int = 128,
        idle_s: float = 300.0,
        stall_s: float = 30.0,
        gradients: BufferPool | None = None,
    ) -> None:
        self._drain_s = config.drain_s
        self._max_connections = max_connections
        self._idle_s = idle_s
        self._stall_s = stall_s
        self._tls = _context(config)
        server_id = secrets.token_hex(8)
        self._calls = DataCalls(
            shard,
            budget,
            gradients or BufferPool(POOLED_BYTES),
            authenticator_of(config),
            max_message_bytes=config.max_message_bytes,
            server_id=server_id,
        )
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._is_draining = False
        self._is_stopped = False
        self._listener = _bound(config.host, config.data_port or 0, max_connections)
        self.alternative = Alternative(self._listener.getsockname()[1], server_id)
        """What callers are to be told."""
        # Its reading end can be read once the other is closed, by every thread and for ever.
        self._drained, self._not_drained = os.pipe()
        self._thread = threading.Thread(target=self._accept, name="membank-data", daemon=True)
        self._thread.start()
        _LOG.info("data on %s", join_address(config.host, self.alternative.port))

    @property
    def alternative_header(self) -> str:
        """Value of the header that tells callers of this."""
        return self.alternative.header(is_secured=self._tls is not None)

    @property
    def num_connections(self) -> int:
        """Callers that are connected now."""
        with self._lock:
            return len(self._connections)

    def drain(self) -> None:
        """Let nobody in any more, and end each connection once its call under way is answered."""
        with self._lock:
            if self._is_draining:
                return
            self._is_draining = True
        os.close(self._not_drained)

    def stop(self, *, within_s: float | None = None) -> None:
        """Drain, let calls under way finish for a while, then end their connections; once.

        Parameters
        ----------
        within_s
            Longest wait; None = `ServerConfig.drain_s`, and then until no call does anything.
        """
        if self._is_stopped:
            return
        self._is_stopped = True
        ends = time.monotonic() + min(self._drain_s, math.inf if within_s is None else within_s)
        self.drain()
        self._thread.join()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.join(max(0.0, ends - time.monotonic()))
        for connection in connections:
            connection.end()
        for connection in connections:
            connection.join(None if within_s is None else max(0.0, ends - time.monotonic()))
        if not self.num_connections:
            os.close(self._drained)

    def _accept(self) -> None:
        with self._listener:
            self._accept_until_drained()

    def _accept_until_drained(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._drained, select.POLLIN)
        while True:
            poll.poll()
            if self._is_draining:
                return
            try:
                accepted, _ = self._listener.accept()
            except BlockingIOError:
                continue  # who was there has left
            except OSError as err:
                # Such as a lack of descriptors, which lasts.
                _LOG.warning("a caller of the data port could not be let in: %s", err)
                time.sleep(_PAUSE_S)
                continue
            if not self._admit(_Connection(self, accepted)):
                accepted.close()

    def _admit(self, connection: _Connection) -> bool:
        with self._lock:
            if self._is_draining or len(self._connections) >= self._max_connections:
                return False
            try:
                # Before anybody can see it: a thread that was not started cannot be waited for.
                connection.start()
            except RuntimeError as err:
                # Too many threads on this machine now; not so for ever.
                _LOG.warning("a caller of the data port could not be served: %s", err)
                return False
            self._connections.add(connection)
            return True

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


class _Connection(threading.Thread):
    """One caller, served one call at a time."""

    def __init__(self, listener: DataListener, accepted: socket.socket) -> None:
        super().__init__(name="membank-data-call", daemon=True)
        self._listener = listener
        self._socket = accepted

    def run(self) -> None:
        # docstring inherited
        try:
            with suppress(TimeoutError):
                self._serve()
        except (OSError, ProtocolError) as err:
            _LOG.debug("a connection for data ended: %s", err)
        finally:
            self._socket.close()
            self._listener._forget(self)

    def end(self) -> None:
        """End the connection, whatever it does; its thread ends soon."""
        with suppress(OSError):
            # Past TLS, and not closed: the thread may be using its number.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def _serve(self) -> None:
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.settimeout(_GREETING_S)
        if self._listener._tls is not None:
            self._socket = self._listener._tls.wrap_socket(self._socket, server_side=True)
        end = BufferedSocket(
            self._socket,
            # Silence between calls is no matter, and within one `stall_s` bounds it.
            keepalive_s=math.inf,
            keepalive_timeout_s=self._listener._stall_s,
            probe=PROBE,
        )
        http2 = ServerEnd.open(end, stall_s=self._listener._stall_s)
        try:
            self._serve_calls(end, http2)
        except ProtocolError:
            http2.go_away(ErrorCode.PROTOCOL_ERROR)
            raise
        http2.go_away()

    def _serve_calls(self, end: BufferedSocket, http2: ServerEnd) -> None:
        listener = self._listener
        idle_ends = time.monotonic() + _GREETING_S
        while http2.is_usable and not listener._is_draining:
            left = idle_ends - time.monotonic()
            if left <= 0 or not end.wait_for_input(listener._drained, left):
                return
            http2.end_at(time.monotonic() + listener._stall_s)
            headers = http2.next_request()
            if headers is None:
                continue
            try:
                if listener._calls.serve(http2, headers):
                    idle_ends = time.monotonic() + listener._idle_s
            except StreamResetError:
                http2.give_up()


def _bound(host: str, port: int, backlog: int) -> socket.socket:
    check_port_free(host, port)
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as err:
        listener.close()
        raise FailedPreconditionError(
            f"cannot listen on {join_address(host, port)}: {err.strerror or err}"
        ) from err
    return listener


def _context(config: ServerConfig) -> ssl.SSLContext | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key)
    except (OSError, ssl.SSLError) as err:
        raise FailedPreconditionError(
            f"cannot use certificate {config.tls_cert} with key {config.tls_key}: {err}"
        ) from err
    return context
