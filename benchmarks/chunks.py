"""Chunk sizes of the payload streams: what a fetch carries in one, beside a plain socket.

    python benchmarks/chunks.py [--bytes N] [--rounds N]

A process sends a block of N bytes as the data path frames them, and this one receives it as a client
does, into memory that it uses again; in turn, the same over grpcio and over a socket. No block is
looked up and the socket's bytes are not checked: the table says what is left to win, and which
`CHUNK_BYTES` to choose.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import grpc
import numpy as np

from membank.client.config import ClientConfig
from membank.client.transport.data_calls import ChannelCalls, DataCalls
from membank.client.transport.data_port import DataPort
from membank.client.transport.direct_calls import DirectCalls
from membank.client.transport.grpc_channel import GrpcChannel
from membank.client.transport.landing import Landing
from membank.v1 import block_service_pb2 as pb
from membank.wire.buffers import BufferPool, keep_freed_memory
from membank.wire.convert import header_to_pb
from membank.wire.crc import crc32c
from membank.wire.data_messages import DataCodec
from membank.wire.framing import iter_parts
from membank.wire.records import BlockHeader
from membank.wire.spec import BlockRef, BlockState

_SERVICE = "membank.v1.BlockService"
_CODEC = DataCodec(pb.FetchBlocksResponse)
_REF = BlockRef(1, 0)
_CHUNKS = [size << 10 for size in (64, 256, 512, 1024, 2048, 4096)]


def serve(num_bytes: int) -> None:
    """Send `num_bytes` to whoever asks, over gRPC and over a socket, until the input ends."""
    keep_freed_memory()
    payload = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)
    header = BlockHeader(
        ref=_REF,
        version=0,
        state=BlockState.ACTIVE,
        dtype="float32",
        shape=(num_bytes // 4,),
        num_bytes=num_bytes,
        crc32c=crc32c(payload),
    )
    head = pb.FetchBlocksResponse(headers=[header_to_pb(header)]).SerializeToString()

    def send(request: pb.FetchBlocksRequest, _: grpc.ServicerContext) -> Iterator[bytes]:
        chunks = iter_parts([payload], chunk_bytes=int(request.bank))
        return chain([head], map(_CODEC.encode, chunks))

    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_stream_rpc_method_handler(
        send, request_deserializer=pb.FetchBlocksRequest.FromString
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_SERVICE, {"FetchBlocks": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(port, listener.getsockname()[1], flush=True)
        connection, _ = listener.accept()
        with connection:
            while connection.recv(1):
                connection.sendall(payload.data)
    os._exit(0)  # gRPC's threads need not be waited for


async def measure(grpc_port: int, socket_port: int, num_bytes: int, rounds: int) -> None:
    """Print a row for each chunk size."""
    target = np.zeros(num_bytes, np.uint8)
    plain = socket.create_connection(("127.0.0.1", socket_port))
    endpoint, config = f"127.0.0.1:{grpc_port}", ClientConfig()
    channel = GrpcChannel(endpoint, config)
    data_port = DataPort()
    grpcio = ChannelCalls(channel, max_answer_bytes=num_bytes, data_port=data_port)
    direct = DirectCalls(endpoint, config, grpcio, data_port)
    landing = Landing(BufferPool(0), {_REF: target})

    async def by(calls: DataCalls, chunk_bytes: int) -> None:
        request = pb.FetchBlocksRequest(bank=str(chunk_bytes))
        await calls.fetch(request, [_REF], landing, timeout_s=60.0)

    async def by_socket() -> None:
        plain.sendall(b"x")
        filled = 0
        while filled < num_bytes:
            filled += plain.recv_into(target.data[filled:])

    print("chunk KiB   direct GB/s   grpcio GB/s   socket GB/s   direct/socket   grpcio/socket")
    for chunk_bytes in _CHUNKS:
        ways: list[Callable[[], Awaitable[None]]] = [
            lambda size=chunk_bytes: by(direct, size),
            lambda size=chunk_bytes: by(grpcio, size),
            by_socket,
        ]
        times = [[await _seconds(way()) for way in ways] for _ in range(rounds + 1)][1:]
        speeds = [num_bytes / 1e9 / statistics.median(each) for each in zip(*times, strict=True)]
        ratios = [statistics.median(each[2] / each[way] for each in times) for way in (0, 1)]
        print(
            f"{chunk_bytes >> 10:9} {speeds[0]:13.2f} {speeds[1]:13.2f} {speeds[2]:13.2f} "
            f"{ratios[0]:15.2f} {ratios[1]:15.2f}",
            flush=True,
        )
    assert not direct.stats.fallbacks, direct.stats
    await direct.close()
    await channel.close()
    plain.close()


async def _seconds(transfer: Awaitable[None]) -> float:
    begin = time.perf_counter()
    await transfer
    return time.perf_counter() - begin


def main() -> None:
    """Start the sender, and measure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bytes", type=int, default=32 << 20, help="bytes of one transfer")
    parser.add_argument("--rounds", type=int, default=11, help="pairs of transfers per row")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.bytes)
    command = [sys.executable, __file__, "--serve", "--bytes", str(options.bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
        assert sender.stdout is not None
        grpc_port, socket_port = map(int, sender.stdout.readline().split())
        asyncio.run(measure(grpc_port, socket_port, options.bytes, options.rounds))


if __name__ == "__main__":
    main()
