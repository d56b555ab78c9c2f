"""What clients ask for: paths of the tree, some topics far more often than others."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice

import numpy as np

from membank.wire.codec import WireCodec, fetch_codec
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import BankSpec, BlockRef, Path

_MOST_LEAVES = 1 << 20
"""Leaves that are considered at most: the popularity of more is not worth its memory."""
_MISSES_IN_A_ROW = 2000
"""Leaves after which choosing gives up: what is left of the bytes hardly fits another one."""
_DRAWN_AT_ONCE = 4096


class Operation(StrEnum):
    """One kind of call."""

    FETCH = "fetch"
    """Fetches the blocks of a path."""
    PUSH = "push"
    """Pushes one gradient for each block of a path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What all clients of a run do together."""

    push_share: float = 0.0
    """Share of calls that are pushes, 0 to 1; the others are fetches."""
    num_requests: int | None = None
    """Calls of all clients together after which the run ends; None = the time alone ends it."""
    duration_s: float = math.inf
    """Seconds after which the run ends, > 0."""
    zipf: float = 1.0
    """Exponent of the popularity of leaves: the leaf of rank k is asked for in proportion to
    ``k ** -zipf``; 0 = all alike."""
    dtype: str | None = None
    """What weights and gradients travel as, by the name of a `membank.wire.codec`; None = the bank's
    element type."""
    seed: int = 0
    """Seed of popularity and order, >= 0."""

    def __post_init__(self) -> None:
        _require(0 <= self.push_share <= 1, "push_share", self.push_share, "0 to 1")
        ok = self.num_requests is None or self.num_requests >= 1
        _require(ok, "num_requests", self.num_requests, ">= 1")
        _require(self.duration_s > 0, "duration_s", self.duration_s, "> 0")
        ends = self.num_requests is not None or math.isfinite(self.duration_s)
        _require(ends, "duration_s", self.duration_s, "a time, or num_requests")
        _require(0 <= self.zipf <= 16, "zipf", self.zipf, "0 to 16")
        _require(self.seed >= 0, "seed", self.seed, ">= 0")
        if self.dtype is not None:
            fetch_codec(self.dtype)

    @property
    def operations(self) -> tuple[Operation, ...]:
        """Kinds of calls that occur."""
        kinds = ((Operation.FETCH, self.push_share < 1), (Operation.PUSH, self.push_share > 0))
        return tuple(kind for kind, occurs in kinds if occurs)

    def requests_of(self, client: int, num_clients: int) -> int | None:
        """Return the share of one client, counted from 0, in `num_requests`."""
        if self.num_requests is None:
            return None
        share, rest = divmod(self.num_requests, num_clients)
        return share + (client < rest)


class ZipfPaths:
    """Paths to leaves, endlessly: the first leaf most often, the last one least.

    Parameters
    ----------
    spec
        The bank.
    leaves
        Leaves in the order of their popularity, at least one.
    exponent
        The leaf of rank k (from 1) comes in proportion to ``k ** -exponent``.
    seed
        Numbers that decide the order; the same ones give the same paths on every machine.
    """

    def __init__(
        self, spec: BankSpec, leaves: Sequence[BlockRef], exponent: float, seed: Sequence[int]
    ) -> None:
        self._paths = [spec.path_to(leaf) for leaf in leaves]
        weights = np.arange(1, len(leaves) + 1, dtype=np.float64) ** -exponent
        self._cumulated = np.cumsum(weights)
        self._rng = np.random.Generator(np.random.PCG64(list(seed)))

    def __iter__(self) -> Iterator[Path]:
        while True:
            drawn = self._rng.random(_DRAWN_AT_ONCE) * self._cumulated[-1]
            for rank in np.searchsorted(self._cumulated, drawn, side="right"):
                # Rounding may put the largest draw beyond the end.
                yield self._paths[min(int(rank), len(self._paths) - 1)]


def choose_leaves(
    spec: BankSpec, *, max_bytes: int, with_optimizer: bool, seed: int
) -> tuple[BlockRef, ...]:
    """Choose leaves whose paths together stay within `max_bytes`, so that a run does as well.

    Parameters
    ----------
    spec
        The bank.
    max_bytes
        Bytes of all distinct blocks on the paths; one path is always taken, whatever it has.
    with_optimizer
        Whether optimizer state counts: that of a block that is pushed to is in memory too.
    seed
        Decides which leaves, and their order, >= 0.

    Returns
    -------
    tuple of BlockRef
        Leaves in random order over the whole tree, which is that of their popularity.
    """
    num_leaves = spec.num_clusters(spec.num_levels)
    level_bytes = [
        spec.weight_bytes(level) + (spec.optimizer_bytes(level) if with_optimizer else 0)
        for level in range(1, spec.num_levels + 1)
    ]
    chosen: list[BlockRef] = []
    touched: set[BlockRef] = set()
    left, misses = max_bytes, 0
    for cluster in random.Random(seed).sample(range(num_leaves), min(num_leaves, _MOST_LEAVES)):
        leaf = BlockRef(spec.num_levels, cluster)
        added = [ref for ref in spec.path_to(leaf) if ref not in touched]
        added_bytes = sum(level_bytes[ref.level - 1] for ref in added)
        if added_bytes <= left or not chosen:
            chosen.append(leaf)
            touched.update(added)
            left, misses = left - added_bytes, 0
        elif (misses := misses + 1) > _MISSES_IN_A_ROW or left < level_bytes[-1]:
            break
    return tuple(chosen)


def touched_blocks(spec: BankSpec, leaves: Sequence[BlockRef]) -> tuple[BlockRef, ...]:
    """Return the distinct blocks on the paths to `leaves`."""
    return tuple(dict.fromkeys(ref for leaf in leaves for ref in spec.path_to(leaf)))


def in_batches(
    spec: BankSpec, refs: Sequence[BlockRef], max_bytes: int
) -> Iterator[list[BlockRef]]:
    """Yield `refs` in runs of at most `max_bytes` of weights, at least one block each."""
    blocks = iter(refs)
    count = max(
        1, max_bytes // max(spec.weight_bytes(level + 1) for level in range(spec.num_levels))
    )
    while batch := list(islice(blocks, count)):
        yield batch


def wire_codec(spec: BankSpec, traffic: Traffic) -> WireCodec:
    """Return what weights and gradients travel as."""
    return fetch_codec(traffic.dtype or spec.dtype)


def travelling_bytes(spec: BankSpec, traffic: Traffic) -> dict[int, int]:
    """Return the bytes of a block, and of a gradient for it, as they travel, by level."""
    codec = wire_codec(spec, traffic)
    levels = range(1, spec.num_levels + 1)
    return {level: codec.num_bytes(spec.block_params(level)) for level in levels}


def _require(ok: bool, name: str, value: object, accepted: str) -> None:
    if not ok:
        raise InvalidArgumentError(
            f"{name} is {value!r}; accepted: {accepted}",
            reason=Reason.BAD_CONFIG,
            metadata={"field": name, "value": str(value)},
        )
