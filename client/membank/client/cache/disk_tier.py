"""The second level of the cache: blocks in files of a local disk.

Which blocks are there is known in memory, by the event loop that fetches; files are written and
removed by one thread, in the order in which that was decided, and read by others. So a file is
never there for longer than its block is known, but for the time that the thread is behind.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from membank.client.cache.disk_files import (
    TRAILER_BYTES,
    BlockFile,
    BlockFolder,
    DamagedFileError,
    DirectoryInUseError,
)
from membank.client.cache.store import Confirmation, KeptBlock
from membank.client.config import DiskTierConfig
from membank.wire.buffers import BufferPool
from membank.wire.codec import FETCH_CODECS
from membank.wire.crc import crc32c
from membank.wire.errors import NotFoundError
from membank.wire.records import Block, BlockHeader
from membank.wire.spec import DTYPES, Array, BankSpec, BlockRef

_LOGGER = logging.getLogger(__name__)
_READERS = 4
_IDLE_BYTES = 64 << 20
_MAX_VERSION = 1 << 64

_NOT_IN_THIS_LIFE = Confirmation(-1, -math.inf, None)
"""Of a block that was found: its service is asked before it is used, however stale it may be."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskStats:
    """What the disk tier did since the client was made, and what it holds. Counts are of blocks."""

    num_hits: int
    """Read from the disk, and right."""
    num_writes: int
    """Written."""
    num_drops: int
    """Not written: too many waited, the disk was full or failed, or the block was too large."""
    num_damaged: int
    """Could not be read, or were not what they should be; removed, and fetched again."""
    num_evicted: int
    """Made room for others."""
    num_blocks: int
    """Held now, or about to be written."""
    num_bytes: int
    """Bytes of their files."""
    trouble: str
    """Why nothing is written now, or at all; empty where all is well."""


@dataclass(slots=True, eq=False)
class DiskBlock:
    """A block that is in a file, or on its way there."""

    file: BlockFile
    """What it is."""
    num_bytes: int
    """Bytes of the file."""
    confirmed: Confirmation
    """Last word of the service."""
    queued: Array | None = None
    """The weight, until it is written."""

    @property
    def version(self) -> int:
        """Version of the content."""
        return self.file.version

    @property
    def key(self) -> tuple[BlockRef, str]:
        """Block and element type."""
        return (self.file.ref, self.file.dtype)

    def holds(self, block: Block) -> bool:
        """Say whether it is the same block with the same content."""
        return self.version == block.version and self.file.crc32c == _crc_of(block)


@dataclass(slots=True, eq=False)
class _Reading:
    """A block that is being read, and where its weight is handed over.

    A thread may hold what a call returned for a while longer, and what somebody holds would not be
    overwritten when its block is removed.
    """

    found: DiskBlock
    weight: Array | None = None


class DiskTier:
    """Keeps blocks in files within a bound of bytes; belongs to one event loop.

    Nothing that becomes of a disk is an error here: a block that cannot be written is not kept, and
    one that cannot be read, or is not what it should be, is not there.

    Parameters
    ----------
    config
        Directory and bounds.
    spec
        Spec of the bank.
    clock
        Tells the time in seconds.
    """

    def __init__(
        self,
        config: DiskTierConfig,
        spec: BankSpec,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._spec = spec
        self._clock = clock
        self._levels = frozenset(config.levels or range(1, spec.num_levels + 1))
        self._opening = asyncio.Lock()
        self._folder: BlockFolder | None = None
        self._is_opened = False
        # The one used longest ago comes first.
        self._blocks: OrderedDict[tuple[BlockRef, str], DiskBlock] = OrderedDict()
        self._num_bytes = 0
        # One thread, so that a file is removed after it was written, and before its successor is.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="membank-disk-writer")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="membank-disk-reader")
        self._pool = BufferPool(_IDLE_BYTES)
        self._queue = threading.Lock()
        self._queued_bytes = 0
        self._failed: deque[DiskBlock] = deque()
        self._paused_until_s = -math.inf
        self._trouble = "not opened yet"
        self._num_hits = self._num_writes = self._num_damaged = self._num_evicted = 0
        self._num_refused = self._num_failed = 0

    @property
    def stats(self) -> DiskStats:
        """What it did and holds."""
        self._forget_failed()
        return DiskStats(
            num_hits=self._num_hits,
            num_writes=self._num_writes,
            num_drops=self._num_refused + self._num_failed,
            num_damaged=self._num_damaged,
            num_evicted=self._num_evicted,
            num_blocks=len(self._blocks),
            num_bytes=self._num_bytes,
            trouble=self._trouble,
        )

    async def open(self) -> None:
        """Take the directory over, once; whatever hinders that is in the stats from then on."""
        async with self._opening:
            if not self._is_opened:
                self._is_opened = True
                found = await asyncio.to_thread(self._take_over)
                for file in found:
                    self._adopt(file)
                self._make_room(0)

    async def close(self) -> None:
        """Write what is queued, then let others have the directory."""
        async with self._opening:
            self._is_opened = True
            self._blocks.clear()
            self._num_bytes = 0
            folder, self._folder = self._folder, None
            await asyncio.to_thread(self._stop, folder)

    def get(self, ref: BlockRef, dtype: str) -> DiskBlock | None:
        """Return what is there of a block in an element type."""
        self._forget_failed()
        return self._blocks.get((ref, dtype))

    def copies(self, ref: BlockRef) -> Iterator[DiskBlock]:
        """Yield what is there of a block in any element type."""
        return (found for dtype in FETCH_CODECS if (found := self.get(ref, dtype)) is not None)

    async def read(self, wanted: Sequence[DiskBlock]) -> dict[BlockRef, KeptBlock]:
        """Return those of the blocks that are what they should be.

        A block that was removed while it was read is not among them.
        """
        loop, folder = asyncio.get_running_loop(), self._folder
        if folder is None:
            return {}
        readings = [_Reading(found) for found in wanted]
        await asyncio.gather(
            *(loop.run_in_executor(self._readers, self._read, folder, each) for each in readings)
        )
        self._forget_failed()
        kept = {}
        for reading in readings:
            found, weight, reading.weight = reading.found, reading.weight, None
            if self._blocks.get(found.key) is not found:
                continue
            if weight is None:
                self._num_damaged += 1
                self.remove(found)
                continue
            self._num_hits += 1
            self._blocks.move_to_end(found.key)
            kept[found.file.ref] = KeptBlock(
                header=_header_of(found.file, weight), weight=weight, confirmed=found.confirmed
            )
        return kept

    def put(self, block: Block, confirmed: Confirmation) -> bool:
        """Have a block written in the place of an earlier version of it; say whether it is kept."""
        if block.weight is None or self._folder is None or block.ref.level not in self._levels:
            return False
        present = self.get(block.ref, block.header.dtype)
        if present is not None and present.holds(block):
            self.confirm(present, confirmed)
            self._blocks.move_to_end(present.key)
            return True
        if present is not None:
            self.remove(present)
        num_bytes = block.weight.nbytes + TRAILER_BYTES
        if num_bytes > self._config.max_bytes or not self._has_turn(block.weight.nbytes):
            self._num_refused += 1
            return False
        self._make_room(num_bytes)
        file = BlockFile(
            block.ref, block.version, block.header.dtype, confirmed.revision, _crc_of(block)
        )
        queued = DiskBlock(file, num_bytes, confirmed, queued=block.weight)
        self._blocks[queued.key] = queued
        self._num_bytes += num_bytes
        self._writer.submit(self._write, self._folder, queued, block.weight.nbytes)
        return True

    def confirm(self, found: DiskBlock, confirmed: Confirmation) -> None:
        """Take note that a service said that a block is right; answers may overtake one another."""
        known = found.confirmed
        if (confirmed.revision, confirmed.at_s) >= (known.revision, known.at_s):
            found.confirmed = confirmed

    def remove(self, found: DiskBlock, *, erase: bool = False) -> None:
        """Let go of a block and remove its file; with `erase` overwrite it before."""
        if self._blocks.get(found.key) is found:
            del self._blocks[found.key]
            self._num_bytes -= found.num_bytes
        found.queued = None
        if self._folder is not None:
            self._writer.submit(self._remove, self._folder, found.file, erase=erase)

    def remove_before(self, revision: int) -> None:
        """Remove, overwritten, all blocks that were not seen in `revision` or later."""
        for found in list(self._blocks.values()):
            if max(found.file.revision, found.confirmed.revision) < revision:
                self.remove(found, erase=True)

    async def flush(self) -> None:
        """Return when all that was decided until now has been done to the files."""
        await asyncio.wrap_future(self._writer.submit(lambda: None))

    def _take_over(self) -> list[BlockFile]:
        try:
            folder = BlockFolder(self._config.directory, self._spec.bank_id)
            try:
                found = folder.adopt(self._content_bytes)
            except OSError:
                folder.release()
                raise
        except (OSError, DirectoryInUseError) as err:
            self._trouble = str(err)
            _LOGGER.warning("the cache goes without its disk tier: %s", err)
            return []
        self._folder, self._trouble = folder, ""
        return found

    def _content_bytes(self, file: BlockFile) -> int | None:
        """Return the size of what a file holds; None = it is of no use here."""
        try:
            self._spec.check_ref(file.ref)
        except NotFoundError:
            return None
        is_known = file.dtype in FETCH_CODECS and file.version < _MAX_VERSION
        if not is_known or file.ref.level not in self._levels:
            return None
        # What is kept is what callers get: a weight that was encoded on its way is decoded here.
        itemsize = FETCH_CODECS[file.dtype].dtype.itemsize
        return self._spec.block_params(file.ref.level) * itemsize

    def _adopt(self, file: BlockFile) -> None:
        num_bytes = (self._content_bytes(file) or 0) + TRAILER_BYTES
        found = DiskBlock(file, num_bytes, _NOT_IN_THIS_LIFE)
        other = self._blocks.get(found.key)
        if other is not None:
            # Its writer was killed between a write and the removal of what it replaced.
            self.remove(other)
        self._blocks[found.key] = found
        self._num_bytes += num_bytes

    def _stop(self, folder: BlockFolder | None) -> None:
        self._writer.shutdown(wait=True)
        self._readers.shutdown(wait=True)
        if folder is not None:
            folder.release()

    def _has_turn(self, num_bytes: int) -> bool:
        """Say whether a weight may be queued, and count it in."""
        with self._queue:
            is_full = self._queued_bytes + num_bytes > self._config.max_queued_bytes
            if (is_full and self._queued_bytes) or self._clock() < self._paused_until_s:
                return False
            self._queued_bytes += num_bytes
        return True

    def _make_room(self, num_bytes: int) -> None:
        while self._num_bytes + num_bytes > self._config.max_bytes:
            self._num_evicted += 1
            self.remove(next(iter(self._blocks.values())))

    def _forget_failed(self) -> None:
        """Let go of what the writer could not write."""
        while self._failed:
            found = self._failed.popleft()
            if self._blocks.get(found.key) is found:
                del self._blocks[found.key]
                self._num_bytes -= found.num_bytes

    # What follows runs on threads, and does not touch which blocks there are.

    def _write(self, folder: BlockFolder, found: DiskBlock, num_bytes: int) -> None:
        weight = found.queued
        try:
            if weight is None:  # removed meanwhile
                return
            if self._clock() < self._paused_until_s:
                self._num_failed += 1
                self._failed.append(found)
                return
            folder.write(found.file, weight)
            self._num_writes += 1
            self._trouble = ""
        except OSError as err:
            self._num_failed += 1
            self._failed.append(found)
            self._pause(err)
        finally:
            found.queued = None
            with self._queue:
                self._queued_bytes -= num_bytes

    def _remove(self, folder: BlockFolder, file: BlockFile, *, erase: bool) -> None:
        try:
            folder.remove(file, erase=erase)
        except OSError as err:
            self._pause(err)

    def _pause(self, err: OSError) -> None:
        self._paused_until_s = self._clock() + self._config.pause_s
        if not self._trouble:
            _LOGGER.warning("the cache writes nothing to its disk for now: %s", err)
        self._trouble = str(err)

    def _read(self, folder: BlockFolder, reading: _Reading) -> None:
        """Read a weight; leave None where it is not what it should be."""
        file = reading.found.file
        reading.weight = reading.found.queued
        if reading.weight is not None:
            return
        buffer = self._pool.take(reading.found.num_bytes - TRAILER_BYTES)
        try:
            folder.read(file, buffer)
        except (OSError, DamagedFileError) as err:
            _LOGGER.debug("a block of the disk tier is fetched again: %s", err)
            return
        dtype = FETCH_CODECS[file.dtype].dtype
        weight = buffer.view(dtype).reshape(self._spec.block_shape(file.ref.level))
        weight.flags.writeable = False
        reading.weight = weight


def _crc_of(block: Block) -> int:
    header = block.header
    # That of an encoded block is of what travelled, and not of the weight.
    if block.weight is None or (header.crc32c and header.dtype in DTYPES):
        return header.crc32c
    return crc32c(block.weight)


def _header_of(file: BlockFile, weight: Array) -> BlockHeader:
    return BlockHeader(
        ref=file.ref,
        version=file.version,
        dtype=file.dtype,
        shape=weight.shape,
        num_bytes=FETCH_CODECS[file.dtype].num_bytes(weight.size),
        crc32c=file.crc32c if file.dtype in DTYPES else 0,
    )
