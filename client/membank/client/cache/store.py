"""The blocks that a cache holds, within a bound of bytes; which one goes is decided here."""

from __future__ import annotations

import heapq
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from membank.client.config import CacheConfig, Eviction
from membank.wire.codec import FETCH_CODECS
from membank.wire.records import Block, BlockHeader
from membank.wire.spec import Array, BlockRef

_Key = tuple[BlockRef, str]
_Rank = tuple[bool, int, int]

# The attribute, or a variable, and the argument of getrefcount.
_OWN_REFERENCES = 2
_SPARE_RANKS = 64


@dataclass(frozen=True, slots=True)
class Confirmation:
    """When, and for which state of the bank, a service said that a block is right."""

    revision: int
    """Revision of that answer."""
    at_s: float
    """When it was asked: the block was right then, or later."""
    stamp: object
    """What was heard of changes at that moment; None = nobody listened."""


@dataclass(slots=True, eq=False)
class KeptBlock:
    """A block in the cache."""

    header: BlockHeader
    """As it came with the content."""
    weight: Array
    """Read-only; callers may hold it too."""
    confirmed: Confirmation
    """Last word of the service."""
    uses: int = 0
    """How often it was asked for."""
    rank: _Rank = (False, 0, 0)
    """The least one goes first."""
    is_withdrawn: bool = False
    """True once the block was withheld or deleted."""

    @property
    def version(self) -> int:
        """Version of the content."""
        return self.header.version

    @property
    def key(self) -> _Key:
        """Block and element type that it was fetched in."""
        return (self.header.ref, self.header.dtype)

    @property
    def block(self) -> Block:
        """The block for a caller; each gets one of its own, so that `wipe` can count them."""
        return Block(header=self.header, weight=self.weight)

    def wipe(self) -> None:
        """Overwrite the weight with zeros, unless somebody else still reads it."""
        is_alone = sys.getrefcount(self.weight) == _OWN_REFERENCES
        owner = self.weight
        if isinstance(self.weight.base, np.ndarray):
            # Views of views refer to what is under all of them, so this counts those too.
            owner = self.weight.base
            is_alone &= sys.getrefcount(owner) == _OWN_REFERENCES + 1  # and that of the weight
        # Pooled memory is seen through a memoryview of its own.
        is_pooled = owner.flags.writeable and isinstance(owner.base, memoryview)
        if is_alone and (owner.flags.owndata or is_pooled):
            owner.flags.writeable = True
            owner.fill(0)


class BlockStore:
    """Keeps blocks, and lets the least ranked go where they would exceed the bound.

    A rank says first whether the level is pinned, then, under LFU, how often the block was asked
    for, then how long ago. A newcomer is ranked like all others and may be the one that goes: so
    what is pinned stays as long as there is room for it at all.

    Parameters
    ----------
    config
        Bound and policy.
    demote
        Takes a block that memory has no room for, and says whether it has it; None = nobody does.

    Notes
    -----
    Under LFU each count starts from that of the last block that went, so that what was asked for
    often, but long ago, goes in the end (LFU with dynamic aging).
    """

    def __init__(
        self, config: CacheConfig, demote: Callable[[Block, Confirmation], bool] | None = None
    ) -> None:
        self._config = config
        self._demote = demote or _to_nobody
        self._pinned = frozenset(config.pinned_levels)
        self._passed_on = frozenset(() if config.disk is None else config.disk.direct_levels)
        self._kept: dict[_Key, KeptBlock] = {}
        # Ranks of the past stay in the heap until they come up or are too many.
        self._ranks: list[tuple[_Rank, _Key]] = []
        self._ticks = itertools.count()
        self._floor = 0
        self.num_bytes = 0
        """Bytes of the weights that are kept."""
        self.num_evicted = 0
        """Blocks that made room for others."""

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, ref: BlockRef, dtype: str) -> KeptBlock | None:
        """Return what is kept of a block in an element type."""
        return self._kept.get((ref, dtype))

    def copies(self, ref: BlockRef) -> Iterator[KeptBlock]:
        """Yield what is kept of a block in any element type."""
        return (kept for dtype in FETCH_CODECS if (kept := self.get(ref, dtype)) is not None)

    def confirmed_before(self, revision: int) -> list[KeptBlock]:
        """Return the blocks that were last found right before `revision`."""
        return [kept for kept in self._kept.values() if kept.confirmed.revision < revision]

    def use(self, kept: KeptBlock) -> None:
        """Take note that a block was asked for."""
        kept.uses += 1
        self._rank(kept)

    def put(self, block: Block, confirmed: Confirmation) -> None:
        """Keep a block with content in the place of an earlier version of it."""
        self.remove((block.ref, block.header.dtype))
        if block.weight is None:
            return
        if block.ref.level in self._passed_on and self._demote(block, confirmed):
            return
        if block.weight.nbytes > self._config.max_bytes:
            self._demote(block, confirmed)
            return
        kept = KeptBlock(header=block.header, weight=block.weight, confirmed=confirmed)
        self._kept[kept.key] = kept
        self.num_bytes += kept.weight.nbytes
        self.use(kept)
        while self.num_bytes > self._config.max_bytes:
            self._evict()

    def remove(self, key: _Key) -> None:
        """Let go of a block, if it is kept."""
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.num_bytes -= kept.weight.nbytes

    def clear(self) -> None:
        """Let go of all blocks."""
        self._kept.clear()
        self._ranks.clear()
        self.num_bytes = 0

    def _rank(self, kept: KeptBlock) -> None:
        counts = self._config.eviction is Eviction.LFU
        uses = self._floor + kept.uses if counts else 0
        kept.rank = (kept.header.ref.level in self._pinned, uses, next(self._ticks))
        heapq.heappush(self._ranks, (kept.rank, kept.key))
        if len(self._ranks) > 2 * len(self._kept) + _SPARE_RANKS:
            self._ranks = [(each.rank, each.key) for each in self._kept.values()]
            heapq.heapify(self._ranks)

    def _evict(self) -> None:
        """Let the least ranked block go."""
        while True:
            rank, key = heapq.heappop(self._ranks)
            kept = self._kept.get(key)
            if kept is not None and kept.rank == rank:
                break
        self._floor = rank[1]
        self.num_evicted += 1
        self.remove(key)
        self._demote(kept.block, kept.confirmed)


def _to_nobody(block: Block, confirmed: Confirmation) -> bool:
    return False
