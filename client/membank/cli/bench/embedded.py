"""A service of one's own to measure: a new bank in a folder, its shards in processes of their own.

The shards are those of `membank up`, without Ray and the gateway, which fetches and pushes do not
pass through.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from membank.bank_service.cluster.identity import ShardSettings
from membank.bank_service.rpc.server import ServerConfig
from membank.bank_service.shard import ShardConfig
from membank.bank_service.store import Bank
from membank.cli.bench.child_process import Child
from membank.wire.records import PartitionOwner, Placement
from membank.wire.spec import BankSpec

_IN_FLIGHT_BYTES = 4 << 30
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 60.0


class EmbeddedService:
    """Serves a new bank while its context lasts.

    Parameters
    ----------
    folder
        Where the bank is made; must not exist, unless `make` finds it there.
    spec
        What it is.
    num_shards
        Shards, each in a process of its own; no more than the bank has partitions.
    resident_bytes
        Bytes of blocks and optimizer state that each shard keeps in memory.
    make
        Makes the bank; None = one that nothing was written to.

    Raises
    ------
    MembankError
        What kept a shard from starting.
    """

    def __init__(
        self,
        folder: Path,
        spec: BankSpec,
        *,
        num_shards: int,
        resident_bytes: int,
        make: Callable[[Path, BankSpec], object] | None = None,
    ) -> None:
        (make or _new_bank)(folder, spec)
        self._shards: list[Child] = []
        try:
            self.endpoint = self._start(folder, spec, num_shards, resident_bytes)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> tuple[int, ...]:
        """Processes of the shards."""
        return tuple(shard.pid for shard in self._shards)

    def close(self) -> None:
        """End the shards in order; the folder stays."""
        for shard in self._shards:
            shard.let_go()
        for shard in self._shards:
            shard.end(_STOP_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self, folder: Path, spec: BankSpec, num_shards: int, resident_bytes: int) -> str:
        parts = [tuple(range(n, spec.num_partitions, num_shards)) for n in range(num_shards)]
        for number, partitions in enumerate(parts):
            settings = ShardSettings(
                shard_id=f"shard-{number}",
                bank_url=str(folder),
                partitions=partitions,
                server=ServerConfig(host="127.0.0.1", port=0),
                shard=ShardConfig(resident_bytes=resident_bytes),
                max_in_flight_bytes=_IN_FLIGHT_BYTES,
            )
            self._shards.append(Child(f"shard {number}", _serve, settings))
        endpoints = [str(shard.receive(_START_TIMEOUT_S)) for shard in self._shards]
        owners = [
            PartitionOwner(partition=partition, shard_id=f"shard-{number}", endpoint=endpoint)
            for number, endpoint in enumerate(endpoints)
            for partition in parts[number]
        ]
        owners.sort(key=lambda owner: owner.partition)
        for shard in self._shards:
            shard.send(Placement(generation=1, owners=tuple(owners)))
        for shard in self._shards:
            shard.receive(_START_TIMEOUT_S)
        return endpoints[0]


def _new_bank(folder: Path, spec: BankSpec) -> None:
    Bank.create(str(folder), spec)


def _serve(settings: ShardSettings, pipe: Connection) -> None:
    """Serve a shard until the other end of `pipe` is closed."""
    import torch

    from membank.bank_service.cluster.shard_server import ShardServer

    # As a shard of `membank up` does: thread pools of several shards would only thrash.
    torch.set_num_threads(1)
    server = ShardServer(settings)
    try:
        pipe.send(server.identity.endpoint)
        server.set_placement(pipe.recv())
        pipe.send("serving")
        pipe.recv()
    finally:
        server.stop()
