"""Mooncake Store: blocks lie in the memory of a storage process; the client reads into its own.

As in https://kvcache-ai.github.io/Mooncake/python-api-reference/mooncake-store.html: `get_into` with
a buffer that was registered once is the read without a copy. There is no server-side code: an update
reads weight and sum, runs the optimizer in the client, and writes both by `upsert_from`.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.blocks import Array, Blocks
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

_READY = "mounted"
_SEGMENT_BYTES = 2 << 30
_CLIENT_TTL_S = 3600
"""Seconds of silence after which the master takes a process for lost, and its blocks. While others are
measured all are silent; with the default of 10 all blocks would be gone after."""
_PACKAGE = "mooncake-transfer-engine-non-cuda"


class MooncakeServer:
    """A master and a process that lends its memory."""

    name = "mooncake store"

    def __init__(self) -> None:
        self._processes: list[ServerProcess] = []

    def about(self) -> About:
        # docstring inherited
        if find_spec("mooncake") is None:
            raise NotRunError(f"{_PACKAGE} is not installed")
        try:
            import mooncake.store  # noqa: F401  (the libraries of the system that it needs)
        except ImportError as err:
            raise NotRunError(f"{err}; scripts/peers/install.sh installs what it needs") from err
        return About(
            version=f"{_PACKAGE} {version_of(_PACKAGE)}",
            setup="one master, one storage process with a segment of 2 GiB, protocol tcp, "
            "metadata by P2PHANDSHAKE, client_ttl of an hour",
            docs="https://kvcache-ai.github.io/Mooncake/python-api-reference/mooncake-store.html",
            optimizer="Adagrad in the client: weight and sum by get_into, torch's fused kernel, "
            "upsert_from of both",
        )

    def start(self, folder: Path, num_clients: int, environment: Mapping[str, str]) -> str:
        # docstring inherited
        port = free_port()
        master = ServerProcess(
            [str(Path(sys.executable).with_name("mooncake_master")), f"--rpc_port={port}",
             f"--metrics_port={free_port()}", f"--client_ttl={_CLIENT_TTL_S}"],
            folder / "master.log",
            environment,
        )  # fmt: skip
        self._processes.append(master)
        master.wait_for_port(port)
        address = f"127.0.0.1:{port}"
        storage = ServerProcess.of_module(
            "mooncake_store", [address], folder / "storage.log", environment
        )
        self._processes.append(storage)
        storage.wait_for_line(_READY)
        return address

    def stop(self) -> None:
        # docstring inherited
        for process in reversed(self._processes):
            process.stop()


class MooncakeClient(ClientBase):
    """A client without memory for others, and with a registered buffer.

    Parameters
    ----------
    access
        Address of the master.
    """

    def __init__(self, access: Access) -> None:
        self._store = _connected(access.address, segment_bytes=0)
        self._blocks = access.blocks
        count = max(
            2 * max(s.num_params for s in access.blocks.sizes), _params_of_many(self._blocks)
        )
        self._buffer = np.zeros(count, np.float32)
        _check(self._store.register_buffer(self._buffer.ctypes.data, self._buffer.nbytes))

    def load(self, blocks: Mapping[str, Array]) -> None:
        # docstring inherited
        for key, array in blocks.items():
            (place,) = self._places([key])
            place[:] = array.reshape(-1)
            _check(self._store.upsert_from(key, place.ctypes.data, place.nbytes))

    def fetch(self, keys: Sequence[str]) -> Sequence[Array]:
        # docstring inherited
        places = self._places(keys)
        if len(keys) == 1:
            _check(self._store.get_into(keys[0], places[0].ctypes.data, places[0].nbytes))
        else:
            addresses = [place.ctypes.data for place in places]
            sizes = [place.nbytes for place in places]
            _check(min(self._store.batch_get_into(list(keys), addresses, sizes)))
        return places

    def push(self, key: str, gradient: Array) -> None:
        # docstring inherited
        import torch

        from benchmarks.peers.rules import adagrad_step

        weight, sums = self._places([key, key])
        _check(self._store.get_into(key, weight.ctypes.data, weight.nbytes))
        # Below 0: there is none yet.
        if self._store.get_into(f"{key}/sum", sums.ctypes.data, sums.nbytes) < 0:
            sums[:] = 0
        adagrad_step(*(torch.from_numpy(a) for a in (weight, gradient.reshape(-1), sums)))
        _check(self._store.upsert_from(key, weight.ctypes.data, weight.nbytes))
        _check(self._store.upsert_from(f"{key}/sum", sums.ctypes.data, sums.nbytes))

    def close(self) -> None:
        # docstring inherited
        self._store.close()

    def _places(self, keys: Sequence[str]) -> list[Array]:
        """Return a place in the registered buffer for each of `keys`, one behind the other."""
        places, begin = [], 0
        for key in keys:
            end = begin + self._blocks.size(key.partition("/")[0]).num_params
            places.append(self._buffer[begin:end])
            begin = end
        return places


def _params_of_many(blocks: Blocks) -> int:
    """Return the parameters of all of the smallest blocks, which are asked for at once."""
    smallest = blocks.sizes[-1]
    return blocks.count(smallest.label) * smallest.num_params


def _connected(master: str, *, segment_bytes: int) -> Any:  # noqa: ANN401  (ships no types)
    from mooncake.store import MooncakeDistributedStore

    store = MooncakeDistributedStore()
    _check(store.setup("127.0.0.1", "P2PHANDSHAKE", segment_bytes, 64 << 20, "tcp", "", master))
    return store


def _check(code: int) -> None:
    if code < 0:
        raise RuntimeError(f"Mooncake Store answered {code}")


def _serve(master: str) -> None:
    store = _connected(master, segment_bytes=_SEGMENT_BYTES)
    print(_READY, flush=True)
    signal.sigwait({signal.SIGTERM})
    store.close()


def contestants() -> list[Contestant]:
    """Return Mooncake Store over TCP."""
    return [
        Contestant(
            name="mooncake store",
            server=MooncakeServer(),
            connect=MooncakeClient,
            reach=Reach.NETWORK,
            note="get_into, or batch_get_into of several; into one registered, reused buffer",
            many_clients=True,
        )
    ]


if __name__ == "__main__":
    # Blocked before Mooncake starts threads, one of which would otherwise take the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    _serve(sys.argv[1])
