"""What a client holds of a block that was removed while it could not hear of it, and idle memory."""

from __future__ import annotations

import ctypes

from cache_rig import CacheRig
from membank.client.removals import HeardRemovals
from membank.wire.buffers import MIN_POOLED_BYTES, BufferPool
from membank.wire.records import BlockHeader
from membank.wire.spec import BlockRef, BlockState

TOP, OTHER = BlockRef(1, 0), BlockRef(1, 1)


async def test_a_removal_in_a_gap_is_found_out_when_the_streams_are_on_again() -> None:
    rig = CacheRig()
    await rig.fetch(TOP, OTHER)
    await rig.settle()
    rig.ear.span = None
    rig.set_state(TOP, BlockState.DELETED)
    rig.ear.span = 2
    rig.ear.hear_again()
    await rig.settle()
    # Nobody fetched. Of which block it was is not known, so none is held that was seen before it.
    assert rig.cache.stats.num_blocks == 0
    fetched = await rig.fetch(TOP, OTHER)
    assert fetched.weights.keys() == {OTHER}


async def test_what_was_confirmed_since_a_removal_stays() -> None:
    rig = CacheRig()
    await rig.fetch(TOP)
    rig.set_state(OTHER, BlockState.DELETED)
    rig.tell(OTHER)
    await rig.fetch(TOP)
    rig.ear.span = 2
    rig.ear.hear_again()
    await rig.settle()
    assert rig.cache.stats.num_blocks == 1


async def test_a_removal_between_two_gaps_is_asked_for_once_more() -> None:
    """What is answered before the streams are on says nothing of what happens until they are."""
    rig = CacheRig()
    await rig.fetch(TOP)
    await rig.settle()
    rig.ear.span = 2
    rig.ear.hear_again()  # asks, and is not answered before the next span begins
    rig.set_state(TOP, BlockState.DELETED)
    rig.ear.span = 3
    rig.ear.hear_again()
    await rig.settle()
    assert rig.cache.stats.num_blocks == 0


def idle(pool: BufferPool) -> int:
    """Leave idle memory full of ones in a pool; return its address."""
    memory = pool.take(MIN_POOLED_BYTES)
    memory[:] = 1
    return memory.ctypes.data


def is_wiped(address: int) -> bool:
    return not any(ctypes.string_at(address, MIN_POOLED_BYTES))


def test_idle_memory_is_wiped_once_for_each_removal() -> None:
    pool, removals = BufferPool(1 << 20), HeardRemovals()
    address = idle(pool)
    removals.hear(TOP, 3, BlockState.ACTIVE)
    assert not is_wiped(address)
    removals.hear(TOP, 4, BlockState.DELETED)
    assert is_wiped(address)
    assert idle(pool) == address
    removals.hear_answer([BlockHeader(ref=TOP, version=4, state=BlockState.DELETED)])
    assert not is_wiped(address), "it is known already"
    removals.hear_answer([BlockHeader(ref=OTHER, version=1, state=BlockState.WITHHELD)])
    assert is_wiped(address)


async def test_idle_memory_is_wiped_when_the_cache_hears_of_a_removal() -> None:
    pool, rig = BufferPool(1 << 20), CacheRig()
    address = idle(pool)
    await rig.fetch(TOP)
    assert not is_wiped(address)
    rig.set_state(TOP, BlockState.DELETED)
    rig.tell(TOP)
    assert is_wiped(address)
