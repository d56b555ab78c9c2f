"""A cache around whatever fetches blocks (docs/client.md).

What a caller gets is decided by one rule: a fetch is answered from memory as a whole, where every
block of it was confirmed for the same revision, recently enough, and no change was heard of since;
otherwise the service is asked for all of it, and what is held and still right costs a header. So
neither a cached block nor a mixture of cached and fetched ones ever straddles a transaction.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from membank.client.blocks import BlockSource
from membank.client.cache.disk_tier import DiskStats, DiskTier
from membank.client.cache.listening import Ear
from membank.client.cache.store import BlockStore, Confirmation, KeptBlock
from membank.client.config import CacheConfig
from membank.client.deadline import Deadline
from membank.client.memory import FetchedBlocks
from membank.client.removals import STATE_OF_REFUSAL, HeardRemovals
from membank.client.transport.contract import PushAnswer
from membank.wire.errors import MembankError
from membank.wire.records import Block, BlockEvent, TransactionReport, Update
from membank.wire.spec import Array, BlockRef, BlockState
from membank.wire.wiping import wipe_pools

_LOGGER = logging.getLogger(__name__)
_NEVER = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheStats:
    """What a cache did since the client was made, and what it holds. Counts are of blocks."""

    num_hits: int
    """Answered without asking, from memory or from the disk."""
    num_confirmed: int
    """Asked for, and still right: a header travelled."""
    num_misses: int
    """Asked for, and something else came than was held: content, or that there is none."""
    num_evicted: int
    """Made room in memory for others."""
    num_blocks: int
    """Held in memory now."""
    num_bytes: int
    """Bytes of weights held in memory now."""
    num_bytes_saved: int
    """Bytes that did not travel."""
    disk: DiskStats | None = None
    """The disk tier; None where none is configured."""


@dataclass(slots=True, eq=False)
class _Asking:
    """A fetch that is under way."""

    at_s: float
    stamp: object
    kept: Mapping[BlockRef, KeptBlock]
    """What was held when it began."""
    offered: dict[BlockRef, Block]
    """What need not travel."""
    news: dict[BlockRef, int] = field(default_factory=dict)
    """Versions that were heard of meanwhile: its answer may be older."""


class CachedBlocks:
    """A `BlockSource` that holds what another one fetched; belongs to one event loop.

    Snapshots are read through it and not held: they are rarely read twice by one who also reads the
    present state, and whether their blocks may be used is a question about the present.

    Parameters
    ----------
    inner
        What is asked.
    config
        How stale an answer may be.
    store
        Holds the blocks.
    ear
        Hears of changes; is closed with the cache.
    disk
        Holds blocks that memory has no room for; is closed with the cache. None = nothing does.
    last_removal
        Asks for the newest revision at which something was withheld or deleted; None = what is not
        heard of is found out when it is asked for.
    clock
        Tells the time in seconds.
    """

    def __init__(
        self,
        inner: BlockSource,
        config: CacheConfig,
        *,
        store: BlockStore,
        ear: Ear,
        disk: DiskTier | None = None,
        last_removal: Callable[[], Awaitable[int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._inner = inner
        self._config = config
        self._store = store
        self._ear = ear
        self._disk = disk
        self._last_removal = last_removal
        self._clock = clock
        self._known_removal = 0  # there was none
        self._looked_in: object = _NEVER
        self._looking: asyncio.Task[None] | None = None
        self._asking: set[_Asking] = set()
        self._removals = HeardRemovals()
        self._heard_revision = 0
        self._num_doubts = 0
        self._num_hits = self._num_confirmed = self._num_misses = self._num_bytes_saved = 0

    @property
    def stats(self) -> CacheStats:
        """What it did and holds."""
        return CacheStats(
            num_hits=self._num_hits,
            num_confirmed=self._num_confirmed,
            num_misses=self._num_misses,
            num_evicted=self._store.num_evicted,
            num_blocks=len(self._store),
            num_bytes=self._store.num_bytes,
            num_bytes_saved=self._num_bytes_saved,
            disk=None if self._disk is None else self._disk.stats,
        )

    async def close(self) -> None:
        """Stop listening and let go of all blocks; those on the disk stay there."""
        await self._ear.close()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        if self._disk is not None:
            await self._disk.close()
        self._store.clear()

    async def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held: Mapping[BlockRef, Block],
        dtype: str,
        min_revision: int,
        snapshot: str,
        into: Mapping[BlockRef, Array] | None = None,
        deadline: Deadline,
    ) -> FetchedBlocks:
        """Return the blocks `refs`, all of one revision; see the module."""
        del into  # what is kept lies in memory of the cache's own
        if self._disk is not None:
            await self._disk.open()
        self._ear.listen(self.hear_event, self._look_for_missed_removals)
        self._look_for_missed_removals()
        if snapshot:
            return await self._pass_through(
                refs, held, dtype, min_revision, snapshot=snapshot, deadline=deadline
            )
        loaded = await self._load(refs, dtype)
        # What was let go meanwhile is in neither.
        kept = {
            ref: found
            for ref in refs
            if (found := self._store.get(ref, dtype) or loaded.get(ref)) is not None
        }
        min_revision = max(min_revision, self._heard_revision)
        if len(kept) == len(refs) and self._may_answer(kept.values(), min_revision):
            return self._answer(kept)
        offered = _offered(held, kept, dtype)
        with self._under_way(refs, kept, offered) as asking:
            fetched = await self._inner.fetch(
                refs,
                held=offered,
                dtype=dtype,
                min_revision=min_revision,
                snapshot="",
                deadline=deadline,
            )
            for ref, block in fetched.items():
                self._count(block, is_held=offered.get(ref) is block)
                self._take(block, fetched.revision, asking)
        return fetched

    async def push(self, update: Update, *, deadline: Deadline) -> PushAnswer:
        """Apply an update; whoever pushed it does not read what was before it."""
        if self._disk is not None:
            await self._disk.open()
        try:
            answer = await self._inner.push(update, deadline=deadline)
        except BaseException:
            # It may have been applied, whatever became of its answer.
            self._num_doubts += 1
            raise
        for result in answer.results:
            state = BlockState.ACTIVE
            if result.reason is not None:
                state = STATE_OF_REFUSAL.get(result.reason, state)
            self._hear(result.ref, result.version, state)
        return answer

    def hear_event(self, event: BlockEvent) -> None:
        """Take note of a change; what was confirmed for an earlier revision counts no longer."""
        self._heard_revision = max(self._heard_revision, event.revision)
        self._hear(event.ref, event.version, event.state)

    def hear_report(self, report: TransactionReport) -> None:
        """Take note of a transaction of this client's own."""
        self._heard_revision = max(self._heard_revision, report.revision)
        for change in report.changes:
            self._hear(change.ref, change.version_after, change.state_after)

    async def _pass_through(
        self,
        refs: Sequence[BlockRef],
        held: Mapping[BlockRef, Block],
        dtype: str,
        min_revision: int,
        *,
        snapshot: str,
        deadline: Deadline,
    ) -> FetchedBlocks:
        fetched = await self._inner.fetch(
            refs,
            held=held,
            dtype=dtype,
            min_revision=min_revision,
            snapshot=snapshot,
            deadline=deadline,
        )
        for ref, block in fetched.items():
            if block.header.state is not BlockState.ACTIVE:
                self._hear(ref, block.version, block.header.state)
        return fetched

    async def _load(self, refs: Sequence[BlockRef], dtype: str) -> dict[BlockRef, KeptBlock]:
        """Return what the disk has of blocks that are not in memory."""
        if self._disk is None:
            return {}
        wanted = [
            found
            for ref in refs
            if self._store.get(ref, dtype) is None
            and (found := self._disk.get(ref, dtype)) is not None
        ]
        return await self._disk.read(wanted) if wanted else {}

    def _look_for_missed_removals(self) -> None:
        """Find out, once in each span, whether something that is held was removed unheard."""
        if self._last_removal is None or self._ear.span == self._looked_in:
            return
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look(self._last_removal))

    async def _look(self, ask: Callable[[], Awaitable[int]]) -> None:
        # What is answered in one span says nothing of the gap before the next.
        while (span := self._ear.span) != self._looked_in:
            self._looked_in = span
            try:
                removal = await ask()
            except MembankError as err:
                _LOGGER.debug("whether blocks were removed is asked again: %s", err)
                self._looked_in = _NEVER
                return
            if removal > self._known_removal:
                self._known_removal = removal
                self._drop_all_before(removal)

    def _drop_all_before(self, removal: int) -> None:
        """Let go of all that was last seen before a removal that may have been missed.

        It is not known of which blocks it was; of others than those the content travels once more.
        """
        for kept in self._store.confirmed_before(removal):
            self._store.remove(kept.key)
            # A fetch that offers it lets go of it only at its end, and wipes it then.
            kept.is_withdrawn = True
            kept.wipe()
        if self._disk is not None:
            self._disk.remove_before(removal)
        wipe_pools()

    def _may_answer(self, kept: Iterable[KeptBlock], min_revision: int) -> bool:
        """Say whether blocks may be used together without asking."""
        confirmed = [each.confirmed for each in kept]
        stamp = self._stamp()
        if not confirmed or stamp is None or self._config.max_staleness_s == 0:
            return False
        oldest = self._clock() - self._config.max_staleness_s
        revisions = {each.revision for each in confirmed}
        return (
            len(revisions) == 1
            and min(revisions) >= min_revision
            and all(each.at_s > oldest and each.stamp == stamp for each in confirmed)
        )

    def _answer(self, kept: Mapping[BlockRef, KeptBlock]) -> FetchedBlocks:
        for each in kept.values():
            if self._store.get(*each.key) is each:
                self._store.use(each)
            else:
                self._store.put(each.block, each.confirmed)
            self._num_hits += 1
            self._num_bytes_saved += each.header.num_bytes
        revision = next(iter(kept.values())).confirmed.revision
        return FetchedBlocks(revision, (each.block for each in kept.values()))

    def _stamp(self) -> object:
        span = self._ear.span
        return None if span is None else (span, self._num_doubts)

    @contextmanager
    def _under_way(
        self,
        refs: Sequence[BlockRef],
        kept: Mapping[BlockRef, KeptBlock],
        offered: dict[BlockRef, Block],
    ) -> Iterator[_Asking]:
        asking = _Asking(self._clock(), self._stamp(), kept, offered, dict.fromkeys(refs, 0))
        self._asking.add(asking)
        try:
            yield asking
        finally:
            self._asking.discard(asking)
            # What was withdrawn meanwhile had a second holder until now: the offer.
            offered.clear()
            for each in kept.values():
                if each.is_withdrawn:
                    each.wipe()

    def _count(self, block: Block, *, is_held: bool) -> None:
        if is_held and block.weight is not None:
            self._num_confirmed += 1
            self._num_bytes_saved += block.header.num_bytes
        else:
            self._num_misses += 1

    def _take(self, block: Block, revision: int, asking: _Asking) -> None:
        """Keep what a service answered, unless something newer is known by now."""
        if block.weight is None:
            self._hear(block.ref, block.version, block.header.state)
            return
        if asking.news[block.ref] > block.version:
            return
        confirmed = Confirmation(revision, asking.at_s, asking.stamp)
        self._take_on_disk(block, confirmed, asking)
        present = self._store.get(block.ref, block.header.dtype)
        if present is None:
            self._store.put(block, confirmed)
        elif present.weight is block.weight:
            self._confirm(present, confirmed)
        elif block.version > present.version or present is asking.kept.get(block.ref):
            # What was offered and not confirmed is wrong, also where its version is the greater
            # one: a bank that lost a machine may have lost updates.
            self._store.put(block, confirmed)

    def _take_on_disk(self, block: Block, confirmed: Confirmation, asking: _Asking) -> None:
        """Do with a file what `_take` does with what is in memory."""
        if self._disk is None or (found := self._disk.get(*_key_of(block))) is None:
            return
        offered = asking.kept.get(block.ref)
        if found.holds(block):
            self._disk.confirm(found, confirmed)
        elif block.version >= found.version or (offered and offered.version == found.version):
            self._disk.remove(found)

    def _confirm(self, kept: KeptBlock, confirmed: Confirmation) -> None:
        self._store.use(kept)
        # Answers may overtake one another.
        if (confirmed.revision, confirmed.at_s) >= (kept.confirmed.revision, kept.confirmed.at_s):
            kept.confirmed = confirmed

    def _hear(self, ref: BlockRef, version: int, state: BlockState) -> None:
        """Let go of what is older than a change; overwrite what may not be used any more."""
        is_withdrawn = state is not BlockState.ACTIVE
        for asking in self._asking:
            if ref in asking.news:
                asking.news[ref] = max(asking.news[ref], version)
            asked = asking.kept.get(ref)
            if is_withdrawn and asked is not None and asked.version <= version:
                asked.is_withdrawn = True
        for kept in list(self._store.copies(ref)):
            if is_withdrawn and kept.version <= version:
                self._store.remove(kept.key)
                kept.wipe()
            elif kept.version < version:
                self._store.remove(kept.key)
        # After these: what they held is idle by now, or is wiped when its last reader lets go.
        self._removals.hear(ref, version, state)
        if self._disk is None:
            return
        for found in list(self._disk.copies(ref)):
            if found.version < version or (is_withdrawn and found.version == version):
                self._disk.remove(found, erase=is_withdrawn)


def _key_of(block: Block) -> tuple[BlockRef, str]:
    return (block.ref, block.header.dtype)


def _offered(
    held: Mapping[BlockRef, Block], kept: Mapping[BlockRef, KeptBlock], dtype: str
) -> dict[BlockRef, Block]:
    """Return what need not travel: of the caller's blocks and the cache's, the newer ones."""
    offered = {
        ref: block
        for ref, block in held.items()
        if block.weight is not None and block.header.dtype == dtype
    }
    for ref, each in kept.items():
        if ref not in offered or offered[ref].version < each.version:
            offered[ref] = each.block
    return offered
