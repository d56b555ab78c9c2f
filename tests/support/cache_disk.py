"""What the tests of the cache's disk tier share."""

from __future__ import annotations

from pathlib import Path

from cache_rig import CacheRig
from fake_bank import SPEC
from membank.client import DiskStats
from membank.client.cache.disk_files import TRAILER_BYTES
from membank.wire.spec import Array, BlockRef

TOP, OTHER, THIRD, LEAF = BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2), BlockRef(2, 1)
TOP_BYTES = SPEC.weight_bytes(1)
FILE_BYTES = TOP_BYTES + TRAILER_BYTES


def stats_of(rig: CacheRig) -> DiskStats:
    stats = rig.cache.stats.disk
    assert stats is not None
    return stats


def files_of(rig: CacheRig) -> list[Path]:
    assert rig.config.disk is not None
    return sorted(rig.config.disk.directory.glob("bank-*/*"))


def weight_of(rig: CacheRig, ref: BlockRef) -> Array:
    return rig.bank.held(ref).weight


async def demote(rig: CacheRig) -> Path:
    """Have TOP fetched and driven out of memory; return its file."""
    await rig.fetch(TOP)
    await rig.fetch(OTHER)
    await rig.settle()
    (path,) = (path for path in files_of(rig) if path.name.startswith("1-0-"))
    return path
