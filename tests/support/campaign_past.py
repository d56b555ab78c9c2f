"""What happened to one block, and which transactions there were, as clients were told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from campaign_bank import SPEC, Image, Push, TakeSnapshot, Transaction
from membank.wire.spec import BlockRef


@dataclass(frozen=True, slots=True)
class Asked:
    """A request at the moment when it was first sent."""

    moment: int
    """Counts what was sent and answered."""
    versions: Mapping[BlockRef, int]
    """Versions that had been acknowledged."""


@dataclass(frozen=True, slots=True)
class Cause:
    """What made a version of a block."""

    asked: Asked
    """When it was asked."""
    request: Push | Transaction
    """What was asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deed:
    """A transaction that was acknowledged."""

    revision: int
    """Its revision."""
    asked: Asked
    """When it was asked."""
    answered: int
    """Moment of the answer: what was sent later came later."""
    request: Transaction
    """What was asked."""
    changed: frozenset[BlockRef]
    """What it changed."""

    def partitions(self) -> set[int]:
        """Return the partitions that it folded, as far as can be told."""
        if isinstance(self.request, TakeSnapshot):
            return set(range(SPEC.num_partitions))
        return {SPEC.partition_of(ref) for ref in self.changed}


class Past:
    """The versions of one block.

    Parameters
    ----------
    initial
        What it is before it is ever changed.
    """

    def __init__(self, initial: Image) -> None:
        self.causes: dict[int, Cause] = {}
        """What made each version, as far as that was told."""
        self.images: dict[int, set[Image]] = {0: {initial}}
        """What each version may be, as far as that was computed; without gaps."""

    @property
    def known(self) -> int:
        """Newest version of which it is known what it may be."""
        return max(self.images)

    def between(self, since: int, until: int) -> set[Image]:
        """Return what the block may have been while something else was done.

        Parameters
        ----------
        since
            Version that had been acknowledged when that was asked.
        until
            Moment of its answer.
        """
        version = since
        images = set(self.images[version])
        while version + 1 in self.images and self.causes[version + 1].asked.moment < until:
            version += 1
            images |= self.images[version]
        return images
