"""Which shard owns which partition, and where it listens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.records import PartitionOwner, Placement


def assign_partitions(num_partitions: int, shard_ids: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Deal partitions to shards in turn.

    The result depends on nothing but its arguments, so a controller that starts again finds the
    partitions where it left them.

    Parameters
    ----------
    num_partitions
        Partitions of the bank.
    shard_ids
        The shards.

    Returns
    -------
    dict[str, tuple[int, ...]]
        Partitions of each shard, at least one.

    Raises
    ------
    InvalidArgumentError
        If there are more shards than partitions.
    """
    if not 1 <= len(shard_ids) <= num_partitions:
        raise InvalidArgumentError(
            f"{len(shard_ids)} shards for {num_partitions} partitions; give 1 to {num_partitions} "
            "shards, or create the bank with more partitions",
            reason=Reason.BAD_CONFIG,
            metadata={"num_shards": str(len(shard_ids)), "num_partitions": str(num_partitions)},
        )
    return {
        shard_id: tuple(range(index, num_partitions, len(shard_ids)))
        for index, shard_id in enumerate(shard_ids)
    }


def next_move(nodes: Sequence[str], located: Mapping[str, str]) -> tuple[str, str] | None:
    """Return which shard to move to which node so that nodes carry equally many; None = enough.

    Parameters
    ----------
    nodes
        Nodes that are there.
    located
        Node of each shard.

    Returns
    -------
    tuple[str, str] | None
        Shard and node. A difference of one is left alone, so moving comes to an end.
    """
    carried: dict[str, list[str]] = {node: [] for node in nodes}
    for shard_id, node in sorted(located.items()):
        carried.setdefault(node, []).append(shard_id)
    if not nodes:
        return None
    emptiest = min(nodes, key=lambda node: (len(carried[node]), node))
    fullest = max(carried, key=lambda node: (len(carried[node]), node))
    if len(carried[fullest]) - len(carried[emptiest]) < 2:
        return None
    return carried[fullest][-1], emptiest


class PlacementTable:
    """The placement in force. Safe to use from threads.

    Parameters
    ----------
    partitions
        Partitions of each shard.
    clock
        Seconds since 1970-01-01 UTC.
    """

    def __init__(
        self, partitions: Mapping[str, tuple[int, ...]], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._partitions = dict(partitions)
        self._clock = clock
        self._lock = threading.Lock()
        self._endpoints: dict[str, str] = {}
        self._generation = 0

    def set_endpoint(self, shard_id: str, endpoint: str) -> None:
        """Note where a shard listens."""
        with self._lock:
            if self._endpoints.get(shard_id) == endpoint:
                return
            self._endpoints[shard_id] = endpoint
            # The clock keeps generations growing across controllers, which share no counter.
            self._generation = max(self._generation + 1, int(self._clock()))

    def current(self) -> Placement:
        """Return the placement; shards that never came up are left out."""
        with self._lock:
            owners = [
                PartitionOwner(partition=partition, shard_id=shard_id, endpoint=endpoint)
                for shard_id, endpoint in self._endpoints.items()
                for partition in self._partitions[shard_id]
            ]
            return Placement(
                generation=self._generation,
                owners=tuple(sorted(owners, key=lambda owner: owner.partition)),
            )
