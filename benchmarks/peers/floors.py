"""What the machine allows, with no store at all: a socket, a copy, the optimizer's kernel."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.blocks import Array, Blocks, Size, bytes_of
from benchmarks.peers.contestant import (
    About,
    Access,
    ClientBase,
    Contestant,
    Reach,
    Work,
    version_of,
)
from benchmarks.peers.server_process import ServerProcess

_READY = "listening on "
_LENGTH = struct.Struct("<Q")


class TcpServer:
    """A process that sends blocks as they are."""

    name = "raw tcp"

    def __init__(self) -> None:
        self._process: ServerProcess | None = None

    def about(self) -> About:
        # docstring inherited
        return About(
            version="sockets of Python's standard library",
            setup="sendall of a block's memory; recv_into with MSG_WAITALL; TCP_NODELAY",
            docs="https://docs.python.org/3/library/socket.html",
        )

    def start(self, folder: Path, num_clients: int, environment: Mapping[str, str]) -> str:
        # docstring inherited
        self._process = ServerProcess.of_module("floors", [], folder / "server.log", environment)
        return self._process.wait_for_line(_READY)

    def stop(self) -> None:
        # docstring inherited
        if self._process is not None:
            self._process.stop()


class NoServer:
    """What needs no server."""

    def __init__(self, name: str, about: About) -> None:
        self.name = name
        self._about = about

    def about(self) -> About:
        # docstring inherited
        return self._about

    def start(self, folder: Path, num_clients: int, environment: Mapping[str, str]) -> str:
        # docstring inherited
        return ""

    def stop(self) -> None:
        # docstring inherited
        return


class TcpClient(ClientBase):
    """Receives blocks into memory that it keeps.

    Parameters
    ----------
    access
        Port of the server.
    """

    def __init__(self, access: Access) -> None:
        self._socket = socket.create_connection(("127.0.0.1", int(access.address)))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._memory = ReusedMemory(access.blocks)

    def load(self, blocks: Mapping[str, Array]) -> None:
        # docstring inherited
        for key, array in blocks.items():
            _send(self._socket, {"load": key, "num_bytes": array.nbytes})
            self._socket.sendall(bytes_of(array))
            _receive(self._socket, bytearray(1))

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        _send(self._socket, {"fetch": list(keys)})
        places = self._memory.places(keys)
        for place in places:
            _receive(self._socket, place)
        return places

    def close(self) -> None:
        # docstring inherited
        self._socket.close()


class CopyClient(ClientBase):
    """Copies blocks from memory that it has to memory that it keeps.

    Parameters
    ----------
    access
        The blocks.
    """

    def __init__(self, access: Access) -> None:
        self._weights: dict[str, Array] = {}
        self._memory = ReusedMemory(access.blocks)

    def load(self, blocks: Mapping[str, Array]) -> None:
        # docstring inherited
        for key, array in blocks.items():
            self._weights[key] = aligned(array.size)
            self._weights[key][:] = array.reshape(-1)

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        places = self._memory.places(keys)
        for key, place in zip(keys, places, strict=True):
            np.copyto(place, self._weights[key])
        return places


class KernelClient(ClientBase):
    """Runs AdamW's fused kernel on blocks in its own memory, on one thread.

    Parameters
    ----------
    access
        Not used.
    """

    def __init__(self, access: Access) -> None:
        import torch

        torch.set_num_threads(1)
        self._weights: dict[str, Array] = {}
        self._states: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def load(self, blocks: Mapping[str, Array]) -> None:
        # docstring inherited
        for key, array in blocks.items():
            self._weights[key] = array.reshape(-1).copy()

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        return [self._weights[key] for key in keys]

    def push(self, key: str, gradient: Array) -> None:
        # docstring inherited
        import torch

        from benchmarks.peers.rules import adamw_step

        weight = torch.from_numpy(self._weights[key])
        if key not in self._states:
            self._states[key] = (torch.zeros_like(weight), torch.zeros_like(weight))
        adamw_step(weight, torch.from_numpy(gradient.reshape(-1)), self._states[key])


class ReusedMemory:
    """One place for a block of each size, and one for each of the small ones; all touched.

    Parameters
    ----------
    blocks
        The blocks.
    """

    def __init__(self, blocks: Blocks) -> None:
        *large, self._small = blocks.sizes
        self._single = {size.label: aligned(size.num_params) for size in (*large, self._small)}
        self._many = aligned(blocks.count(self._small.label) * self._small.num_params)

    def places(self, keys: Sequence[str]) -> list[Array]:
        """Return where the blocks `keys` go."""
        if len(keys) == 1:
            return [self._single[keys[0].partition("/")[0]]]
        return [_piece(self._many, self._small, number) for number in range(len(keys))]


def _piece(memory: Array, size: Size, number: int) -> Array:
    return memory[number * size.num_params : (number + 1) * size.num_params]


def aligned(count: int) -> Array:
    """Return `count` zeros, touched, that begin at a page.

    Where source and destination of a copy lie differently within their pages, some processors copy
    15 times slower.
    """
    memory = np.empty(4 * count + 4096, np.uint8)
    begin = -memory.ctypes.data % 4096
    array: Array = memory[begin : begin + 4 * count].view(np.float32)
    array[:] = 0
    return array


def _send(connection: socket.socket, message: object) -> None:
    data = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)


def _receive(connection: socket.socket, place: bytearray | Array) -> None:
    view = memoryview(place) if isinstance(place, bytearray) else bytes_of(place)
    received = 0
    while received < len(view):
        count = connection.recv_into(view[received:], flags=socket.MSG_WAITALL)
        if count == 0:
            raise ConnectionError("the other side closed the connection")
        received += count


def _serve_one(connection: socket.socket, blocks: dict[str, Array]) -> None:
    length = bytearray(_LENGTH.size)
    while True:
        try:
            _receive(connection, length)
        except ConnectionError:
            return
        data = bytearray(_LENGTH.unpack(length)[0])
        _receive(connection, data)
        message = json.loads(data)
        if "load" in message:
            block = aligned(message["num_bytes"] // 4)
            _receive(connection, block)
            blocks[message["load"]] = block
            connection.sendall(b"1")
        else:
            for key in message["fetch"]:
                connection.sendall(bytes_of(blocks[key]))


def _serve() -> None:
    blocks: dict[str, Array] = {}
    with socket.create_server(("127.0.0.1", 0)) as server:
        print(_READY + str(server.getsockname()[1]), flush=True)
        while True:
            connection, _ = server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_serve_one, args=(connection, blocks), daemon=True).start()


def contestants() -> list[Contestant]:
    """Return the three floors."""
    copying = About(
        version=f"numpy {version_of('numpy')}",
        setup="np.copyto between page-aligned arrays that were touched before",
        docs="https://numpy.org/doc/stable/reference/generated/numpy.copyto.html",
    )
    kernel = About(
        version=f"torch {version_of('torch')}",
        setup="torch.optim.adamw.adamw(fused=True) in place, one thread",
        docs="https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html",
        optimizer="AdamW, in the measuring process",
    )
    return [
        Contestant(
            name="raw tcp",
            server=TcpServer(),
            connect=TcpClient,
            reach=Reach.FLOOR,
            note="into reused memory",
            works=frozenset({Work.FETCH}),
            many_clients=True,
        ),
        Contestant(
            name="memcpy",
            server=NoServer("memcpy", copying),
            connect=CopyClient,
            reach=Reach.FLOOR,
            note="into reused memory",
            works=frozenset({Work.FETCH}),
        ),
        Contestant(
            name="fused adamw",
            server=NoServer("fused adamw", kernel),
            connect=KernelClient,
            reach=Reach.FLOOR,
            note="no transport, no journal",
            works=frozenset({Work.PUSH}),
            push_rule="adamw",
        ),
    ]


if __name__ == "__main__":
    _serve()
