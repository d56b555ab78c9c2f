"""Ray nodes, several on this machine, and a service whose shards are on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from membank.bank_service.cluster import status
from membank.client import BankClient
from membank.wire.errors import UnavailableError
from membank.wire.spec import BlockRef

HEAD: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100 << 20, "include_dashboard": False}
"""How the first node is made."""
WORKER: dict[str, Any] = {"num_cpus": 2, "object_store_memory": 100 << 20}
"""How another one is made."""


def nodes_of(runtime_dir: Path | None = None) -> int:
    """Return on how many nodes there are shards, once all of them answer; 0 before."""
    try:
        shards = status(runtime_dir=runtime_dir).shards
    except UnavailableError:
        return 0  # the controller was on a node that is lost, and is being started elsewhere
    return len({shard.node_id for shard in shards}) if all(s.alive for s in shards) else 0


def push_to_all(client: BankClient, versions: dict[BlockRef, int]) -> dict[BlockRef, int]:
    """Push to every block once; return the versions then."""
    spec = client.info().spec
    ones = {ref: np.ones(spec.block_shape(ref.level), np.float32) for ref in versions}
    answer = client.push(ones, base=versions)
    assert not answer.refused
    return dict(answer.versions)


def push_until_on(client: BankClient, *, num_nodes: int, runtime_dir: Path | None = None) -> int:
    """Push to every block until shards are on `num_nodes`; return how often.

    The test's timeout bounds it.
    """
    versions, pushed = dict.fromkeys(client.info().spec.blocks(), 0), 0
    while nodes_of(runtime_dir) != num_nodes:
        versions, pushed = push_to_all(client, versions), pushed + 1
        assert set(versions.values()) == {pushed}
    return pushed
