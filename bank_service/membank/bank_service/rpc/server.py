"""A gRPC server with finite limits, health, reflection, TLS and a graceful end."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from membank.bank_service.rpc.auth import Authenticator, OpenAuthenticator, TokenAuthenticator
from membank.bank_service.rpc.interceptor import CallInterceptor
from membank.bank_service.rpc.payload_interceptor import PayloadInterceptor
from membank.wire.buffers import keep_freed_memory
from membank.wire.errors import FailedPreconditionError, Reason
from membank.wire.framing import MAX_MESSAGE_BYTES

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """Where and how a server listens."""

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs `tls_cert`, `tls_key` and `token_file`."""
    port: int = 0
    """Port to bind; 0 = any free one."""
    data_port: int | None = 0
    """Port for data of a shard, beside the one for all calls; 0 = any free one, None = none."""
    tls_cert: Path | None = None
    """PEM certificate chain; None = no TLS."""
    tls_key: Path | None = None
    """PEM key of the certificate."""
    token_file: Path | None = None
    """Who may call (`membank.bank_service.rpc.auth`); None = everybody on this machine."""
    max_message_bytes: int = MAX_MESSAGE_BYTES
    """Largest message accepted."""
    max_workers: int = 48
    """Threads, which is the number of calls served at one time; further calls wait."""
    same_host: bool = True
    """Let callers of this machine and user reach blocks through shared memory."""
    drain_s: float = 5.0
    """Time that calls under way are given when the server stops."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65_536:
            raise FailedPreconditionError(f"port is {self.port}; accepted: 0..65535")
        if not 0 <= (self.data_port or 0) < 65_536:
            raise FailedPreconditionError(f"data_port is {self.data_port}; accepted: 0..65535")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise FailedPreconditionError("tls_cert and tls_key go together; one of them is unset")
        if not is_loopback(self.host) and (self.tls_cert is None or self.token_file is None):
            raise FailedPreconditionError(
                f"{self.host} can be reached from other machines: give --tls-cert, --tls-key and "
                "--token-file, or bind 127.0.0.1",
                reason=Reason.INSECURE_ENDPOINT,
                metadata={"host": self.host},
            )


@dataclass(frozen=True, slots=True)
class Service:
    """A servicer and how it joins a server."""

    name: str
    """Full name, such as "membank.v1.BlockService"."""
    add: Callable[[grpc.Server], None]
    """Registers the servicer."""


class BankServer:
    """One listening server.

    Parameters
    ----------
    config
        Where and how it listens.
    services
        What it serves.
    on_drain
        Called first when the server stops, to end calls that would not end by themselves.
    """

    def __init__(
        self,
        config: ServerConfig,
        services: Sequence[Service],
        *,
        on_drain: Callable[[], None] = lambda: None,
    ) -> None:
        keep_freed_memory()
        self._config = config
        self._names = [service.name for service in services]
        self._on_drain = on_drain
        self._pool = ThreadPoolExecutor(config.max_workers, thread_name_prefix="membank-rpc")
        self._server = grpc.server(
            self._pool,
            interceptors=[CallInterceptor(authenticator_of(config)), PayloadInterceptor()],
            options=[
                ("grpc.max_receive_message_length", config.max_message_bytes),
                ("grpc.max_send_message_length", config.max_message_bytes),
                # Two servers on one port would share its calls at random; the second must fail.
                ("grpc.so_reuseport", 0),
                # Watchers are idle for hours and keep their connection by pings; gRPC would end
                # it, as it tolerates one ping in five minutes.
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        for service in services:
            service.add(self._server)
        names = (*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self._port = 0

    @property
    def port(self) -> int:
        """Bound port; 0 before `start`."""
        return self._port

    def start(self) -> str:
        """Bind, serve and return the address, host:port.

        Raises
        ------
        FailedPreconditionError
            If the port is taken (PORT_IN_USE), the host is not of this machine, or the
            certificate is unusable.
        """
        config = self._config
        if config.port:
            check_port_free(config.host, config.port)
        address = join_address(config.host, config.port)
        try:
            self._port = self._bind(address)
        except RuntimeError as err:
            raise _port_in_use(config.host, config.port) from err
        if self._port == 0:
            raise FailedPreconditionError(f"cannot listen on {address}; check host and certificate")
        self._server.start()
        for name in ("", *self._names):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        _LOG.info("listening on %s", join_address(config.host, self._port))
        return join_address(config.host, self._port)

    def stop(self, *, within_s: float | None = None) -> None:
        """Refuse new calls, let those under way finish for a while, then cancel them.

        Parameters
        ----------
        within_s
            Longest wait; what a cancelled call does in here may go on for long after. None =
            `drain_s`, and then until no call does anything.
        """
        drain_s = self._config.drain_s
        self._health.enter_graceful_shutdown()
        self._on_drain()
        self._server.stop(drain_s if within_s is None else min(drain_s, within_s)).wait()
        self._pool.shutdown(wait=within_s is None, cancel_futures=True)

    def _bind(self, address: str) -> int:
        cert, key = self._config.tls_cert, self._config.tls_key
        if cert is None or key is None:
            return int(self._server.add_insecure_port(address))
        credentials = grpc.ssl_server_credentials([(_pem(key), _pem(cert))])
        return int(self._server.add_secure_port(address, credentials))


def is_loopback(host: str) -> bool:
    """Return whether `host` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def join_address(host: str, port: int) -> str:
    """Return host:port, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_port_free(host: str, port: int) -> None:
    """Raise unless `port` of `host` can be bound now (0 = any).

    Raises
    ------
    FailedPreconditionError
        PORT_IN_USE where another process listens there; BAD_CONFIG where the host is not of this
        machine or the port is privileged.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # As gRPC does: a port whose last connections linger is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as err:
        if err.errno == errno.EADDRINUSE:
            raise _port_in_use(host, port) from err
        raise FailedPreconditionError(
            f"cannot listen on {join_address(host, port)}: {err.strerror or err}"
        ) from err


def free_port(host: str) -> int:
    """Return a port of `host` that is free now."""
    family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.bind(address)
        return int(probe.getsockname()[1])


def authenticator_of(config: ServerConfig) -> Authenticator:
    """Return what tells who calls a server."""
    if config.token_file is None:
        return OpenAuthenticator()
    return TokenAuthenticator.from_file(config.token_file)


def _pem(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise FailedPreconditionError(f"cannot read {path}: {err.strerror or err}") from err


def _port_in_use(host: str, port: int) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"port {port} of {host} is taken by another process; give another with --port "
        "(0 = any free one)",
        reason=Reason.PORT_IN_USE,
        metadata={"host": host, "port": str(port)},
    )
