"""Question 4: the same bytes in few large blocks or many small ones."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.questions.banks import ALL_RESIDENT, FiledBank, sized_spec
from benchmarks.questions.latency import Say, connected
from benchmarks.questions.scale import Scale
from benchmarks.questions.timing import fit_line, median_ms, timed
from membank.bank_service.bench.page_cache import drop
from membank.client import BankClient, ClientConfig
from membank.wire.spec import Array, BlockRef

# Each level has four times the blocks of the one above, of a quarter of the size: 1 of 50 MB to
# 1,024 of 49 KB.
_BLOCK_WIDTHS = (1024, 256, 64, 16, 4, 1)
_QUICK_WIDTHS = (256, 64, 16, 4, 1)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to get blocks."""

    name: str
    """Name of the rows."""
    read: Callable[[Sequence[BlockRef]], object]
    """Reads blocks, all bytes of them."""
    files: Callable[[Sequence[BlockRef]], Sequence[Path]] | None
    """Files that it reads; None = it reads none."""


def measure(folder: Path, scale: Scale, say: Say, *, quick: bool) -> dict[str, Any]:
    """Return the time of the same bytes by block size and way, warm and cold, and each way's knee."""
    widths = _QUICK_WIDTHS if quick else _BLOCK_WIDTHS
    bank = FiledBank.make(folder / "blocks", sized_spec((1, *[4] * (len(widths) - 1)), widths))
    can_drop = bank.can_drop()
    samples: dict[tuple[str, int], list[float]] = {}
    with _ways(bank, folder / "packed") as ways:
        for number in range(scale.num_rounds + 1):
            say(f"block sizes: round {number} of {scale.num_rounds}")
            for level in range(1, bank.spec.num_levels + 1):
                for name, seconds in _round(bank, ways, level, number, can_drop):
                    if number:  # the first one is a warm-up
                        samples.setdefault((name, level), []).append(seconds)
    rows = [
        {
            "way": name,
            "block_bytes": bank.spec.weight_bytes(level),
            "num_blocks": bank.spec.num_clusters(level),
            "median_ms": median_ms(seconds),
            "samples_ms": [1e3 * each for each in seconds],
        }
        for (name, level), seconds in samples.items()
    ]
    names = dict.fromkeys(name for name, _ in samples)
    return {
        "total_bytes": bank.spec.weight_bytes(1),
        "rows": rows,
        "costs": {name: _cost([row for row in rows if row["way"] == name]) for name in names},
    }


def _cost(rows: Sequence[dict[str, Any]]) -> dict[str, object]:
    """Return what a block costs and what a byte costs, and the size at which both are equal."""
    total = rows[0]["block_bytes"] * rows[0]["num_blocks"]
    line = fit_line([row["num_blocks"] for row in rows], [row["median_ms"] / 1e3 for row in rows])
    bytes_per_s = total / line.constant_s if line.constant_s else None
    return {
        "per_block_us": 1e6 * line.per_unit_s,
        "bytes_per_s": bytes_per_s,
        "knee_bytes": None if bytes_per_s is None else line.per_unit_s * bytes_per_s,
    }


def _round(
    bank: FiledBank, ways: Sequence[Way], level: int, number: int, can_drop: bool
) -> Iterator[tuple[str, float]]:
    refs = bank.blocks(level)
    # Requests do not come in the order of the files.
    np.random.Generator(np.random.PCG64([number, level])).shuffle(refs)
    for way in ways:
        read = partial(way.read, refs)
        if way.files is None:
            yield way.name, timed(read)
            continue
        if can_drop:
            drop(way.files(refs))
            yield f"{way.name}, disk", timed(read)
        read()  # all of it is in the page cache now
        yield f"{way.name}, page cache", timed(read)


@contextmanager
def _ways(bank: FiledBank, folder: Path) -> Iterator[list[Way]]:
    packed = _Packed(bank, folder)
    opened = BankClient.open(bank.folder)

    def files(refs: Sequence[BlockRef]) -> list[Path]:
        return [bank.file(ref) for ref in refs]

    with (
        bank.served(resident_bytes=ALL_RESIDENT) as endpoint,
        connected(endpoint, ClientConfig()) as client,
    ):
        yield [
            Way("resident, shared memory", client.fetch_blocks, None),
            Way("opened files", opened.fetch_blocks, files),
            Way("plain file per block", partial(_read_files, bank, packed.buffers), files),
            Way("one packed file, ranges", packed.read, packed.files),
            Way("one packed file, mmap", packed.read_mapped, packed.files),
        ]


def _read_files(bank: FiledBank, buffers: dict[BlockRef, Array], refs: Sequence[BlockRef]) -> None:
    for ref in refs:
        handle = os.open(bank.file(ref), os.O_RDONLY)
        try:
            _fill(handle, buffers[ref], 0)
        finally:
            os.close(handle)


class _Packed:
    """The blocks of each level, one after the other in one file."""

    def __init__(self, bank: FiledBank, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._size = {ref: bank.spec.weight_bytes(ref.level) for ref in bank.written.records}
        # One buffer for all: what is measured is the reading, not the making of memory. It begins
        # where a page does, as files in the page cache do: else copies may take far longer.
        buffer = np.frombuffer(mmap.mmap(-1, bank.spec.weight_bytes(1)), np.uint8)
        self.buffers: dict[BlockRef, Array] = {
            ref: buffer[ref.cluster * size : (ref.cluster + 1) * size]
            for ref, size in self._size.items()
        }
        for level in range(1, bank.spec.num_levels + 1):
            with self._file(level).open("wb") as file:
                for ref in bank.blocks(level):
                    file.write(bank.written.read(ref).tobytes())

    def files(self, refs: Sequence[BlockRef]) -> list[Path]:
        return [self._file(refs[0].level)]

    def read(self, refs: Sequence[BlockRef]) -> None:
        handle = os.open(self._file(refs[0].level), os.O_RDONLY)
        try:
            for ref in refs:
                _fill(handle, self.buffers[ref], ref.cluster * self._size[ref])
        finally:
            os.close(handle)

    def read_mapped(self, refs: Sequence[BlockRef]) -> None:
        with self._file(refs[0].level).open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            view = np.frombuffer(mapped, np.uint8)
            for ref in refs:
                start = ref.cluster * self._size[ref]
                np.copyto(self.buffers[ref], view[start : start + self._size[ref]])
            # Or pages stay in use, and cannot be dropped.
            del view
            mapped.close()

    def _file(self, level: int) -> Path:
        return self._folder / f"level-{level}"


def _fill(handle: int, buffer: Array, offset: int) -> None:
    view = memoryview(buffer)  # type: ignore[arg-type]
    while view:
        count = os.preadv(handle, [view], offset)
        view, offset = view[count:], offset + count
