"""What happened to one block, and which transactions there were, as clients were told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from campaign_bank import SPEC, Image, Push, TakeSnapshot, Transaction
from membank.wire.errors import Reason
from membank.wire.spec import BlockRef, BlockState


@dataclass(frozen=True, slots=True)
class Asked:
    """A request at the moment when it was first sent."""

    moment: int
    """Counts what was sent and answered."""
    versions: Mapping[BlockRef, int]
    """Versions that somebody had been told of."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A gradient that a block did not accept."""

    request_id: str
    """Of its push."""
    base: int
    """Version that it was computed on."""
    version: int
    """Version at which it was refused."""
    reason: Reason | None
    """Why, as the bank says."""


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
            Version that somebody had been told of when that was asked.
        until
            Moment of its answer.
        """
        version = since
        images = set(self.images[version])
        while version + 1 in self.images and self.causes[version + 1].asked.moment < until:
            version += 1
            images |= self.images[version]
        return images

    def is_stale(self, base: int, version: int) -> bool:
        """Whether a gradient computed on `base` must be refused at `version`."""
        since = (self.causes[number].request for number in range(base + 1, version + 1))
        # What an operator changed has other content, which the gradient was not made for.
        return version - base > SPEC.max_staleness or not all(isinstance(r, Push) for r in since)

    def justifies(self, refusal: Refusal) -> bool:
        """Whether a gradient had to be refused, and for that reason."""
        states = {image.state for image in self.images[refusal.version]}
        match refusal.reason:
            case Reason.BLOCK_WITHHELD:
                return BlockState.WITHHELD in states
            case Reason.BLOCK_DELETED:
                return BlockState.DELETED in states
            case Reason.STALE_VERSION:
                return self.is_stale(refusal.base, refusal.version)
            case _:
                # All gradients are finite, and computed on versions that the bank told of.
                return False

    def shows(self, version: int, weight: bytes | None) -> bool:
        """Whether a fetch may return that at a version; None = no content."""
        return weight in {served(image) for image in self.images[version]}


def served(image: Image) -> bytes | None:
    """Return the weight that a fetch of a block returns; None = no content."""
    return image.arrays[0] if image.state is BlockState.ACTIVE else None
