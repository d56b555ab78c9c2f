"""Overwriting what the pools of this process keep of content that was deleted.

Pools hand memory out again as it is, so what was in it stays there until somebody else fills it: of a
deleted block, too. Whoever makes sure that a deletion is one calls `wipe_pools`.
"""

from __future__ import annotations

import weakref
from typing import Protocol

# By identity, of pools that are alive. Making, reading and removing an entry are one step each of a
# dict, so no lock is needed, which a forked child could find taken.
_POOLS: dict[int, weakref.ref[Wipeable]] = {}


class Wipeable(Protocol):
    """A pool of memory."""

    def wipe(self) -> None:
        """Overwrite with zeros all that nobody uses, now; and all that somebody uses, as it returns."""


def register(pool: Wipeable) -> None:
    """Let `wipe_pools` reach `pool` for as long as it lives."""
    identity = id(pool)
    _POOLS[identity] = weakref.ref(pool, lambda _: _POOLS.pop(identity, None))


def wipe_pools() -> None:
    """Wipe every pool of this process.

    Afterwards no pool holds a byte of what was given back to it before. Memory that is in use stays
    as it is, and is wiped as soon as nobody refers to it any more: that of readers who still send a
    block that has been deleted meanwhile, say.

    Notes
    -----
    It writes to as much memory as came back since the last time, and to nothing that was wiped
    already; so it may be called for each of many deletions.
    """
    for reference in list(_POOLS.values()):
        pool = reference()
        if pool is not None:
            pool.wipe()
