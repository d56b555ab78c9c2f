"""Which blocks stay: bounds, ranks, and bytes that are overwritten."""

from pathlib import Path

import numpy as np
import pytest

from membank.client import CacheConfig, DiskTierConfig, Eviction
from membank.client.cache.store import BlockStore, Confirmation, KeptBlock
from membank.wire.buffers import MIN_POOLED_BYTES, BufferPool
from membank.wire.records import Block, BlockHeader
from membank.wire.spec import BlockRef

BLOCK_BYTES = 64
CONFIRMED = Confirmation(0, 0.0, None)


def store_of(num_blocks: int, **fields: object) -> BlockStore:
    """Return a store with room for so many blocks."""
    return BlockStore(CacheConfig(max_bytes=num_blocks * BLOCK_BYTES, **fields))  # type: ignore[arg-type]  # of several types


def block(ref: BlockRef, *, num_bytes: int = BLOCK_BYTES, dtype: str = "float32") -> Block:
    """Return a block whose weight is a view, as those are that came over the network."""
    weight = np.full(num_bytes, 7, np.uint8).view(np.float32).reshape(2, -1)
    weight.flags.writeable = False
    return Block(header=BlockHeader(ref=ref, version=1, dtype=dtype), weight=weight)


def put(store: BlockStore, *refs: BlockRef) -> None:
    for ref in refs:
        store.put(block(ref), CONFIRMED)


def use(store: BlockStore, ref: BlockRef, times: int = 1) -> None:
    for _ in range(times):
        kept = store.get(ref, "float32")
        assert kept is not None
        store.use(kept)


def held(store: BlockStore, *refs: BlockRef) -> list[bool]:
    return [store.get(ref, "float32") is not None for ref in refs]


A, B, C, D = (BlockRef(2, cluster) for cluster in range(4))
TOP = BlockRef(1, 0)


class TestRoom:
    def test_bytes_are_bounded(self) -> None:
        store = store_of(2)
        put(store, A, B, C)
        assert (len(store), store.num_bytes, store.num_evicted) == (2, 2 * BLOCK_BYTES, 1)

    def test_what_never_fits_drives_nothing_out(self) -> None:
        store = store_of(2)
        put(store, A, B)
        store.put(block(C, num_bytes=3 * BLOCK_BYTES), CONFIRMED)
        assert held(store, A, B, C) == [True, True, False]

    def test_a_later_version_takes_the_place_of_the_earlier(self) -> None:
        store = store_of(2)
        put(store, A, A)
        assert (len(store), store.num_bytes, store.num_evicted) == (1, BLOCK_BYTES, 0)

    def test_element_types_are_kept_apart(self) -> None:
        store = store_of(2)
        put(store, A)
        store.put(block(A, dtype="float16"), CONFIRMED)
        assert len(list(store.copies(A))) == 2

    def test_ranks_of_the_past_do_not_pile_up(self) -> None:
        store = store_of(2)
        put(store, A, B)
        use(store, A, times=10_000)
        assert len(store._ranks) < 100
        put(store, C)
        assert held(store, A, B, C) == [True, False, True]

    def test_what_goes_is_offered_to_the_next_level(self) -> None:
        offered: list[BlockRef] = []

        def demote(block: Block, confirmed: Confirmation) -> bool:
            offered.append(block.ref)
            return True

        disk = DiskTierConfig(directory=Path("unused"), direct_levels=(1,))
        store = BlockStore(CacheConfig(max_bytes=BLOCK_BYTES, disk=disk), demote)
        put(store, A, TOP)
        assert (held(store, A, TOP), offered) == ([True, False], [TOP])
        put(store, B)
        store.put(block(C, num_bytes=2 * BLOCK_BYTES), CONFIRMED)
        assert (held(store, B, C), offered) == ([True, False], [TOP, A, C])

    def test_clear(self) -> None:
        store = store_of(2)
        put(store, A, B)
        store.clear()
        put(store, C)
        assert (len(store), store.num_bytes) == (1, BLOCK_BYTES)


class TestWhoGoes:
    def test_lru_the_one_used_longest_ago(self) -> None:
        store = store_of(2)
        put(store, A, B)
        use(store, A)
        put(store, C)
        assert held(store, A, B, C) == [True, False, True]

    def test_lfu_the_one_used_least(self) -> None:
        store = store_of(3, eviction=Eviction.LFU)
        put(store, A, B, C)
        use(store, A, times=5)
        use(store, C)
        put(store, D)
        assert held(store, A, B, C, D) == [True, False, True, True]

    def test_lfu_the_older_of_two_that_were_used_alike(self) -> None:
        store = store_of(2, eviction=Eviction.LFU)
        put(store, A, B, C)
        assert held(store, A, B, C) == [False, True, True]

    def test_lfu_forgets_what_was_popular_long_ago(self) -> None:
        store = store_of(2, eviction=Eviction.LFU)
        put(store, A)
        use(store, A, times=20)
        put(store, *(BlockRef(2, cluster) for cluster in range(10, 70)))
        assert held(store, A) == [False]

    @pytest.mark.parametrize("eviction", list(Eviction))
    def test_pinned_levels_stay(self, eviction: Eviction) -> None:
        store = store_of(2, pinned_levels=(1,), eviction=eviction)
        put(store, TOP, A)
        use(store, A, times=9)
        put(store, B, C)
        assert held(store, TOP) == [True]

    def test_pinned_levels_leave_no_room_for_others(self) -> None:
        store = store_of(2, pinned_levels=(1,))
        put(store, TOP, BlockRef(1, 1), A)
        assert held(store, TOP, BlockRef(1, 1), A) == [True, True, False]

    def test_pinned_levels_share_what_room_there_is(self) -> None:
        store = store_of(2, pinned_levels=(1,))
        put(store, TOP, BlockRef(1, 1), BlockRef(1, 2))
        assert held(store, TOP, BlockRef(1, 1), BlockRef(1, 2)) == [False, True, True]


class TestWipe:
    def taken(self, given: Block) -> KeptBlock:
        store = store_of(1)
        store.put(given, CONFIRMED)
        kept = store.get(A, "float32")
        assert kept is not None
        return kept

    def test_what_nobody_else_holds_is_overwritten(self) -> None:
        kept = self.taken(block(A))
        kept.wipe()
        assert not kept.weight.any()

    def test_an_array_that_is_no_view_too(self) -> None:
        weight = np.full(BLOCK_BYTES // 4, 7, np.float32)
        weight.flags.writeable = False
        header = BlockHeader(ref=A, version=1)
        given = Block(header=header, weight=weight)
        del weight
        kept = self.taken(given)
        del given
        kept.wipe()
        assert not kept.weight.any()

    def test_pooled_memory_too(self) -> None:
        weight = BufferPool(1 << 20).take(MIN_POOLED_BYTES).view(np.float32).reshape(2, -1)
        weight[:] = 7
        weight.flags.writeable = False
        store = store_of(MIN_POOLED_BYTES)
        store.put(Block(header=BlockHeader(ref=A, version=1), weight=weight), CONFIRMED)
        kept = store.get(A, "float32")
        assert kept is not None
        kept.wipe()
        assert kept.weight.all()
        del weight
        kept.wipe()
        assert not kept.weight.any()

    def test_what_a_caller_reads_is_not(self) -> None:
        kept = self.taken(block(A))
        given = kept.block
        kept.wipe()
        assert given.weight is not None
        assert given.weight.all()

    def test_nor_what_a_caller_sees_a_part_of(self) -> None:
        kept = self.taken(block(A))
        part = kept.weight[0]
        kept.wipe()
        assert part.all()

    def test_nor_what_is_not_the_own_memory(self) -> None:
        weight = np.frombuffer(b"\x07" * BLOCK_BYTES, np.float32)
        kept = self.taken(Block(header=BlockHeader(ref=A, version=1), weight=weight))
        del weight
        kept.wipe()
        assert kept.weight.all()
