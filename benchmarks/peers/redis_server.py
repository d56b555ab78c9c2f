"""Redis: a block is a string, a fetch MGET, an update a read-modify-write in the client.

Set up as https://redis.io/docs/latest/operate/oss_and_stack/management/config/ describes a cache
(no snapshots, no append-only file); the client is redis-py with hiredis, the parser that its README
recommends for large replies (https://github.com/redis/redis-py#installation).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.peers.blocks import Array, bytes_of
from benchmarks.peers.contestant import (
    About,
    Access,
    ClientBase,
    Contestant,
    NotRunError,
    Reach,
    version_of,
)
from benchmarks.peers.server_process import ServerProcess, free_port

if TYPE_CHECKING:
    import redis

_READ_BYTES = 1 << 20
"""Bytes that the client asks its socket for at a time; 64 KiB, the default, is a little slower."""


class RedisServer:
    """``redis-server`` of the system, on a port and a socket in the file system."""

    name = "redis"

    def __init__(self) -> None:
        self._process: ServerProcess | None = None

    def about(self) -> About:
        # docstring inherited
        program = shutil.which("redis-server")
        if program is None:
            raise NotRunError("no redis-server here; scripts/peers/install.sh installs it")
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        version = answer.stdout.split("v=")[1].split()[0]
        return About(
            version=f"redis-server {version}, redis-py {version_of('redis')}, "
            f"hiredis {version_of('hiredis')}",
            setup="--save '' --appendonly no; socket_read_size of 1 MiB in the client",
            docs="https://redis.io/docs/latest/operate/oss_and_stack/management/config/",
            optimizer="Adagrad in the client: MGET of weight and sum, torch's fused kernel, MSET",
        )

    def start(self, folder: Path, num_clients: int, environment: Mapping[str, str]) -> str:
        # docstring inherited
        port, unix = free_port(), folder / "redis.sock"
        self._process = ServerProcess(
            ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--unixsocket", str(unix),
             "--save", "", "--appendonly", "no", "--dir", str(folder)],
            folder / "server.log",
            environment,
        )  # fmt: skip
        self._process.wait_for_port(port)
        return f"{port} {unix}"

    def stop(self) -> None:
        # docstring inherited
        if self._process is not None:
            self._process.stop()


class RedisClient(ClientBase):
    """redis-py, as it comes.

    Parameters
    ----------
    connection
        The connection.
    """

    def __init__(self, connection: redis.Redis) -> None:
        self._redis = connection

    def load(self, blocks: Mapping[str, Array]) -> None:
        # docstring inherited
        for key, array in blocks.items():
            self._redis.set(key, bytes_of(array))

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        values = [self._redis.get(keys[0])] if len(keys) == 1 else self._redis.mget(keys)
        return [np.frombuffer(value, np.float32) for value in values]

    def push(self, key: str, gradient: Array) -> None:
        # docstring inherited
        import torch

        from benchmarks.peers.rules import adagrad_step

        read, sums_read = self._redis.mget([key, f"{key}/sum"])
        # What was read is immutable, and torch updates in place.
        weight = np.frombuffer(read, np.float32).copy()
        sums = np.zeros_like(weight)
        if sums_read is not None:
            sums = np.frombuffer(sums_read, np.float32).copy()
        adagrad_step(*(torch.from_numpy(a) for a in (weight, gradient.reshape(-1), sums)))
        self._redis.mset({key: bytes_of(weight), f"{key}/sum": bytes_of(sums)})

    def close(self) -> None:
        # docstring inherited
        self._redis.close()


def _over_tcp(access: Access) -> RedisClient:
    import redis

    port, _ = access.address.split()
    return RedisClient(redis.Redis("127.0.0.1", int(port), socket_read_size=_READ_BYTES))


def _over_unix(access: Access) -> RedisClient:
    import redis

    _, path = access.address.split()
    return RedisClient(redis.Redis(unix_socket_path=path, socket_read_size=_READ_BYTES))


def contestants() -> list[Contestant]:
    """Return Redis over TCP and over a UNIX socket."""
    server = RedisServer()
    return [
        Contestant(
            name="redis tcp",
            server=server,
            connect=_over_tcp,
            reach=Reach.NETWORK,
            note="GET, or MGET of several; into new bytes objects, as redis-py gives them",
            many_clients=True,
        ),
        Contestant(
            name="redis unix",
            server=server,
            connect=_over_unix,
            reach=Reach.SAME_HOST,
            note="as redis tcp, over a UNIX socket",
        ),
    ]
