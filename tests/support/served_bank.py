"""A bank on disk behind real shards and real gRPC, all in this process."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from membank.bank_service.cluster.identity import ShardSettings
from membank.bank_service.cluster.shard_server import ShardServer
from membank.bank_service.rpc.server import ServerConfig
from membank.bank_service.shard import ShardConfig
from membank.bank_service.store import Bank
from membank.wire.records import PartitionOwner, Placement
from membank.wire.spec import BankSpec

_IN_FLIGHT_BYTES = 64 << 20


class ServedBank:
    """Serves a new bank by two shards, each with half of the partitions.

    Parameters
    ----------
    folder
        Where the bank is made; must not exist.
    spec
        What it is.
    """

    def __init__(self, folder: Path, spec: BankSpec) -> None:
        self.url = str(folder)
        Bank.create(self.url, spec)
        numbers = range(spec.num_partitions)
        self._settings = [
            ShardSettings(
                shard_id=f"shard-{half}",
                bank_url=self.url,
                partitions=tuple(n for n in numbers if n % 2 == half),
                server=ServerConfig(host="127.0.0.1", port=0),
                shard=ShardConfig(),
                max_in_flight_bytes=_IN_FLIGHT_BYTES,
            )
            for half in range(2)
        ]
        self._generation = 0
        self.shards = [ShardServer(settings) for settings in self._settings]
        self._tell_placement()

    @property
    def endpoint(self) -> str:
        """Address of the first shard."""
        return self.shards[0].identity.endpoint

    def restart(self, number: int) -> None:
        """Stop a shard and start it again from what is on disk, at another address."""
        self.shards[number].stop()
        self.shards[number] = ShardServer(self._settings[number])
        self._tell_placement()

    def _tell_placement(self) -> None:
        self._generation += 1
        owners = [
            PartitionOwner(
                partition=partition,
                shard_id=settings.shard_id,
                endpoint=shard.identity.endpoint,
            )
            for settings, shard in zip(self._settings, self.shards, strict=True)
            for partition in settings.partitions
        ]
        placement = Placement(
            generation=self._generation, owners=tuple(sorted(owners, key=lambda o: o.partition))
        )
        for shard in self.shards:
            shard.set_placement(placement)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for shard in self.shards:
            shard.stop()
