"""torch.distributed.rpc: a parameter server whose methods are called remotely.

As in https://docs.pytorch.org/tutorials/intermediate/rpc_param_server_tutorial.html: the server
joins the group under a name and does nothing; `rpc_sync` runs functions there. TensorPipe chooses
its transport itself, on one machine shared memory and ``process_vm_readv``; to see what it does over
a network, a second server is held to sockets.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers.blocks import Array
from benchmarks.peers.contestant import (
    About,
    Access,
    ClientBase,
    Contestant,
    NotRunError,
    Reach,
    version_of,
)
from benchmarks.peers.rules import Adagrad
from benchmarks.peers.server_process import ServerProcess, free_port

if TYPE_CHECKING:
    import torch
    from torch.distributed.rpc import TensorPipeRpcBackendOptions

_SERVER = "server"
_READY = "joining"
_WEIGHTS: dict[str, torch.Tensor] = {}
"""Blocks of the server's process: RPCs are functions, and find what they work on here."""
_ADAGRAD = Adagrad()


class TorchRpcServer:
    """A process of a group that keeps the blocks.

    Parameters
    ----------
    over_tcp
        True holds TensorPipe to sockets.
    """

    def __init__(self, *, over_tcp: bool) -> None:
        self.name = "torch rpc tcp" if over_tcp else "torch rpc"
        self._over_tcp = over_tcp
        self._process: ServerProcess | None = None

    def about(self) -> About:
        # docstring inherited
        version = version_of("torch")
        if version is None:
            raise NotRunError("torch is not installed")
        chosen = "transport uv, channel basic" if self._over_tcp else "transport of its own choice"
        return About(
            version=f"torch {version}, TensorPipe",
            setup=f"{chosen}; otherwise as it comes",
            docs="https://docs.pytorch.org/tutorials/intermediate/rpc_param_server_tutorial.html",
            optimizer="Adagrad in the callee, torch's fused kernel",
        )

    def start(self, folder: Path, num_clients: int, environment: Mapping[str, str]) -> str:
        # docstring inherited
        address = f"{free_port()} {1 + num_clients} {int(self._over_tcp)}"
        self._process = ServerProcess.of_module(
            "torch_rpc", address.split(), folder / "server.log", environment
        )
        # Not until it serves: it waits for the clients, all of which must join at the beginning.
        self._process.wait_for_line(_READY)
        return address

    def stop(self) -> None:
        # docstring inherited
        if self._process is not None:
            self._process.stop()


class TorchRpcClient(ClientBase):
    """A caller.

    Parameters
    ----------
    access
        Port, size of the group, and how to reach it.
    """

    def __init__(self, access: Access) -> None:
        from torch.distributed import rpc

        port, world_size, over_tcp = map(int, access.address.split())
        rpc.init_rpc(
            f"client{access.number}",
            # The server is the first of the group.
            rank=1 + access.number,
            world_size=world_size,
            rpc_backend_options=_options(port, over_tcp=bool(over_tcp)),
        )
        self._call = partial(rpc.rpc_sync, _SERVER)

    def load(self, blocks: Mapping[str, Array]) -> None:
        # docstring inherited
        import torch

        for key, array in blocks.items():
            # Contents are read-only, of which torch would warn.
            self._call(_store, args=(key, torch.from_numpy(array.reshape(-1).copy())))

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        return [tensor.numpy() for tensor in self._call(_blocks, args=(list(keys),))]

    def push(self, key: str, gradient: Array) -> None:
        # docstring inherited
        import torch

        self._call(_apply, args=(key, torch.from_numpy(gradient).reshape(-1)))


def _store(key: str, weight: torch.Tensor) -> None:
    _WEIGHTS[key] = weight.clone()


def _blocks(keys: list[str]) -> list[torch.Tensor]:
    return [_WEIGHTS[key] for key in keys]


def _apply(key: str, gradient: torch.Tensor) -> None:
    _ADAGRAD.step(key, _WEIGHTS[key], gradient)


def _options(port: int, *, over_tcp: bool) -> TensorPipeRpcBackendOptions:
    from torch.distributed import rpc

    held: dict[str, Any] = {"_transports": ["uv"], "_channels": ["basic"]} if over_tcp else {}
    return rpc.TensorPipeRpcBackendOptions(init_method=f"tcp://127.0.0.1:{port}", **held)


def _serve(port: int, world_size: int, over_tcp: int) -> None:
    from torch.distributed import rpc

    print(_READY, flush=True)
    options = _options(port, over_tcp=bool(over_tcp))
    rpc.init_rpc(_SERVER, rank=0, world_size=world_size, rpc_backend_options=options)
    rpc.shutdown()


def contestants() -> list[Contestant]:
    """Return torch's RPC as it comes, and over sockets."""
    return [
        Contestant(
            name=server.name,
            server=server,
            connect=TorchRpcClient,
            reach=reach,
            note="rpc_sync of a function that returns tensors; into tensors that TensorPipe allocates",
            many_clients=True,
        )
        for server, reach in (
            (TorchRpcServer(over_tcp=True), Reach.NETWORK),
            (TorchRpcServer(over_tcp=False), Reach.SAME_HOST),
        )
    ]


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
