"""Numbers written into the contents of swaps, by which a reader tells a mixture of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from membank.wire.spec import Array, BankSpec, BlockRef

MAX_MARK = 0x3BFF
"""Largest mark: as the bits of any element type of a bank it is a small, finite number."""

_NUM_PLACES = 256
_MAX_EXAMPLES = 5
_CONTENT_STD = 0.02


class MarkedContents:
    """The contents that a swap puts in place: noise, and a mark in many places of each block.

    Two sets of noise take turns, so that each swap changes all bytes.

    Parameters
    ----------
    spec
        The bank.
    refs
        The blocks that are swapped.
    seed
        Seed of the noise.
    """

    def __init__(self, spec: BankSpec, refs: Sequence[BlockRef], seed: int) -> None:
        rng = np.random.Generator(np.random.PCG64([seed, 3]))
        dtype = spec.numpy_dtype
        self._turns: list[dict[BlockRef, Array]] = [{}, {}]
        for ref in refs:
            noise = rng.standard_normal(spec.block_shape(ref.level), np.float32) * _CONTENT_STD
            self._turns[0][ref] = noise.astype(dtype)
            self._turns[1][ref] = (-noise).astype(dtype)

    def marked(self, mark: int) -> Mapping[BlockRef, Array]:
        """Return (L, P, R, D) contents that hold `mark`, 1 to `MAX_MARK`; valid until the call after next."""
        contents = self._turns[mark % 2]
        for weight in contents.values():
            write_mark(weight, mark)
        return contents


def write_mark(weight: Array, mark: int) -> None:
    """Write `mark`, 1 to `MAX_MARK`, into many places of a C-contiguous array."""
    if not 1 <= mark <= MAX_MARK:
        raise ValueError(f"mark is {mark}; accepted: 1..{MAX_MARK}")
    bits = _bits(weight)
    bits[_places(len(bits))] = mark


def read_marks(weight: Array) -> frozenset[int]:
    """Return the marks in an array: one, unless it is torn or never had one."""
    bits = _bits(weight)
    return frozenset(np.unique(bits[_places(len(bits))]).tolist())


@dataclass(kw_only=True, slots=True)
class Sightings:
    """What a reader saw of swaps, fetch by fetch."""

    num_checked: int = 0
    """Fetches that held swapped blocks."""
    num_mixed: int = 0
    """Fetches among them that were wholly of no single swap, or of one that was over already."""
    examples: list[str] = field(default_factory=list)
    """What the first of those were."""
    marks: set[int] = field(default_factory=set)
    """Marks that were seen."""


class MixtureDetector:
    """Looks whether each fetch is wholly of one swap, and never of an earlier one than the last.

    Contents and versions must agree: each swap changes the version of every block by one, and
    nobody else changes the blocks.

    Parameters
    ----------
    versions
        Version that each swapped block has with mark 1.
    """

    def __init__(self, versions: Mapping[BlockRef, int]) -> None:
        self._first = dict(versions)
        self._newest: dict[BlockRef, int] = {}
        self.seen = Sightings()
        """What was seen so far."""

    def check(self, weights: Mapping[BlockRef, Array], versions: Mapping[BlockRef, int]) -> None:
        """Look at what one fetch returned; blocks that are not swapped are passed over."""
        refs = [ref for ref in weights if ref in self._first]
        if not refs:
            return
        self.seen.num_checked += 1
        problem = self._problem(refs, weights, versions)
        if problem is not None:
            self.seen.num_mixed += 1
            if len(self.seen.examples) < _MAX_EXAMPLES:
                self.seen.examples.append(problem)

    def _problem(
        self,
        refs: Sequence[BlockRef],
        weights: Mapping[BlockRef, Array],
        versions: Mapping[BlockRef, int],
    ) -> str | None:
        found = {ref: read_marks(weights[ref]) for ref in refs}
        self.seen.marks |= frozenset().union(*found.values())
        torn = [ref for ref, marks in found.items() if len(marks) != 1]
        if torn:
            return f"block {torn[0]} holds marks {sorted(found[torn[0]])[:4]}"
        marks = {ref: next(iter(held)) for ref, held in found.items()}
        by_version = {ref: versions[ref] - self._first[ref] + 1 for ref in refs}
        if len(set(marks.values())) > 1:
            return f"blocks of several swaps: {_told(marks)}"
        if marks != by_version:
            return f"marks {_told(marks)} under the versions of swaps {_told(by_version)}"
        back = [ref for ref in refs if marks[ref] < self._newest.get(ref, 0)]
        if back:
            return f"block {back[0]} went back from {self._newest[back[0]]} to {marks[back[0]]}"
        self._newest |= marks
        return None


def _told(numbers: Mapping[BlockRef, int]) -> str:
    return ", ".join(f"{ref}: {number}" for ref, number in numbers.items())


def _bits(weight: Array) -> npt.NDArray[np.unsignedinteger]:
    flat = weight.reshape(-1)
    return flat.view(np.dtype(f"u{flat.dtype.itemsize}"))


def _places(length: int) -> npt.NDArray[np.int64]:
    """Return places in an array of `length`, spread evenly, its first and its last among them."""
    return np.linspace(0, length - 1, min(length, _NUM_PLACES)).astype(np.int64)
