"""A link of bounded bandwidth between a client and a shard on this machine."""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import grpc

from membank.cli.bench.child_process import Child
from membank.client import BankClient, ClientConfig, GrpcTransport
from membank.v1 import block_service_pb2 as block_pb
from membank.v1.block_service_pb2_grpc import BlockServiceStub
from membank.wire.alternative import ALTERNATIVE_KEY, Alternative
from membank.wire.convert import ref_to_pb
from membank.wire.errors import InternalError
from membank.wire.spec import BlockRef

_SHARD_HOST, _LINK_HOST = "127.0.0.1", "127.0.0.2"
_SO_MAX_PACING_RATE = 47
"""Bytes per second at which Linux sends from a socket (socket(7)); Python has no name for it."""
_PIPE_BYTES = 1 << 20
_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Link:
    ports: tuple[int, ...]
    bytes_per_s: int


@contextmanager
def linked(endpoint: str, ref: BlockRef, bytes_per_s: float | None) -> Iterator[BankClient]:
    """Connect to a bank over a link, and make sure that this is the way taken.

    Parameters
    ----------
    endpoint
        Address of the only shard, on this machine.
    ref
        A block of it.
    bytes_per_s
        Bandwidth towards the client; None = loopback itself.

    Yields
    ------
    BankClient
        A client without shared memory, whose fetches go to the port for data, as through a network.
    """
    if bytes_per_s is None:
        with _connected(endpoint, _SHARD_HOST, ref) as client:
            yield client
        return
    ports = (int(endpoint.rpartition(":")[2]), _data_port(endpoint, ref))
    # A process of its own, so that forwarding takes nothing from the client's threads.
    link = Child("link", _forward, _Link(ports=ports, bytes_per_s=int(bytes_per_s)))
    try:
        link.receive(_TIMEOUT_S)
        with _connected(endpoint, _LINK_HOST, ref) as client:
            yield client
    finally:
        link.end(_TIMEOUT_S)


@contextmanager
def _connected(endpoint: str, host: str, ref: BlockRef) -> Iterator[BankClient]:
    transports: list[GrpcTransport] = []

    def connect(told: str) -> GrpcTransport:
        # The placement has the shard's own address; whoever takes the link goes by another one.
        address = told.replace(_SHARD_HOST, host)
        transports.append(GrpcTransport(address, ClientConfig()))
        return transports[-1]

    with BankClient.connect(endpoint, connector=connect) as client:
        client.fetch_blocks([ref])  # learns of the port for data
        before = sum(transport.direct_stats.num_fetches for transport in transports)
        yield client
        stats = [transport.direct_stats for transport in transports]
        num_astray = sum(each.num_fetches - each.num_data_port for each in stats) - before
        if num_astray or any(each.fallbacks or each.num_data_port_failures for each in stats):
            raise InternalError(f"fetches took another way than the port for data: {stats}")


def _data_port(endpoint: str, ref: BlockRef) -> int:
    """Ask a shard for its port for data."""
    with grpc.insecure_channel(endpoint) as channel:
        request = block_pb.FetchBlocksRequest(refs=[ref_to_pb(ref)])
        call = BlockServiceStub(channel).FetchBlocks(request)
        told = {key: str(value) for key, value in call.initial_metadata()}
        call.cancel()
    alternative = Alternative.of_header(told.get(ALTERNATIVE_KEY, ""), is_secured=False)
    if alternative is None:
        raise InternalError(f"{endpoint} has no port for data")
    return alternative.port


def _forward(link: _Link, pipe: Connection) -> None:
    """Forward connections to the ports of a shard until the pipe ends."""
    for port in link.ports:
        listener = socket.create_server((_LINK_HOST, port))
        # Those that are accepted inherit it.
        listener.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, link.bytes_per_s)
        threading.Thread(target=_accept, args=(listener, port), daemon=True).start()
    pipe.send("listening")
    pipe.recv()


def _accept(listener: socket.socket, port: int) -> None:
    while True:
        near, _ = listener.accept()
        far = socket.create_connection((_SHARD_HOST, port))
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for ends in ((near, far), (far, near)):
            threading.Thread(target=_copy, args=ends, daemon=True).start()


def _copy(source: socket.socket, target: socket.socket) -> None:
    """Move what comes from one socket to another within the kernel."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    with suppress(OSError):
        while count := os.splice(source.fileno(), writing, _PIPE_BYTES):
            while count:
                count -= os.splice(reading, target.fileno(), count)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)
    os.close(reading)
    os.close(writing)
