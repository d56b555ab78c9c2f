"""Chunk sizes of the payload streams: what gRPC carries in one, beside a plain socket.

    python benchmarks/chunks.py [--bytes N] [--rounds N]

A process sends N bytes, framed as the data path frames them, and this one puts them into a buffer
that it uses again; in turn, the same over a socket. Nothing is checked and no block is looked up:
the table says what is left to win, and which `CHUNK_BYTES` to choose.
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
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import numpy as np

from membank.v1 import block_service_pb2 as pb
from membank.wire.buffers import keep_freed_memory
from membank.wire.data_messages import DataCodec, data_of
from membank.wire.framing import MAX_MESSAGE_BYTES, iter_parts

_METHOD = "/chunks/send"
_CODEC = DataCodec(pb.FetchBlocksResponse)
_OPTIONS = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
_CHUNKS = [size << 10 for size in (64, 256, 512, 1024, 2048, 4096)]


def serve(num_bytes: int) -> None:
    """Send `num_bytes` to whoever asks, over gRPC and over a socket, until the input ends."""
    keep_freed_memory()
    payload = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8)

    def send(request: bytes, _: grpc.ServicerContext) -> Iterator[bytes]:
        return map(_CODEC.encode, iter_parts([payload], chunk_bytes=int(request)))

    server = grpc.server(ThreadPoolExecutor(2))
    handler = grpc.unary_stream_rpc_method_handler(send)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("chunks", {"send": handler}),)
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
    keep_freed_memory()
    target = np.zeros(num_bytes, np.uint8)
    plain = socket.create_connection(("127.0.0.1", socket_port))
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{grpc_port}", _OPTIONS)
    method: grpc.aio.UnaryStreamMultiCallable[bytes, pb.FetchBlocksResponse | memoryview]
    method = channel.unary_stream(_METHOD, response_deserializer=_CODEC.deserialize)

    async def by_grpc(chunk_bytes: int) -> None:
        filled = 0
        async for message in method(str(chunk_bytes).encode()):
            data = np.frombuffer(data_of(message), np.uint8)
            target[filled : filled + data.size] = data
            filled += data.size

    async def by_socket() -> None:
        plain.sendall(b"x")
        filled = 0
        while filled < num_bytes:
            filled += plain.recv_into(target.data[filled:])

    print("chunk KiB   gRPC GB/s   socket GB/s   gRPC/socket")
    for chunk_bytes in _CHUNKS:
        await by_grpc(chunk_bytes)
        pairs = [
            (await _seconds(by_grpc(chunk_bytes)), await _seconds(by_socket()))
            for _ in range(rounds)
        ]
        ours, theirs = (
            num_bytes / 1e9 / statistics.median(each) for each in zip(*pairs, strict=True)
        )
        ratio = statistics.median(raw / own for own, raw in pairs)
        print(f"{chunk_bytes >> 10:9} {ours:11.2f} {theirs:13.2f} {ratio:13.2f}", flush=True)
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
