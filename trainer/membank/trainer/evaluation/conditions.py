"""The memory conditions that are always shown side by side, and what each one fetches.

A model with more parameters that saw more tokens is better in any case; only beside the controls
does a gain show that the right memory was fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch

from membank.trainer.model import MemoryBatch
from membank.trainer.training import MemorySource, distinct_blocks, join, leaf_path
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BankSpec, Path


class Condition(StrEnum):
    """What the anchor has besides itself."""

    ANCHOR = "anchor"
    """Nothing."""
    GENERIC = "generic"
    """The generic memory: as much as a fetch, the same whatever the text."""
    FETCHED = "fetched"
    """The path that the retriever finds for the text."""
    ORACLE = "oracle"
    """The path of the leaf that was trained on the text's document."""
    RANDOM = "random"
    """The path of another leaf, drawn with a fixed seed."""
    WITHHELD = "withheld"
    """The fetched path without its most telling block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPaths:
    """Paths of the texts (prompts or documents) to be evaluated, in their order."""

    routed: tuple[Path, ...]
    """Where the retriever routes each text; may end early or be empty."""
    holding: tuple[Path, ...]
    """The full path of the leaf that holds each text's document."""
    leaves: tuple[int, ...]
    """Leaves to draw random ones from: those that were trained."""

    def __post_init__(self) -> None:
        if len(self.routed) != len(self.holding):
            raise InvalidArgumentError(
                f"there are {len(self.routed)} routed paths and {len(self.holding)} holding ones; "
                "each text has one of both"
            )
        if not self.leaves:
            raise InvalidArgumentError("leaves is empty; name at least one trained leaf")

    def select(self, rows: Sequence[int]) -> EvaluationPaths:
        """Return the paths of some of the texts, in that order."""
        return EvaluationPaths(
            routed=tuple(self.routed[row] for row in rows),
            holding=tuple(self.holding[row] for row in rows),
            leaves=self.leaves,
        )

    def routed_share(self, num_levels: int) -> tuple[float, ...]:
        """Return, per level, the part of the texts routed to the block that holds their document."""
        hits = [
            [a[:level] == b[:level] and len(a) >= level for level in range(1, num_levels + 1)]
            for a, b in zip(self.routed, self.holding, strict=True)
        ]
        return tuple(float(share) for share in np.mean(hits, axis=0)) if hits else ()


def random_paths(spec: BankSpec, paths: EvaluationPaths, seed: int) -> list[Path]:
    """Return the path of a random leaf for each text.

    The leaf is drawn from the trained ones, from another topic of level 1 where there is one, and
    never is the one that holds the text's document, unless there is no other.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    every = [leaf_path(spec, leaf) for leaf in paths.leaves]
    found = []
    for holding in paths.holding:
        far = [path for path in every if path[0] != holding[0]]
        near = [path for path in every if path != holding]
        candidates = far or near or every
        found.append(candidates[int(rng.integers(len(candidates)))])
    return found


class ConditionMemory:
    """Gives the memory of texts under each condition; every block is fetched once.

    Parameters
    ----------
    memory
        The bank.
    generic
        The generic memory; None leaves that condition out.
    paths
        Paths of the texts.
    seed
        Seed of the random leaves.
    device
        Where the anchor is; None is the CPU.
    """

    def __init__(
        self,
        memory: MemorySource,
        generic: MemorySource | None,
        paths: EvaluationPaths,
        *,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self._device = device
        self._memory = memory
        self._generic = generic
        self._paths = {
            Condition.FETCHED: list(paths.routed),
            Condition.ORACLE: list(paths.holding),
            Condition.RANDOM: random_paths(memory.spec, paths, seed),
        }
        refs = distinct_blocks(path for group in self._paths.values() for path in group)
        self._fetched = memory.fetch(refs)
        if generic is not None:
            generic_path = leaf_path(generic.spec, 0)
            self._paths[Condition.GENERIC] = [generic_path] * len(paths.routed)
            self._fetched_generic = generic.fetch(generic_path)

    @property
    def num_levels(self) -> int:
        """Levels of the bank."""
        return self._memory.spec.num_levels

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """The conditions at hand, `WITHHELD` aside: it is made of the fetched one."""
        left_out = {Condition.WITHHELD}
        if self._generic is None:
            left_out.add(Condition.GENERIC)
        return tuple(condition for condition in Condition if condition not in left_out)

    def order(self, condition: Condition) -> list[int]:
        """Return the texts in an order in which those of one path are neighbours."""
        if condition is Condition.ANCHOR:
            return list(range(len(self._paths[Condition.FETCHED])))
        paths = self._paths[condition]
        return sorted(range(len(paths)), key=lambda row: paths[row])

    def batch(
        self, condition: Condition, rows: Sequence[int], *, without_level: int | None = None
    ) -> MemoryBatch | None:
        """Return the memory of some texts.

        Parameters
        ----------
        condition
            Any but `WITHHELD`.
        rows
            Texts, by their position.
        without_level
            Level whose block is left out, the others kept; None leaves out none.
        """
        if condition is Condition.ANCHOR:
            return None
        generic = condition is Condition.GENERIC
        source = self._generic if generic else self._memory
        assert source is not None
        paths = [self._paths[condition][row] for row in rows]
        fetched = self._fetched_generic if generic else self._fetched
        joined = join(source.spec, paths, fetched, device=self._device)
        if without_level is None:
            return joined.memory
        kept = [x for n, x in enumerate(joined.memory.levels, start=1) if n != without_level]
        return MemoryBatch(kept) if kept else None
