"""When a cached block is used, asked for again, and let go; with a clock and an ear of the test's."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from cache_rig import CacheRig, ones
from fake_bank import SPEC
from faults import Fault
from membank.client import FetchedBlocks, PushAnswer
from membank.client.deadline import Deadline
from membank.wire.codec import FETCH_CODECS
from membank.wire.errors import UnavailableError
from membank.wire.records import BlockEvent, Update
from membank.wire.spec import BlockRef, BlockState
from membank.wire.steps import Delete

# 1/0 and what is under it lie on the first shard, 1/1 on the second.
TOP, LEAF, OTHER = BlockRef(1, 0), BlockRef(2, 1), BlockRef(1, 1)


class TestAskedEveryTime:
    async def test_what_has_not_changed_does_not_travel(self) -> None:
        rig = CacheRig()
        first = await rig.fetch(TOP, LEAF)
        second = await rig.fetch(TOP, LEAF)
        assert (rig.num_asked, rig.num_sent, rig.counts) == (2, 2, (0, 2, 2))
        for ref in (TOP, LEAF):
            assert second[ref].weight is first[ref].weight
        assert rig.cache.stats.num_bytes_saved == SPEC.weight_bytes(1) + SPEC.weight_bytes(2)

    async def test_what_has_changed_does(self) -> None:
        rig = CacheRig()
        await rig.fetch(TOP, LEAF)
        rig.swap(LEAF)
        fetched = await rig.fetch(TOP, LEAF)
        assert (rig.num_sent, fetched.versions) == (3, {TOP: 0, LEAF: 1})
        np.testing.assert_array_equal(fetched[LEAF].weight, 3 * ones(LEAF))
        assert rig.cache.stats.num_blocks == 2

    async def test_element_types_are_not_mixed_up(self) -> None:
        rig = CacheRig()
        await rig.fetch(TOP)
        half = await rig.fetch(TOP, dtype="float16")
        assert half[TOP].header.dtype == "float16"
        assert (rig.num_sent, rig.cache.stats.num_blocks) == (2, 2)

    async def test_what_came_in_an_encoding_is_not_taken_for_the_block(self) -> None:
        rig = CacheRig()
        rough = await rig.fetch(TOP, dtype="int8")
        exact = await rig.fetch(TOP, held=rough)
        np.testing.assert_array_equal(exact[TOP].weight, rig.bank.held(TOP).weight)
        again = await rig.fetch(TOP, dtype="int8", held=exact)
        assert again[TOP].weight is rough[TOP].weight
        assert (rig.num_sent, rig.cache.stats.num_blocks) == (2, 2)
        # What need not travel is what travelled the first time.
        assert rig.cache.stats.num_bytes_saved == rough[TOP].header.num_bytes

    @pytest.mark.parametrize("dtype", FETCH_CODECS)
    async def test_what_is_withheld_is_let_go_however_it_came(self, dtype: str) -> None:
        rig = CacheRig()
        await rig.fetch(TOP, dtype=dtype)
        rig.cache.hear_event(BlockEvent(ref=TOP, version=1, state=BlockState.WITHHELD, revision=1))
        assert rig.cache.stats.num_blocks == 0

    async def test_of_the_callers_block_and_its_own_the_newer_is_offered(self) -> None:
        rig = CacheRig()
        held = await rig.fetch(TOP)
        rig.swap(TOP)
        newer = await rig.fetch(TOP)
        assert (await rig.fetch(TOP, held=held))[TOP].weight is newer[TOP].weight
        other = CacheRig()
        assert (await other.fetch(TOP, held=held))[TOP] is held[TOP]
        assert other.num_sent == 0

    async def test_nothing_costs_nothing(self) -> None:
        rig = CacheRig(max_staleness_s=9.0)
        assert (len(await rig.fetch()), rig.num_asked) == (0, 0)


class TestFromMemory:
    async def test_what_was_confirmed_not_long_ago_is_not_asked_for(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        first = await rig.fetch(TOP, LEAF)
        rig.now_s += 9.9
        second = await rig.fetch(LEAF, TOP)
        assert list(second) == [LEAF, TOP]
        assert (second.revision, rig.num_asked, rig.counts) == (first.revision, 1, (2, 0, 2))
        rig.now_s += 0.1
        await rig.fetch(LEAF, TOP)
        assert (rig.num_asked, rig.num_sent) == (2, 2)
        rig.now_s += 9.9
        await rig.fetch(LEAF, TOP)
        assert rig.num_asked == 2

    async def test_a_change_that_was_heard_of_is_fetched(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP)
        rig.swap(TOP)
        assert (await rig.fetch(TOP)).versions == {TOP: 0}
        rig.tell(TOP)
        assert rig.cache.stats.num_blocks == 0
        assert (await rig.fetch(TOP)).versions == {TOP: 1}

    async def test_old_news_is_none(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP)
        rig.tell(TOP)
        await rig.fetch(TOP)
        assert rig.num_asked == 1

    async def test_only_while_nothing_is_missed(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP)
        rig.ear.span = None
        await rig.fetch(TOP)
        rig.ear.span = 2
        await rig.fetch(TOP)
        assert (rig.num_asked, rig.num_sent) == (3, 1)
        await rig.fetch(TOP)
        assert rig.num_asked == 3

    async def test_a_break_between_question_and_answer_counts(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        rig.network.after_fetch = lambda: setattr(rig.ear, "span", 2)
        await rig.fetch(TOP)
        await rig.fetch(TOP)
        assert rig.num_asked == 2

    async def test_if_one_must_be_asked_for_all_are(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP)
        rig.swap(TOP, OTHER)
        fetched = await rig.fetch(TOP, OTHER)
        assert (fetched.revision, fetched.versions) == (1, {TOP: 1, OTHER: 1})

    async def test_blocks_of_two_revisions_are_not_mixed(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP)
        rig.swap(TOP, OTHER)
        await rig.fetch(OTHER)
        fetched = await rig.fetch(TOP, OTHER)
        assert (fetched.revision, fetched.versions) == (1, {TOP: 1, OTHER: 1})

    async def test_no_revision_that_the_caller_is_past(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP)
        rig.swap(OTHER)
        assert (await rig.fetch(TOP, min_revision=1)).revision == 1
        assert (rig.num_asked, rig.num_sent) == (2, 1)

    async def test_a_transaction_that_was_heard_of_is_waited_for(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP)
        rig.bank.shards[0].lags = True
        rig.swap(TOP, OTHER)
        rig.tell(OTHER)
        assert (await rig.fetch(TOP)).versions == {TOP: 1}


class TestRemoval:
    @pytest.mark.parametrize("state", [BlockState.WITHHELD, BlockState.DELETED])
    async def test_at_once_when_it_is_heard_of(self, state: BlockState) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP, OTHER)
        kept = rig.store.get(TOP, "float32")
        rig.set_state(TOP, state)
        rig.tell(TOP)
        assert kept is not None
        assert not kept.weight.any()
        assert (rig.store.get(TOP, "float32"), rig.cache.stats.num_blocks) == (None, 1)
        assert (await rig.fetch(TOP)).states == {TOP: state}

    async def test_a_caller_keeps_what_it_reads(self) -> None:
        rig = CacheRig()
        fetched = await rig.fetch(TOP)
        before = np.array(fetched[TOP].weight)
        rig.set_state(TOP, BlockState.WITHHELD)
        rig.tell(TOP)
        np.testing.assert_array_equal(fetched[TOP].weight, before)

    async def test_when_an_answer_says_so(self) -> None:
        rig = CacheRig()
        await rig.fetch(TOP)
        kept = rig.store.get(TOP, "float32")
        rig.set_state(TOP, BlockState.WITHHELD)
        await rig.fetch(TOP)
        assert kept is not None
        assert not kept.weight.any()
        assert rig.cache.stats.num_blocks == 0

    async def test_when_it_is_heard_of_while_it_is_asked_for(self) -> None:
        rig = CacheRig()
        await rig.fetch(TOP)
        kept = rig.store.get(TOP, "float32")
        rig.set_state(TOP, BlockState.WITHHELD)
        rig.network.after_fetch = lambda: rig.tell(TOP)
        await rig.fetch(TOP)
        assert kept is not None
        assert not kept.weight.any()

    async def test_when_a_push_is_refused_for_it(self) -> None:
        rig = CacheRig()
        await rig.fetch(TOP)
        rig.set_state(TOP, BlockState.WITHHELD)
        await rig.push(TOP, base=0)
        assert rig.cache.stats.num_blocks == 0

    async def test_when_a_reader_of_a_snapshot_is_told(self) -> None:
        rig = CacheRig()
        rig.bank.create_snapshot("then")
        await rig.fetch(TOP)
        rig.set_state(TOP, BlockState.DELETED)
        await rig.fetch(TOP, snapshot="then")
        assert rig.cache.stats.num_blocks == 0

    async def test_not_by_news_from_before_its_restoration(self) -> None:
        rig = CacheRig()
        rig.set_state(TOP, BlockState.WITHHELD)
        event = BlockEvent(ref=TOP, version=1, state=BlockState.WITHHELD, revision=1)
        rig.set_state(TOP, BlockState.ACTIVE)
        await rig.fetch(TOP)
        rig.ear.hear(event)
        assert rig.cache.stats.num_blocks == 1


class TestAnswersOnTheirWay:
    async def test_what_has_changed_meanwhile_is_not_kept(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)

        def change() -> None:
            rig.network.after_fetch = lambda: None
            rig.swap(TOP)
            rig.tell(TOP)

        rig.network.after_fetch = change
        assert (await rig.fetch(TOP)).versions == {TOP: 0}
        assert rig.cache.stats.num_blocks == 0
        assert (await rig.fetch(TOP)).versions == {TOP: 1}

    async def test_an_older_one_that_comes_late_replaces_nothing(self) -> None:
        rig = CacheRig()
        late, overtaken = await late_answer(rig)
        assert (late.versions, overtaken.versions) == ({TOP: 0}, {TOP: 1})
        kept = rig.store.get(TOP, "float32")
        assert kept is not None
        assert kept.version == 1

    async def test_a_service_that_went_back_is_followed(self) -> None:
        rig = CacheRig()
        rig.bank.held(TOP).version = 9
        await rig.fetch(TOP)
        rig.bank.held(TOP).version = 7
        rig.bank.held(TOP).weight = 5 * ones(TOP)
        for _ in range(2):
            np.testing.assert_array_equal((await rig.fetch(TOP))[TOP].weight, 5 * ones(TOP))
        assert rig.counts == (0, 1, 2)

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    async def test_a_version_that_came_again_with_other_content_is_no_old_one(
        self, dtype: str
    ) -> None:
        rig = CacheRig()
        held = await rig.fetch(TOP, LEAF, dtype=dtype)
        rig.bank.held(TOP).weight = 5 * ones(TOP)
        fetched = await rig.fetch(TOP, LEAF, dtype=dtype, held=held)
        assert fetched[LEAF].weight is held[LEAF].weight
        if dtype == SPEC.dtype:
            np.testing.assert_array_equal(fetched[TOP].weight, 5 * ones(TOP))
            assert rig.num_sent == 3
            assert (await rig.fetch(TOP))[TOP].weight is fetched[TOP].weight
        else:
            # No checksum is known of what a service converts for each answer.
            assert fetched[TOP].weight is held[TOP].weight


async def late_answer(rig: CacheRig) -> tuple[FetchedBlocks, FetchedBlocks]:
    """Return the answers of two fetches of which the first is overtaken by a change and the second."""
    inner = rig.cache._inner
    held_up, go_on = asyncio.Event(), asyncio.Event()

    class Slow:
        async def fetch(self, refs: Sequence[BlockRef], **asked: object) -> FetchedBlocks:
            answer = await inner.fetch(refs, **asked)  # type: ignore[arg-type]  # passed on
            if not held_up.is_set():
                held_up.set()
                await go_on.wait()
            return answer

        async def push(self, update: Update, *, deadline: Deadline) -> PushAnswer:
            return await inner.push(update, deadline=deadline)

    rig.cache._inner = Slow()
    first = asyncio.create_task(rig.fetch(TOP))
    await held_up.wait()
    # Nobody is told of it: the answers alone say which is newer.
    rig.swap(TOP)
    second = await rig.fetch(TOP)
    go_on.set()
    return await first, second


class TestOwnChanges:
    async def test_a_push_makes_what_was_before_it_stale(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP, LEAF)
        assert (await rig.push(TOP, base=0)).versions == {TOP: 1}
        assert (await rig.fetch(TOP)).versions == {TOP: 1}
        await rig.fetch(LEAF)
        assert rig.num_asked == 2

    async def test_a_push_whose_answer_is_lost_casts_doubt_on_all(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP)
        rig.network.scripts["shard:1"].plan("push", *[Fault.DROP_RESPONSE] * 3)
        with pytest.raises(UnavailableError):
            await rig.push(TOP, base=0)
        assert (await rig.fetch(TOP)).versions == {TOP: 1}

    async def test_a_transaction_is_taken_note_of(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        await rig.fetch(TOP, OTHER)
        applied = rig.bank.apply([Delete(topic=TOP)], request_id="d", dry_run=False)
        rig.cache.hear_report(applied.report)
        assert rig.cache.stats.num_blocks == 1
        assert (await rig.fetch(OTHER)).revision == 1


class TestSnapshots:
    async def test_are_not_held(self) -> None:
        rig = CacheRig(max_staleness_s=10.0)
        rig.bank.create_snapshot("then")
        rig.swap(TOP)
        assert (await rig.fetch(TOP, snapshot="then")).versions == {TOP: 0}
        assert (await rig.fetch(TOP)).versions == {TOP: 1}
        assert (await rig.fetch(TOP, snapshot="then")).versions == {TOP: 0}
        assert rig.cache.stats.num_blocks == 1


async def test_room_is_bounded() -> None:
    rig = CacheRig(max_bytes=SPEC.weight_bytes(1))
    fetched = await rig.fetch(TOP, OTHER)
    assert len(fetched.weights) == 2
    stats = rig.cache.stats
    assert (stats.num_blocks, stats.num_evicted) == (1, 1)
    assert stats.num_bytes == SPEC.weight_bytes(1)


async def test_close_lets_go_of_everything() -> None:
    rig = CacheRig()
    await rig.fetch(TOP)
    await rig.cache.close()
    assert rig.ear.is_closed
    assert replace(rig.cache.stats, num_misses=0) == CacheRig().cache.stats
