"""Question 3: what a fetch takes, by its size and by where its bytes lie; beside the paper's model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.questions.banks import (
    ALL_RESIDENT,
    NOTHING_RESIDENT,
    FiledBank,
    paper_spec,
    sized_spec,
)
from benchmarks.questions.scale import Scale
from benchmarks.questions.timing import fit_line, quantiles_ms, repeat
from membank.client import BankClient, CacheConfig, ClientConfig, DiskTierConfig
from membank.wire.errors import InternalError
from membank.wire.spec import Array, BlockRef

_FAN_OUTS = (2, 1, 1, 2, 1, 1, 1)
# A block has 8 * 3 * 512 * 4 bytes = 48 KiB per column: 80, 40, 16, 4, 1, 0.4 and 0.1 MB.
_BLOCK_WIDTHS = (1628, 814, 326, 81, 20, 8, 2)
_QUICK_WIDTHS = (326, 163, 81, 40, 20, 8, 2)
_LONG_S = 3600.0
_WRITING_S = 60.0

PAPER_BYTES_PER_S = {"ram": 8e9, "flash": 1e9, "external": 0.5e9}
"""Bandwidths that the paper assumes."""

Say = Callable[[str], None]
Fetch = Callable[[Sequence[BlockRef]], dict[BlockRef, Array]]


@dataclass(frozen=True, slots=True)
class Source:
    """One place that bytes come from."""

    name: str
    """Name of the rows."""
    fetch: Fetch
    """Returns the weights of blocks."""
    is_cold: bool = False
    """Whether files leave the page cache before each call."""


def measure(folder: Path, scale: Scale, say: Say, *, quick: bool) -> dict[str, Any]:
    """Return latencies by source and size, the line through each, and the paper's model beside."""
    bank = FiledBank.make(
        folder / "sizes", sized_spec(_FAN_OUTS, _QUICK_WIDTHS if quick else _BLOCK_WIDTHS)
    )
    can_drop = bank.can_drop()
    rows: list[dict[str, Any]] = []
    for source in _sources(bank, folder, can_drop):
        say(f"latency: {source.name}")
        rows += [
            _row(bank, source, [[ref] for ref in bank.blocks(level)], scale)
            for level in range(bank.spec.num_levels, 0, -1)
        ]
    return {
        "rows": rows,
        "lines": {name: _line(rows, name) for name in dict.fromkeys(row["source"] for row in rows)},
        "cold_not_run": None if can_drop else "this file system keeps files in memory regardless",
        "paper": _paper(folder, scale, say),
    }


def _row(
    bank: FiledBank, source: Source, choices: Sequence[list[BlockRef]], scale: Scale
) -> dict[str, Any]:
    for refs in choices:
        for ref, weight in source.fetch(refs).items():
            bank.check(ref, weight)

    def chosen(number: int) -> list[BlockRef]:
        return choices[number % len(choices)]

    seconds = repeat(
        lambda number: source.fetch(chosen(number)),
        scale,
        before=(lambda number: bank.drop(chosen(number))) if source.is_cold else None,
    )
    num_bytes = sum(bank.spec.weight_bytes(ref.level) for ref in choices[0])
    return {"source": source.name, "bytes": num_bytes, **quantiles_ms(seconds)}


def _line(rows: Sequence[dict[str, Any]], name: str) -> dict[str, object]:
    own = [row for row in rows if row["source"] == name]
    line = fit_line([row["bytes"] for row in own], [row["p50_ms"] / 1e3 for row in own])
    return line.to_json()


def _sources(bank: FiledBank, folder: Path, can_drop: bool) -> Iterator[Source]:
    """Yield the sources, each usable until the next is asked for."""
    yield from _floors(bank, can_drop)
    with bank.served(resident_bytes=ALL_RESIDENT) as endpoint:
        for name, config in _resident_configs(folder).items():
            with connected(endpoint, config) as client:
                fetch = _of_client(client)
                if config.cache is not None and config.cache.disk is not None:
                    _fill_disk_tier(client, list(bank.written.records))
                yield Source(name, fetch)
                if config.cache is not None:
                    _check_hits(client, name)
    with (
        bank.served(resident_bytes=NOTHING_RESIDENT) as endpoint,
        connected(endpoint, ClientConfig()) as client,
    ):
        yield Source("shard, page cache", _of_client(client))
        if can_drop:
            yield Source("shard, disk", _of_client(client), is_cold=True)
    opened = BankClient.open(bank.folder)

    def read(refs: Sequence[BlockRef]) -> dict[BlockRef, Array]:
        return opened.fetch_blocks(refs).weights

    yield Source("opened files, page cache", read)
    if can_drop:
        yield Source("opened files, disk", read, is_cold=True)


def _floors(bank: FiledBank, can_drop: bool) -> Iterator[Source]:
    """Yield what any way has to do at least: copy the bytes, or read the file."""
    weights = {ref: bank.written.read(ref) for ref in bank.written.records}
    buffers = {ref: np.empty_like(weight) for ref, weight in weights.items()}

    def copy(refs: Sequence[BlockRef]) -> dict[BlockRef, Array]:
        for ref in refs:
            np.copyto(buffers[ref], weights[ref])
        return {ref: buffers[ref] for ref in refs}

    def read(refs: Sequence[BlockRef]) -> dict[BlockRef, Array]:
        for ref in refs:
            with bank.file(ref).open("rb", buffering=0) as file:
                file.readinto(buffers[ref].reshape(-1).view(np.uint8).data)
        return {ref: buffers[ref] for ref in refs}

    yield Source("floor: copy in memory", copy)
    if can_drop:
        yield Source("floor: read of the file, disk", read, is_cold=True)


def _resident_configs(folder: Path) -> dict[str, ClientConfig]:
    disk = DiskTierConfig(directory=folder / "tier", max_queued_bytes=1 << 30)
    return {
        "resident, shared memory": ClientConfig(),
        "resident, gRPC": ClientConfig(same_host=None),
        "client's cache, confirmed": ClientConfig(cache=CacheConfig(max_bytes=ALL_RESIDENT)),
        "client's cache, unasked": ClientConfig(
            cache=CacheConfig(max_bytes=ALL_RESIDENT, max_staleness_s=_LONG_S)
        ),
        # No block fits into a memory of a byte: all of them are kept in files.
        "client's disk tier": ClientConfig(
            cache=CacheConfig(max_bytes=1, max_staleness_s=_LONG_S, disk=disk)
        ),
    }


@contextmanager
def connected(endpoint: str, config: ClientConfig) -> Iterator[BankClient]:
    """Connect, and make sure that the way that is to be measured is the one taken."""
    with BankClient.connect(endpoint, config=config) as client:
        yield client
        if config.same_host is not None and client.same_host_stats.fallbacks:
            raise InternalError(f"fetches went over gRPC: {client.same_host_stats.fallbacks}")


def _of_client(client: BankClient) -> Fetch:
    return lambda refs: client.fetch_blocks(refs).weights


def _fill_disk_tier(client: BankClient, refs: Sequence[BlockRef]) -> None:
    until = time.monotonic() + _WRITING_S
    for ref in refs:
        client.fetch_blocks([ref])
    while (
        (stats := client.cache_stats) is None
        or stats.disk is None
        or (stats.disk.num_writes < len(refs))
    ):
        if time.monotonic() > until:
            raise InternalError(f"the disk tier did not write {len(refs)} blocks: {stats}")
        time.sleep(0.01)


def _check_hits(client: BankClient, name: str) -> None:
    stats = client.cache_stats
    if stats is None or not stats.num_hits + stats.num_confirmed:
        raise InternalError(f"{name}: nothing came from the cache: {stats}")


def paper_model_s(level_bytes: Sequence[int]) -> dict[str, float]:
    """Return the paper's figures: bytes over bandwidth, for levels 1, 2 and 3 of a path.

    Parameters
    ----------
    level_bytes
        Bytes of the block of each of the three levels.
    """
    rates = PAPER_BYTES_PER_S
    first, second, third = level_bytes
    return {
        "flat": sum(level_bytes) / rates["external"],
        "hierarchy": first / rates["ram"] + second / rates["flash"] + third / rates["external"],
        "reload": (second + third) / rates["external"],
    }


def _paper(folder: Path, scale: Scale, say: Say) -> dict[str, Any]:
    """Measure the paper's three cases with the bytes of its 410M configuration."""
    say("latency: the paper's configuration")
    bank = FiledBank.make(folder / "paper", paper_spec())
    paths = [list(bank.spec.path_to(leaf)) for leaf in bank.blocks(bank.spec.num_levels)]
    below = [path[1:] for path in paths]
    level_bytes = [bank.spec.weight_bytes(n + 1) for n in range(bank.spec.num_levels)]
    rows: list[dict[str, Any]] = []

    def add(case: str, source: Source, choices: Sequence[list[BlockRef]]) -> None:
        rows.append({"case": case, **_row(bank, source, choices, scale)})

    # What level 1 needs, of all paths, and nothing else fits.
    held = ClientConfig(
        cache=CacheConfig(max_bytes=level_bytes[0] * len(paths) + 1, pinned_levels=(1,))
    )
    can_drop = bank.can_drop()
    with bank.served(resident_bytes=NOTHING_RESIDENT) as endpoint:
        with connected(endpoint, ClientConfig()) as client:
            for is_cold in (True, False)[not can_drop :]:
                source = Source(_place(is_cold), _of_client(client), is_cold=is_cold)
                add("flat", source, paths)
                add("reload", source, below)
        with connected(endpoint, held) as client:
            for is_cold in (True, False)[not can_drop :]:
                add("hierarchy", Source(_place(is_cold), _of_client(client), is_cold), paths)
    with (
        bank.served(resident_bytes=ALL_RESIDENT) as endpoint,
        connected(endpoint, ClientConfig()) as client,
    ):
        for case, choices in (("flat", paths), ("reload", below)):
            add(case, Source("resident", _of_client(client)), choices)
    model = {case: 1e3 * seconds for case, seconds in paper_model_s(level_bytes).items()}
    return {"level_bytes": level_bytes, "model_ms": model, "rows": rows}


def _place(is_cold: bool) -> str:
    return "disk" if is_cold else "page cache"
