"""gRPC channels: options, TLS, credentials, and one place where a call fails."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import grpc.aio

from membank.client.config import ClientConfig, TlsConfig
from membank.client.transport.call_errors import call_error
from membank.client.transport.grpc_status import ServedStatus
from membank.wire.buffers import keep_freed_memory
from membank.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    Reason,
    UnavailableError,
)
from membank.wire.framing import MAX_MESSAGE_BYTES

T = TypeVar("T")

_AUTHORIZATION = "authorization"
# gRPC waits 1 to 120 s before it tries a refused address again; a shard is back within seconds.
_MIN_RECONNECT_MS = 100
_MAX_RECONNECT_MS = 1_000
# What gRPC calls the least backoff is in fact the time that one attempt to connect may take.
_CONNECT_TIMEOUT_MS = 5_000


class GrpcChannel:
    """A channel to one endpoint, with the metadata and the error decoding of every call on it.

    Belongs to the event loop that it was made in.

    Parameters
    ----------
    endpoint
        Address, ``host:port``.
    config
        Limits, TLS and credentials; the token file is read here.

    Raises
    ------
    InvalidArgumentError
        If the endpoint is no ``host:port``.
    FailedPreconditionError
        If a credential would be sent over the network without TLS, or a file cannot be read.
    """

    def __init__(self, endpoint: str, config: ClientConfig) -> None:
        keep_freed_memory()
        host = host_of(endpoint)
        self.endpoint = endpoint
        self.is_secured = config.tls is not None
        """Whether it speaks TLS."""
        token = config.read_token()
        if token is not None and config.tls is None and not is_loopback(host):
            raise FailedPreconditionError(
                f"{endpoint}: a token is not sent over the network without TLS; configure `tls`",
                reason=Reason.INSECURE_ENDPOINT,
                metadata={"endpoint": endpoint},
            )
        self.metadata = grpc.aio.Metadata()
        if token is not None:
            self.metadata.add(_AUTHORIZATION, f"Bearer {token.reveal()}")
        options = _options(config)
        if config.tls is None:
            self._channel = grpc.aio.insecure_channel(endpoint, options)
        else:
            self._channel = grpc.aio.secure_channel(endpoint, _credentials(config.tls), options)
        self.channel = cast("grpc.aio.Channel", _Methods(self._channel, endpoint))
        """Makes methods, by generated code or by hand; a call of one that comes after `close`
        raises `UnavailableError`."""

    async def unary(self, method: str, call: Awaitable[T]) -> T:
        """Await a call that has one answer.

        Raises
        ------
        MembankError
            The leaf that the service raised, or the nearest one where gRPC itself failed.
        """
        try:
            return await call
        except grpc.aio.AioRpcError as err:
            raise self._decoded(err, method) from err
        except asyncio.CancelledError:
            self._raise_if_closed(method)
            raise

    async def upload(self, method: str, call: grpc.aio.StreamUnaryCall[Any, T]) -> T:
        """Await a call that sends a stream and has one answer; errors as for `unary`."""
        status = ServedStatus(call)
        try:
            return await call
        except grpc.aio.AioRpcError as err:
            raise self._decoded(status.error_or(err), method) from err
        except asyncio.CancelledError:
            self._raise_if_closed(method)
            raise

    async def stream(self, method: str, call: AsyncIterable[T]) -> AsyncIterator[T]:
        """Yield the answers of a call; errors as for `unary`."""
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as err:
            raise self._decoded(err, method) from err
        except asyncio.CancelledError:
            self._raise_if_closed(method)
            raise

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Close the channel; calls that still run have `grace_s` seconds to end."""
        await self._channel.close(grace_s or None)

    def _raise_if_closed(self, method: str) -> None:
        # Closing a channel cancels its calls; to their callers, who were not cancelled themselves,
        # that is a service that went away.
        task = asyncio.current_task()
        if task is not None and not task.cancelling():
            raise _closed(self.endpoint, method) from None

    def _decoded(self, err: grpc.aio.AioRpcError, method: str) -> MembankError:
        # Not of the mapping itself: before grpcio 1.80 its keys were its items.
        details = dict(iter(err.trailing_metadata() or ())).get("grpc-status-details-bin")
        return call_error(
            err.code(),
            err.details() or "",
            details if isinstance(details, bytes) else None,
            endpoint=self.endpoint,
            method=method,
        )


class _Methods:
    """The methods of a channel. A shard that has moved may be called when its channel is closed."""

    def __init__(self, channel: grpc.aio.Channel, endpoint: str) -> None:
        self._channel = channel
        self._endpoint = endpoint

    def __getattr__(self, kind: str) -> Callable[..., Callable[..., Any]]:
        make = getattr(self._channel, kind)

        def named(path: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:  # noqa: ANN401
            method = make(path, *args, **kwargs)

            def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
                try:
                    return method(*args, **kwargs)
                except grpc.aio.UsageError as err:
                    raise _closed(self._endpoint, path.rpartition("/")[2]) from err

            return call

        return named


def _closed(endpoint: str, method: str) -> UnavailableError:
    return UnavailableError(
        f"{endpoint} {method}: the connection was closed during the call", reason=Reason.CANCELLED
    )


def host_of(endpoint: str) -> str:
    """Return the host of ``host:port``.

    Raises
    ------
    InvalidArgumentError
        If `endpoint` is none.
    """
    host, colon, port = endpoint.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise InvalidArgumentError(
            f"{endpoint!r} is no address of a service; write host:port, such as localhost:7600",
            metadata={"endpoint": endpoint},
        )
    return host.removeprefix("[").removesuffix("]")


def is_loopback(host: str) -> bool:
    """Return whether `host` is this machine by its loopback address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _options(config: ClientConfig) -> list[tuple[str, int | str]]:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1000)),
        ("grpc.initial_reconnect_backoff_ms", _MIN_RECONNECT_MS),
        ("grpc.min_reconnect_backoff_ms", _CONNECT_TIMEOUT_MS),
        ("grpc.max_reconnect_backoff_ms", _MAX_RECONNECT_MS),
        # Retries are ours: gRPC's own would not keep to the caller's budget.
        ("grpc.enable_retries", 0),
        # A bank is reached directly; a web proxy in the environment would swallow loopback too.
        ("grpc.enable_http_proxy", 0),
        # Otherwise a new channel inherits the reconnect wait of an earlier one to this address.
        ("grpc.use_local_subchannel_pool", 1),
    ]
    if config.tls is not None and config.tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", config.tls.server_name))
    return options


def _credentials(tls: TlsConfig) -> grpc.ChannelCredentials:
    path = tls.root_certificates
    if path is None:
        # gRPC would trust the list in its own wheel, not what the operator of this machine trusts.
        system = Path(ssl.get_default_verify_paths().openssl_cafile)
        path = system if system.is_file() else None
    try:
        roots = None if path is None else path.read_bytes()
    except OSError as err:
        raise FailedPreconditionError(
            f"root certificates {path}: {err.strerror}", reason=Reason.BAD_CONFIG
        ) from err
    return grpc.ssl_channel_credentials(root_certificates=roots)
