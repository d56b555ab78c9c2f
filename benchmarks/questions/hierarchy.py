"""Question 5: what a hierarchy saves, on a trace of requests through the client's own cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.questions.banks import PAPER_PRESET
from benchmarks.questions.latency import Say
from benchmarks.questions.scale import Scale
from benchmarks.questions.trace import (
    CORPUS,
    FAN_OUTS,
    OPEN_SESSIONS,
    WINDOW_WORDS,
    Trace,
    routed_trace,
    stays,
)
from membank.cli.bench.presets import preset_spec
from membank.client import CacheConfig, Eviction
from membank.client.cache.store import BlockStore, Confirmation
from membank.wire.records import Block, BlockHeader
from membank.wire.spec import BlockRef, Path

CACHE_FETCHES = (1, 2, 4, 8, 16, 32)
"""Sizes of the cache, in fetches."""
_POLICIES: Mapping[str, Mapping[str, Any]] = {
    "LRU": {},
    "LFU": {"eviction": Eviction.LFU},
    "LRU, level 1 pinned": {"pinned_levels": (1,)},
}
_CONFIRMED = Confirmation(revision=0, at_s=0.0, stamp=None)


@dataclass(frozen=True, slots=True)
class Layout:
    """How what is known of a topic is cut into blocks."""

    name: str
    """Name of the rows."""
    level_bytes: Mapping[int, int]
    """Bytes of a block, by level; a level that is left out has none."""

    def blocks(self, path: Path) -> list[BlockRef]:
        """Return the blocks that a request for a path needs."""
        return [ref for ref in path if ref.level in self.level_bytes]

    @property
    def bank_bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(
            int(np.prod(FAN_OUTS[:level])) * size for level, size in self.level_bytes.items()
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What a trace did to a cache."""

    hits: Mapping[int, float]
    """Share of a level's blocks that were there, by level."""
    bytes_per_request: float
    """Bytes that had to be fetched."""


def layouts() -> tuple[Layout, ...]:
    """Return the hierarchy and two flat banks, all with fetches of the same size."""
    spec = preset_spec(PAPER_PRESET)
    levels = {level: spec.weight_bytes(level) for level in (1, 2, 3)}
    fetch = sum(levels.values())
    return (
        Layout("hierarchy", levels),
        # The same topics, each with a block of its own.
        Layout("flat, a block per leaf", {3: fetch}),
        # About as large a bank, so that its topics are wider.
        Layout("flat, a block per level-2 topic", {2: fetch}),
    )


def replay(paths: Sequence[Path], layout: Layout, config: CacheConfig) -> Replayed:
    """Send requests through a cache.

    Parameters
    ----------
    paths
        Path of each request, in order.
    layout
        What the blocks are.
    config
        Size and policy of the cache.
    """
    store = BlockStore(config)
    asked: Counter[int] = Counter()
    hits: Counter[int] = Counter()
    num_bytes = 0
    for path in paths:
        refs = layout.blocks(path)
        kept = {ref: store.get(ref, "bfloat16") for ref in refs}
        # As the client does: hits are noted, and what came is kept.
        for ref, found in kept.items():
            asked[ref.level] += 1
            if found is not None:
                hits[ref.level] += 1
                store.use(found)
            else:
                num_bytes += layout.level_bytes[ref.level]
                store.put(_block(ref, layout.level_bytes[ref.level]), _CONFIRMED)
    return Replayed(
        hits={level: hits[level] / count for level, count in sorted(asked.items())},
        bytes_per_request=num_bytes / len(paths),
    )


def _block(ref: BlockRef, num_bytes: int) -> Block:
    # One byte of memory that counts as all of them: the cache looks at sizes alone.
    weight = np.broadcast_to(np.zeros(1, np.uint8), (num_bytes,))
    return Block(header=BlockHeader(ref=ref, version=1, dtype="bfloat16"), weight=weight)


def measure(scale: Scale, say: Say) -> dict[str, Any]:
    """Return bytes per request and hits by order, layout, cache size and policy; and stays."""
    say("hierarchy: fitting the tree, routing the corpus")
    trace, corpus = routed_trace(scale.max_windows)
    orders = trace.orders()
    fetch_bytes = sum(layouts()[0].level_bytes.values())
    rows = []
    for order, paths in orders.items():
        say(f"hierarchy: {order}")
        for layout in layouts():
            for policy, settings in _POLICIES.items():
                if "pinned_levels" in settings and 1 not in layout.level_bytes:
                    continue
                for count in CACHE_FETCHES:
                    config = CacheConfig(max_bytes=count * fetch_bytes, **settings)
                    found = replay(paths, layout, config)
                    rows.append({
                        "order": order, "layout": layout.name, "policy": policy,
                        "cache_fetches": count, "bytes_per_request": found.bytes_per_request,
                        "fetched_share": found.bytes_per_request / fetch_bytes,
                        "hits": {str(level): share for level, share in found.hits.items()},
                    })  # fmt: skip
    return {
        "corpus": CORPUS, "documents": len(corpus.documents), "fan_outs": list(FAN_OUTS),
        "window_words": WINDOW_WORDS, "open_sessions": OPEN_SESSIONS,
        "requests": trace.num_requests, "sessions": len(trace.sessions),
        "fetch_bytes": fetch_bytes,
        "bank_bytes": {layout.name: layout.bank_bytes for layout in layouts()},
        "rows": rows,
        "stays": _stays(trace),
        "batches": _batches(orders, scale.batch_sizes),
    }  # fmt: skip


def _stays(trace: Trace) -> list[dict[str, Any]]:
    longer = [session for session in trace.sessions if len(session) > 1]
    mixed = [trace.orders()["shuffled"]]
    return [
        {"level": level, **stays(longer, level), "by_chance": stays(mixed, level)["stay_share"],
         "mean_session": sum(map(len, longer)) / len(longer)}
        for level in range(1, len(FAN_OUTS) + 1)
    ]  # fmt: skip


def _batches(
    orders: Mapping[str, Sequence[Path]], batch_sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """Return how many distinct blocks batches of the trace need, by level."""
    sizes = layouts()[0].level_bytes
    rows = []
    for order, paths in orders.items():
        for size in batch_sizes:
            groups = [group for group in _groups(paths, size) if len(group) == size]
            distinct = {
                level: float(np.mean([num_distinct(group, level) for group in groups]))
                for level in sizes
            }
            moved = sum(distinct[level] * sizes[level] for level in sizes)
            rows.append({
                "order": order, "batch_size": size,
                "distinct": {str(level): count for level, count in distinct.items()},
                "bytes_share": moved / (size * sum(sizes.values())),
            })  # fmt: skip
    return rows


def num_distinct(paths: Sequence[Path], level: int) -> int:
    """Return the distinct blocks of a level among some paths."""
    return len({path[level - 1] for path in paths if len(path) >= level})


def _groups(paths: Sequence[Path], size: int) -> list[Sequence[Path]]:
    return [paths[start : start + size] for start in range(0, len(paths), size)]
