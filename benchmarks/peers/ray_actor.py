"""A Ray actor as parameter server: methods return blocks, which travel through the object store.

As in https://docs.ray.io/en/latest/ray-core/examples/plot_parameter_server.html, where the server is
an actor whose method returns the weights. What a method returns is copied into the object store, and
the caller maps it there. Who wants no copy keeps blocks in the object store to begin with
(https://docs.ray.io/en/latest/ray-core/objects/serialization.html#numpy-arrays): the actor hands out
references then.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
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
    Work,
    version_of,
)
from benchmarks.peers.rules import Adagrad
from benchmarks.peers.server_process import ServerProcess

if TYPE_CHECKING:
    import ray

_READY = "ray at "
_ACTOR = "blocks"
_NAMESPACE = "peers"
_STORE_BYTES = 2 << 30
_ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
"""Where a user has a token, a Ray that is started asks for it, and a driver does not send it. And
its workers would yield to everything else on the machine, which nobody else's server does."""
_HOST = "127.0.0.2"
"""Ray takes 127.0.0.1 for a mistake and dials an address of the network instead."""


class RayServer:
    """A Ray of its own with one actor."""

    name = "ray actor"

    def __init__(self) -> None:
        self._process: ServerProcess | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def about(self) -> About:
        # docstring inherited
        version = version_of("ray")
        if version is None:
            raise NotRunError("ray is not installed")
        return About(
            version=f"ray {version}",
            setup="one node, object store of 2 GiB in /dev/shm, workers not nice; one actor, its calls "
            "one by one",
            docs="https://docs.ray.io/en/latest/ray-core/examples/plot_parameter_server.html",
            optimizer="Adagrad in the actor, torch's fused kernel",
        )

    def start(self, folder: Path, num_clients: int, environment: Mapping[str, str]) -> str:
        # docstring inherited
        # Not in `folder`: Ray's sockets lie deep, and the name of a socket has at most 107 bytes.
        self._folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
        self._process = ServerProcess.of_module(
            "ray_actor",
            [self._folder.name],
            folder / "server.log",
            {**environment, **_ENVIRONMENT},
        )
        return self._process.wait_for_line(_READY)

    def stop(self) -> None:
        # docstring inherited
        if self._process is not None:
            self._process.stop()
        if self._folder is not None:
            self._folder.cleanup()


class RayClient(ClientBase):
    """A driver that calls the actor.

    Parameters
    ----------
    access
        Address of the Ray.
    """

    def __init__(self, access: Access) -> None:
        import ray

        ray.init(
            address=access.address,
            namespace=_NAMESPACE,
            log_to_driver=False,
            _node_ip_address=_HOST,
        )
        self._get: Any = ray.get
        self._actor: Any = ray.get_actor(_ACTOR)

    def load(self, blocks: Mapping[str, Array]) -> None:
        # docstring inherited
        for key, array in blocks.items():
            self._get(self._actor.store.remote(key, array))

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        arrays: Sequence[Array] = self._get(self._actor.blocks.remote(keys))
        return arrays

    def push(self, key: str, gradient: Array) -> None:
        # docstring inherited
        self._get(self._actor.apply.remote(key, gradient))


class RayViewClient(RayClient):
    """A driver that asks for references and maps what they refer to."""

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        arrays: Sequence[Array] = self._get(self._get(self._actor.references.remote(keys)))
        return arrays


class _Blocks:
    """The actor."""

    def __init__(self) -> None:
        self._weights: dict[str, Array] = {}
        self._references: dict[str, ray.ObjectRef[Array]] = {}
        self._adagrad = Adagrad()

    def store(self, key: str, weight: Array) -> None:
        # An argument lies in the object store, read-only; updates are in place.
        self._weights[key] = weight.copy()
        self._references.pop(key, None)

    def blocks(self, keys: list[str]) -> list[Array]:
        return [self._weights[key] for key in keys]

    def references(self, keys: list[str]) -> list[ray.ObjectRef[Array]]:
        import ray

        for key in keys:
            if key not in self._references:
                self._references[key] = ray.put(self._weights[key])
        return [self._references[key] for key in keys]

    def apply(self, key: str, gradient: Array) -> None:
        import torch

        weight = torch.from_numpy(self._weights[key]).reshape(-1)
        # A read-only view would make torch warn; nothing writes into it.
        self._adagrad.step(key, weight, torch.frombuffer(gradient, dtype=torch.float32))
        self._references.pop(key, None)


def _serve(folder: str) -> None:
    import ray

    stopped = threading.Event()
    context: Any = ray.init(
        namespace=_NAMESPACE,
        num_cpus=4,
        object_store_memory=_STORE_BYTES,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address=_HOST,
        _temp_dir=folder,
    )
    # After `init`, which sets a handler of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: stopped.set())
    remote: Any = ray.remote(_Blocks)
    actor = remote.options(name=_ACTOR, lifetime="detached").remote()
    ray.get(actor.blocks.remote([]))
    print(_READY + context.address_info["address"], flush=True)
    stopped.wait()
    ray.shutdown()


def contestants() -> list[Contestant]:
    """Return the copying and the viewing read of one actor."""
    server = RayServer()
    return [
        Contestant(
            name="ray actor",
            server=server,
            connect=RayClient,
            reach=Reach.SAME_HOST,
            note="the method's answer is copied into the object store and mapped by the client",
            many_clients=True,
            environment=_ENVIRONMENT,
        ),
        Contestant(
            name="ray view",
            server=server,
            connect=RayViewClient,
            reach=Reach.VIEW,
            note="the actor answers with references; the client maps what they refer to",
            works=frozenset({Work.FETCH}),
            environment=_ENVIRONMENT,
        ),
    ]


if __name__ == "__main__":
    _serve(sys.argv[1])
