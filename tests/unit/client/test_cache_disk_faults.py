"""Damaged files, full disks and other clients: what becomes of the cache's disk tier then."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest

from cache_disk import LEAF, OTHER, TOP, TOP_BYTES, demote, files_of, stats_of, weight_of
from cache_rig import CacheRig
from full_disk import files_up_to, small_disk
from membank.client import (
    DiskTierConfig,
)
from membank.client.cache.disk_files import (
    TRAILER_BYTES,
    BlockFile,
    BlockFolder,
    DirectoryInUseError,
)


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


def _flip(at: int) -> Callable[[Path], None]:
    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 0x10
        path.write_bytes(data)

    return flip


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def _foreign(path: Path) -> None:
    """Put a good file of another bank in its place."""
    file = BlockFile.parse(path.name)
    assert file is not None
    other = BlockFolder(path.parent / "elsewhere", "another bank")
    other.write(file, np.frombuffer(path.read_bytes()[:-TRAILER_BYTES], np.float32))
    other.release()
    (written,) = (path.parent / "elsewhere").glob("bank-*/*.block")
    written.replace(path)


def _of_another_block(path: Path) -> None:
    (other,) = set(path.parent.glob("1-1-*")) - {path}
    path.write_bytes(other.read_bytes())


DAMAGES = [
    _flip(0),
    _flip(TOP_BYTES - 1),
    _flip(TOP_BYTES),
    _flip(-1),
    _truncate,
    _empty,
    _longer,
    _foreign,
    _of_another_block,
    Path.unlink,
]


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("restarted", [False, True])
    async def test_is_a_miss_and_goes_away(
        self,
        make_rig: Callable[..., CacheRig],
        damage: Callable[[Path], object],
        restarted: bool,
    ) -> None:
        rig = make_rig(memory=1, max_staleness_s=10.0)
        await rig.fetch(OTHER)
        path = await demote(rig)
        if restarted:
            await rig.restart()
            damage(path)
            await rig.fetch(LEAF)
        else:
            damage(path)
        sent = rig.num_sent
        fetched = await rig.fetch(TOP)
        np.testing.assert_array_equal(fetched[TOP].weight, weight_of(rig, TOP))
        assert rig.num_sent == sent + 1
        await rig.settle()
        again = await rig.fetch(TOP)
        np.testing.assert_array_equal(again[TOP].weight, weight_of(rig, TOP))
        assert rig.num_sent == sent + 1

    async def test_is_counted(self, rig: CacheRig) -> None:
        _flip(3)(await demote(rig))
        await rig.fetch(TOP)
        assert (stats_of(rig).num_damaged, stats_of(rig).num_hits) == (1, 0)


class TestFullDisk:
    async def test_is_no_error_and_is_left_alone_for_a_while(
        self, make_rig: Callable[..., CacheRig]
    ) -> None:
        rig = make_rig(memory=1, pause_s=30.0)
        with files_up_to(TOP_BYTES // 2):
            await rig.fetch(TOP)
            await rig.settle()
        stats = stats_of(rig)
        assert (stats.num_drops, stats.num_blocks, files_of(rig)) == (1, 0, [])
        assert stats.trouble
        await rig.fetch(TOP)
        await rig.settle()
        assert (stats_of(rig).num_drops, files_of(rig)) == (2, [])
        rig.now_s += 30.0
        await rig.fetch(TOP)
        await rig.settle()
        assert (stats_of(rig).trouble, len(files_of(rig))) == ("", 1)

    async def test_of_the_kernel(self, make_rig: Callable[..., CacheRig], tmp_path: Path) -> None:
        with small_disk(tmp_path / "small", 64 << 10) as disk:
            rig = make_rig(memory=1, directory=disk.root / "cache", pause_s=0.0)
            await rig.fetch(TOP)
            await rig.settle()
            disk.fill()
            fetched = await rig.fetch(TOP, OTHER)
            await rig.settle()
            np.testing.assert_array_equal(fetched[OTHER].weight, weight_of(rig, OTHER))
            assert (stats_of(rig).num_drops, stats_of(rig).num_hits) == (1, 1)
            await rig.cache.close()


class TestOneClientAtATime:
    async def test_a_second_one_goes_without(
        self, rig: CacheRig, make_rig: Callable[..., CacheRig]
    ) -> None:
        await demote(rig)
        second = make_rig(memory=1)
        await second.fetch(TOP)
        await second.fetch(TOP)
        assert second.num_sent == 2
        assert "in use" in stats_of(second).trouble
        await rig.fetch(TOP)
        assert stats_of(rig).num_hits == 1

    @pytest.mark.slow
    def test_nor_one_of_another_process_until_it_is_killed(self, tmp_path: Path) -> None:
        """And what it was writing when it was killed is there as a whole, or not at all."""
        with subprocess.Popen(
            [sys.executable, "-c", WRITES_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"written\n"
            with pytest.raises(DirectoryInUseError):
                BlockFolder(tmp_path, "bank")
            other.kill()
            other.wait()
        folder = BlockFolder(tmp_path, "bank")
        buffer = np.empty(WRITTEN_BYTES, np.uint8)
        files = folder.adopt(lambda file: buffer.nbytes)
        assert files
        for file in files:
            folder.read(file, buffer)
        assert len(list(tmp_path.glob("bank-*/*"))) == len(files)
        folder.release()


WRITTEN_BYTES = 4 << 20
WRITES_FOR_EVER = f"""
import itertools, sys
from pathlib import Path

import numpy as np

from membank.client.cache.disk_files import BlockFile, BlockFolder
from membank.wire.crc import crc32c
from membank.wire.spec import BlockRef

folder = BlockFolder(Path(sys.argv[1]), "bank")
weight = np.arange({WRITTEN_BYTES // 4}, dtype=np.float32)
for version in itertools.count():
    file = BlockFile(BlockRef(1, version % 8), version, "float32", 0, crc32c(weight))
    folder.write(file, weight)
    folder.remove(BlockFile(file.ref, version - 8, "float32", 0, file.crc32c), erase=False)
    if version == 8:
        print("written", flush=True)
"""
