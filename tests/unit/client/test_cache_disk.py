"""The disk tier under the cache: what comes back from files, what does not, and what goes away."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cache_disk import (
    FILE_BYTES,
    LEAF,
    OTHER,
    THIRD,
    TOP,
    TOP_BYTES,
    demote,
    files_of,
    stats_of,
    weight_of,
)
from cache_rig import CacheRig, ones
from faults import Fault
from in_process import InProcessNetwork
from membank.client import (
    AsyncBankClient,
    CacheConfig,
    ClientConfig,
    DiskTierConfig,
    RetryConfig,
)
from membank.client.cache.disk_files import BlockFile, BlockFolder
from membank.client.cache.disk_tier import DiskBlock, _Reading
from membank.client.cache.store import KeptBlock
from membank.wire.spec import DTYPES, BlockRef, BlockState


@pytest.fixture
async def rigs() -> AsyncIterator[list[CacheRig]]:
    rigs: list[CacheRig] = []
    yield rigs
    for rig in rigs:
        await rig.cache.close()


@pytest.fixture
def make_rig(tmp_path: Path, rigs: list[CacheRig]) -> Callable[..., CacheRig]:
    def make(
        *, max_staleness_s: float = 0.0, memory: int = TOP_BYTES, **fields: object
    ) -> CacheRig:
        disk = DiskTierConfig(**{"directory": tmp_path / "disk", **fields})  # type: ignore[arg-type]  # of several types
        rigs.append(CacheRig(max_staleness_s, memory, disk))
        return rigs[-1]

    return make


@pytest.fixture
def rig(make_rig: Callable[..., CacheRig]) -> CacheRig:
    """Return a rig whose memory has room for one block of level 1."""
    return make_rig(max_staleness_s=10.0)


class TestOneLife:
    async def test_what_memory_has_no_room_for_is_read_from_a_file(self, rig: CacheRig) -> None:
        path = await demote(rig)
        assert path.stat().st_size == FILE_BYTES
        asked = rig.num_asked
        fetched = await rig.fetch(TOP)
        np.testing.assert_array_equal(fetched[TOP].weight, weight_of(rig, TOP))
        assert (rig.num_asked, rig.num_sent, rig.counts) == (asked, 2, (1, 0, 2))
        await rig.settle()
        assert (stats_of(rig).num_hits, stats_of(rig).num_writes) == (1, 2)

    async def test_what_is_not_written_yet_is_there_too(self, rig: CacheRig) -> None:
        await rig.fetch(TOP)
        assert rig.disk is not None
        go_on = asyncio.Event()
        loop = asyncio.get_running_loop()
        rig.disk._writer.submit(
            lambda: asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
        )
        await rig.fetch(OTHER)
        fetched = await rig.fetch(TOP)
        go_on.set()
        assert rig.num_sent == 2
        np.testing.assert_array_equal(fetched[TOP].weight, weight_of(rig, TOP))
        await rig.settle()

    async def test_a_file_that_is_right_is_not_written_again(self, rig: CacheRig) -> None:
        await demote(rig)
        for _ in range(3):
            await rig.fetch(TOP)
            await rig.fetch(OTHER)
        await rig.settle()
        assert (stats_of(rig).num_writes, len(files_of(rig))) == (2, 2)

    async def test_what_has_changed_replaces_it(self, rig: CacheRig) -> None:
        path = await demote(rig)
        rig.swap(TOP)
        rig.now_s += 20.0
        np.testing.assert_array_equal((await rig.fetch(TOP))[TOP].weight, 3 * ones(TOP))
        await rig.settle()
        assert not path.exists()

    async def test_a_change_that_is_heard_of_removes_it(self, rig: CacheRig) -> None:
        path = await demote(rig)
        rig.swap(TOP)
        rig.tell(TOP)
        await rig.settle()
        assert not path.exists()

    async def test_a_change_that_is_heard_of_while_it_is_read_counts(
        self, rig: CacheRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await demote(rig)
        assert rig.disk is not None
        read, loop = rig.disk._read, asyncio.get_running_loop()

        def read_and_change(folder: BlockFolder, reading: _Reading) -> None:
            read(folder, reading)
            rig.swap(TOP)
            loop.call_soon_threadsafe(rig.tell, TOP)

        monkeypatch.setattr(rig.disk, "_read", read_and_change)
        np.testing.assert_array_equal((await rig.fetch(TOP))[TOP].weight, 3 * ones(TOP))

    async def test_a_version_that_came_again_with_other_content_replaces_it(
        self, rig: CacheRig
    ) -> None:
        path = await demote(rig)
        rig.bank.held(TOP).weight = 5 * ones(TOP)
        rig.now_s += 20.0
        np.testing.assert_array_equal((await rig.fetch(TOP))[TOP].weight, 5 * ones(TOP))
        await rig.settle()
        assert not path.exists()

    async def test_element_types_are_not_mixed_up(self, make_rig: Callable[..., CacheRig]) -> None:
        rig = make_rig(memory=1)
        for dtype in ("float32", "float16", "bfloat16", "float16", "float32"):
            fetched = await rig.fetch(TOP, dtype=dtype)
            await rig.settle()
            expected = weight_of(rig, TOP).astype(DTYPES[dtype])
            np.testing.assert_array_equal(fetched[TOP].weight, expected, strict=True)
        assert (rig.num_sent, len(files_of(rig))) == (3, 3)

    async def test_what_came_in_an_encoding_comes_back_as_it_was(
        self, make_rig: Callable[..., CacheRig]
    ) -> None:
        rig = make_rig(memory=1)
        first = await rig.fetch(TOP, dtype="int8")
        await rig.settle()
        exact = await rig.fetch(TOP)
        await rig.settle()
        again = await rig.fetch(TOP, dtype="int8")
        assert (rig.num_sent, len(files_of(rig)), stats_of(rig).num_damaged) == (2, 2, 0)
        np.testing.assert_array_equal(again[TOP].weight, first[TOP].weight, strict=True)
        np.testing.assert_array_equal(exact[TOP].weight, weight_of(rig, TOP), strict=True)
        assert again[TOP].header.num_bytes == first[TOP].header.num_bytes
        # Put there again, it is known to be there.
        await rig.settle()
        assert (stats_of(rig).num_writes, len(files_of(rig))) == (2, 2)


class TestLevels:
    async def test_direct_ones_go_to_the_disk_alone(
        self, make_rig: Callable[..., CacheRig]
    ) -> None:
        rig = make_rig(memory=1 << 20, direct_levels=(2,))
        await rig.fetch(TOP, LEAF)
        await rig.settle()
        assert (rig.cache.stats.num_blocks, stats_of(rig).num_blocks) == (1, 1)
        fetched = await rig.fetch(TOP, LEAF)
        assert (rig.num_sent, stats_of(rig).num_hits) == (2, 1)
        np.testing.assert_array_equal(fetched[LEAF].weight, weight_of(rig, LEAF))

    async def test_others_than_those_named_are_not_written(
        self, make_rig: Callable[..., CacheRig]
    ) -> None:
        rig = make_rig(memory=1, levels=(2,))
        await rig.fetch(TOP, LEAF)
        await rig.settle()
        assert [path.name.split("-")[0] for path in files_of(rig)] == ["2"]

    async def test_direct_ones_stay_in_memory_where_there_is_no_disk(
        self, make_rig: Callable[..., CacheRig], tmp_path: Path
    ) -> None:
        (tmp_path / "disk").write_text("a file, not a directory")
        rig = make_rig(memory=1 << 20, direct_levels=(2,))
        await rig.fetch(TOP, LEAF)
        assert rig.cache.stats.num_blocks == 2
        assert "disk" in stats_of(rig).trouble


class TestAnotherLife:
    async def test_goes_on_with_the_files_and_asks_before_it_uses_one(self, rig: CacheRig) -> None:
        await demote(rig)
        await rig.restart()
        asked = rig.num_asked
        fetched = await rig.fetch(TOP)
        np.testing.assert_array_equal(fetched[TOP].weight, weight_of(rig, TOP))
        assert (rig.num_asked, rig.num_sent, rig.counts) == (asked + 1, 2, (0, 1, 0))
        await rig.fetch(TOP)
        assert rig.num_asked == asked + 1

    async def test_what_changed_meanwhile_is_not_used(self, rig: CacheRig) -> None:
        path = await demote(rig)
        await rig.cache.close()
        rig.swap(TOP)
        rig.start()
        np.testing.assert_array_equal((await rig.fetch(TOP))[TOP].weight, 3 * ones(TOP))
        await rig.settle()
        assert not path.exists()

    async def test_a_number_that_came_again_meanwhile_is_another_version(
        self, rig: CacheRig
    ) -> None:
        await demote(rig)
        await rig.cache.close()
        rig.bank.held(TOP).weight = 5 * ones(TOP)
        rig.start()
        np.testing.assert_array_equal((await rig.fetch(TOP))[TOP].weight, 5 * ones(TOP))

    async def test_what_was_removed_meanwhile_goes_though_nobody_asks_for_it(
        self, rig: CacheRig
    ) -> None:
        path = await demote(rig)
        await rig.cache.close()
        rig.set_state(TOP, BlockState.DELETED)
        rig.start()
        await rig.fetch(LEAF, dtype="float16")
        await rig.settle()
        assert not path.exists()

    async def test_what_was_seen_since_the_last_removal_stays(self, rig: CacheRig) -> None:
        rig.set_state(OTHER, BlockState.DELETED)
        await rig.fetch(TOP)
        await rig.fetch(THIRD)
        await rig.restart()
        await rig.fetch(TOP)
        await rig.settle()
        assert rig.num_sent == 2

    async def test_a_writer_that_was_killed_leaves_nothing(self, rig: CacheRig) -> None:
        path = await demote(rig)
        await rig.cache.close()
        unfinished = path.with_name("1-3-v0-float32-r0-00000000.block.tmp")
        unfinished.write_bytes(path.read_bytes()[:-9])
        foreign = path.with_name("notes.txt")
        foreign.write_text("of somebody")
        rig.start()
        await rig.fetch(TOP)
        await rig.settle()
        assert (unfinished.exists(), foreign.exists(), path.exists()) == (False, True, True)

    async def test_a_smaller_bound_holds_at_once(self, make_rig: Callable[..., CacheRig]) -> None:
        rig = make_rig(memory=1)
        await rig.fetch(TOP, OTHER, THIRD)
        await rig.cache.close()
        assert rig.config.disk is not None
        rig.config = replace(rig.config, disk=replace(rig.config.disk, max_bytes=FILE_BYTES))
        rig.start()
        await rig.fetch(BlockRef(2, 0), dtype="float16")
        await rig.settle()
        assert sum(path.stat().st_size for path in files_of(rig)) <= FILE_BYTES

    async def test_files_of_another_bank_are_removed(
        self, make_rig: Callable[..., CacheRig], tmp_path: Path
    ) -> None:
        weight = ones(TOP)
        other = BlockFolder(tmp_path / "disk", "another bank")
        other.write(BlockFile(TOP, 0, "float32", 0, 1), weight)
        other.release()
        (tmp_path / "disk" / "notes.txt").write_text("of somebody")
        rig = make_rig()
        assert len(files_of(rig)) == 1
        await rig.fetch(TOP)
        assert files_of(rig) == []
        assert (tmp_path / "disk" / "notes.txt").exists()


class TestRemoval:
    @pytest.mark.parametrize("state", [BlockState.WITHHELD, BlockState.DELETED])
    async def test_a_file_goes_overwritten_when_it_is_heard_of(
        self, rig: CacheRig, state: BlockState
    ) -> None:
        path = await demote(rig)
        second_name = path.parent.parent / "the same file"
        second_name.hardlink_to(path)
        rig.set_state(TOP, state)
        rig.tell(TOP)
        await rig.settle()
        assert not path.exists()
        assert second_name.read_bytes() == bytes(FILE_BYTES)
        assert (await rig.fetch(TOP)).states == {TOP: state}

    async def test_when_an_answer_says_so(self, rig: CacheRig) -> None:
        path = await demote(rig)
        rig.set_state(TOP, BlockState.WITHHELD)
        rig.now_s += 20.0
        assert (await rig.fetch(TOP)).weights == {}
        await rig.settle()
        assert not path.exists()

    async def test_before_it_is_written(self, rig: CacheRig) -> None:
        await rig.fetch(TOP)
        await rig.fetch(OTHER)
        rig.set_state(TOP, BlockState.DELETED)
        rig.tell(TOP)
        await rig.settle()
        assert files_of(rig) == []

    async def test_what_was_read_for_a_fetch_is_overwritten_after_it(
        self, rig: CacheRig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await demote(rig)
        rig.now_s += 20.0
        assert rig.disk is not None
        read = rig.disk.read
        loaded: list[KeptBlock] = []

        async def note(wanted: Sequence[DiskBlock]) -> dict[BlockRef, KeptBlock]:
            kept = await read(wanted)
            loaded.extend(kept.values())
            return kept

        def tell() -> None:
            assert loaded[0].weight.any()
            rig.tell(TOP)

        monkeypatch.setattr(rig.disk, "read", note)
        rig.set_state(TOP, BlockState.DELETED)
        rig.network.after_fetch = tell
        await rig.fetch(TOP)
        assert not loaded[0].weight.any()

    async def test_after_a_gap_all_go_that_may_have_been_removed_in_it(self, rig: CacheRig) -> None:
        path = await demote(rig)
        rig.ear.span = None
        rig.set_state(TOP, BlockState.DELETED)
        rig.ear.span = 2
        await rig.fetch(LEAF, dtype="float16")
        await rig.settle()
        assert not path.exists()

    async def test_it_is_asked_again_where_nobody_answered(self, rig: CacheRig) -> None:
        path = await demote(rig)
        await rig.cache.close()
        rig.set_state(TOP, BlockState.DELETED)
        rig.start()
        rig.network.scripts[rig.network.GATEWAY].plan("get_bank", Fault.UNAVAILABLE)
        await rig.fetch(OTHER)
        await rig.settle()
        assert path.exists()
        await rig.fetch(OTHER)
        await rig.settle()
        assert not path.exists()


class TestBounds:
    async def test_bytes_are_bounded_and_the_one_used_longest_ago_goes(
        self, make_rig: Callable[..., CacheRig]
    ) -> None:
        rig = make_rig(memory=1, max_bytes=2 * FILE_BYTES)
        await rig.fetch(TOP)
        await rig.fetch(OTHER)
        await rig.fetch(TOP)
        await rig.fetch(THIRD)
        await rig.settle()
        assert [path.name[:4] for path in files_of(rig)] == ["1-0-", "1-2-"]
        stats = stats_of(rig)
        assert (stats.num_evicted, stats.num_blocks, stats.num_bytes) == (1, 2, 2 * FILE_BYTES)

    async def test_what_never_fits_drives_nothing_out(
        self, make_rig: Callable[..., CacheRig]
    ) -> None:
        rig = make_rig(memory=1, max_bytes=FILE_BYTES - 1)
        await rig.fetch(LEAF)
        await rig.fetch(TOP)
        await rig.settle()
        assert (stats_of(rig).num_drops, stats_of(rig).num_blocks) == (1, 1)

    async def test_what_waits_to_be_written_is_bounded(
        self, make_rig: Callable[..., CacheRig]
    ) -> None:
        rig = make_rig(memory=1, max_queued_bytes=TOP_BYTES)
        await rig.fetch(LEAF, dtype="float16")
        await rig.settle()
        go_on = asyncio.Event()
        loop = asyncio.get_running_loop()
        assert rig.disk is not None
        rig.disk._writer.submit(
            lambda: asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
        )
        await rig.fetch(TOP)
        await rig.fetch(OTHER)
        assert stats_of(rig).num_drops == 1
        go_on.set()
        await rig.settle()
        await rig.fetch(OTHER)
        await rig.settle()
        assert stats_of(rig).num_drops == 1
        assert len(files_of(rig)) == 3


async def test_a_whole_client_has_it(tmp_path: Path) -> None:
    disk = DiskTierConfig(directory=tmp_path)
    config = ClientConfig(
        retry=RetryConfig(max_attempts=3, initial_backoff_s=0.001, max_backoff_s=0.002),
        cache=CacheConfig(max_bytes=1, disk=disk),
    )
    network = InProcessNetwork(CacheRig().bank)
    for _ in range(2):
        async with await AsyncBankClient.connect(
            network.GATEWAY, config=config, connector=network
        ) as client:
            fetched = await client.fetch_blocks([TOP, LEAF])
            stats = client.cache_stats
    assert network.bank.shards[0].num_weights_sent == 2
    np.testing.assert_array_equal(fetched[LEAF].weight, network.bank.held(LEAF).weight)
    assert stats is not None
    assert stats.disk is not None
    assert stats.disk.num_hits == 2
