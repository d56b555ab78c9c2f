"""The steps of a transaction: what may be done to blocks, topics and the tree, all at one revision.

Every step sees the bank as it was before the transaction, so their order says nothing, and no block
may be changed by two of them. What each does to content, optimizer state, version and state is in
docs/transactions.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.spec import Array, BlockRef


@dataclass(frozen=True, kw_only=True, slots=True)
class Swap:
    """Replace the content of a block and make it active; a deleted one is created anew."""

    kind: ClassVar[str] = "swap"
    """Name of the step, as the audit log has it."""

    ref: BlockRef
    """The block."""
    weight: Array = field(repr=False)
    """(L, P, R, D) in the bank's dtype."""
    expected_version: int | None = None
    """Version that the block must have; None = any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Combine:
    """Make the content of a block ``keep * own + add * other``, in float32, rounded once.

    (0, 1) copies, (1 - a, a) blends, (s, 0) scales, (0, 0) zeroes; a term whose factor is 0 is left
    out. A withheld block stays withheld; a deleted one is created anew where `keep` is 0.

    Raises
    ------
    InvalidArgumentError
        If a factor is not finite in float32 (NOT_FINITE), or another block is meant and none named.
    """

    kind: ClassVar[str] = "combine"
    """Name of the step, as the audit log has it."""

    ref: BlockRef
    """The block."""
    keep: float
    """Factor of its own content; rounded to float32, as it travels."""
    other: BlockRef | None = None
    """The other block, active and of the same shape; None = none."""
    add: float = 0.0
    """Factor of the other block's content; rounded to float32."""
    expected_version: int | None = None
    """Version that the block must have; None = any."""
    expected_other_version: int | None = None
    """Version that the other block must have; None = any."""

    def __post_init__(self) -> None:
        for name in ("keep", "add"):
            object.__setattr__(self, name, self._factor(name))
        if self.other is None and (self.add or self.expected_other_version is not None):
            raise InvalidArgumentError(
                f"block {self.ref} is to be combined with another, and none is named; name it",
                metadata={"block": str(self.ref)},
            )

    def _factor(self, name: str) -> float:
        with np.errstate(over="ignore"):
            factor = float(np.float32(getattr(self, name)))
        if not math.isfinite(factor):
            raise InvalidArgumentError(
                f"{name} of block {self.ref} is {getattr(self, name)}; accepted: numbers that are "
                "finite in float32",
                reason=Reason.NOT_FINITE,
                metadata={"block": str(self.ref)},
            )
        return factor


@dataclass(frozen=True, kw_only=True, slots=True)
class Withhold:
    """Hide a topic from fetches and updates, reversibly; deleted blocks are left alone."""

    kind: ClassVar[str] = "withhold"
    """Name of the step, as the audit log has it."""

    topic: BlockRef
    """The topic."""
    only_block: bool = False
    """True leaves what lies under it as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Restore:
    """End the withholding of a topic; deleted blocks are left alone."""

    kind: ClassVar[str] = "restore"
    """Name of the step, as the audit log has it."""

    topic: BlockRef
    """The topic."""
    only_block: bool = False
    """True leaves what lies under it as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delete:
    """Destroy a topic in every retained version, its labels and counts, and the centroids under it."""

    kind: ClassVar[str] = "delete"
    """Name of the step, as the audit log has it."""

    topic: BlockRef
    """The topic."""
    only_block: bool = False
    """True leaves what lies under it as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Change what the tree says of one topic, so that texts find it, or do not.

    Raises
    ------
    InvalidArgumentError
        If nothing is to be changed, a centroid is both given and removed, it is no row of finite
        numbers, or the count is negative.
    """

    kind: ClassVar[str] = "place"
    """Name of the step, as the audit log has it."""

    topic: BlockRef
    """The topic."""
    label: str | None = None
    """Its label, "" = none; None = left as it is."""
    num_documents: int | None = None
    """Documents of the training corpus in it, >= 0; None = left as it is."""
    centroid: Array | None = field(default=None, repr=False)
    """(dims,) finite, as many as the level's others have; kept as float32. None = left as it is."""
    remove_centroid: bool = False
    """True removes the centroid: texts of the topic go to its neighbours from then on."""

    def __post_init__(self) -> None:
        if self.centroid is not None:
            row = np.array(self.centroid, np.float32)
            row.flags.writeable = False
            object.__setattr__(self, "centroid", row)
            self._require(row.ndim == 1 and row.size > 0, f"its centroid has shape {row.shape}")
            self._require(bool(np.isfinite(row).all()), "its centroid is not finite")
        self._require(
            self.centroid is None or not self.remove_centroid,
            "its centroid is to be replaced and removed",
        )
        self._require(
            self.num_documents is None or self.num_documents >= 0,
            f"num_documents is {self.num_documents}",
        )
        changes = (self.label, self.num_documents, self.centroid)
        self._require(
            self.remove_centroid or any(change is not None for change in changes),
            "nothing is to be changed",
        )

    def _require(self, holds: bool, problem: str) -> None:
        if not holds:
            raise InvalidArgumentError(
                f"topic {self.topic} cannot be placed so: {problem}",
                metadata={"topic": str(self.topic)},
            )


TopicStep = Withhold | Restore | Delete
"""A step that applies to a topic and everything under it, or to its block alone."""

Step = Swap | Combine | TopicStep | Place
"""One step of a transaction."""
