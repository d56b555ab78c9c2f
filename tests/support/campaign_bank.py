"""The bank that is killed in a campaign: what its blocks are for, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar

import numpy as np

from membank.wire.format.pack import Pack, PackedBlock, encode_pack
from membank.wire.records import Gradient, Update
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState, LevelSpec
from shard_rig import full_tree
from tiny_bank import gradient_for

SPEC = BankSpec(
    name="campaign",
    num_layers=1,
    width=8,
    levels=(
        LevelSpec(fan_out=8, block_width=2, learning_rate=0.1),
        LevelSpec(fan_out=2, block_width=1, learning_rate=0.05),
    ),
    num_partitions=4,
    max_staleness=64,
    init_seed=7,
    fingerprint="anchor",
)
"""Eight topics of one block and two leaves; topic t lies in partition t % 4."""

NUM_SHARDS = 2
"""Shards of the bank."""


def shard_of(ref: BlockRef) -> int:
    """Return the shard that owns a block: partition p belongs to shard p % 2."""
    return SPEC.partition_of(ref) % NUM_SHARDS


def by_shard(refs: Iterable[BlockRef]) -> dict[int, list[BlockRef]]:
    """Return blocks by the shard that owns them."""
    split: dict[int, list[BlockRef]] = {}
    for ref in refs:
        split.setdefault(shard_of(ref), []).append(ref)
    return split


TREE = full_tree(SPEC)
"""Labels and centroids of every block."""


def _blocks_of(topics: Sequence[int]) -> tuple[BlockRef, ...]:
    return tuple(ref for topic in topics for ref in SPEC.subtree(BlockRef(1, topic)))


TRAINED = _blocks_of([0, 1, 2, 3])
"""Blocks that updates go to; every partition has some."""
MARKED = _blocks_of([4, 5, 6])
"""Blocks that are only ever swapped, all at once, each element to the same number."""
DOOMED_TOPIC = BlockRef(1, 7)
"""The topic that is deleted and made anew again and again."""
DOOMED = _blocks_of([7])
"""Its blocks; updates go to them too."""
HIDDEN_TOPIC = BlockRef(1, 2)
"""The topic that is withheld and restored; its blocks are trained."""


class Phase(IntEnum):
    """What a thread of the service is at; the numbers are those of the board."""

    IDLE = 0
    OPENING = 1
    UPDATE = 2
    FETCH = 3
    CONSOLIDATION = 4
    PREPARE = 5
    COMMIT = 6
    SWAP = 7
    WITHHOLD = 8
    RESTORE = 9
    SNAPSHOT = 10
    ROLLBACK = 11
    DELETE = 12
    IMPORT = 13
    UNPIN = 14
    GC = 15
    SURVEY = 16


# ---- what clients ask


@dataclass(frozen=True, kw_only=True, slots=True)
class Push:
    """Apply the gradients of one number."""

    request_id: str
    number: int
    bases: Mapping[BlockRef, int]

    def update(self, refs: Sequence[BlockRef]) -> Update:
        """Return the part of it that concerns `refs`."""
        return Update(
            request_id=self.request_id,
            step=self.number,
            gradients=tuple(
                Gradient(
                    ref=ref,
                    base_version=self.bases[ref],
                    values=gradient_for(SPEC, ref, self.number),
                )
                for ref in refs
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Swap:
    """Make every element of the marked blocks this number."""

    phase: ClassVar = Phase.SWAP
    request_id: str
    value: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Replace:
    """Give some trained blocks the content of this number."""

    phase: ClassVar = Phase.SWAP
    request_id: str
    refs: tuple[BlockRef, ...]
    number: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Withhold:
    """Withhold the topic that is there for it."""

    phase: ClassVar = Phase.WITHHOLD
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Restore:
    """End that."""

    phase: ClassVar = Phase.RESTORE
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TakeSnapshot:
    """Pin the present state."""

    phase: ClassVar = Phase.SNAPSHOT
    request_id: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DropSnapshot:
    """Give a snapshot up."""

    phase: ClassVar = Phase.UNPIN
    request_id: str
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RollBack:
    """Return to a snapshot, or to the end of a revision."""

    phase: ClassVar = Phase.ROLLBACK
    request_id: str
    target: str | int
    topic: BlockRef | None = None
    """Only this topic; None = everything."""
    only_block: bool = False
    """True to leave out what lies under it."""

    def refs(self) -> tuple[BlockRef, ...]:
        """Return the blocks that it is about."""
        if self.topic is None:
            return tuple(SPEC.blocks())
        return (self.topic,) if self.only_block else tuple(SPEC.subtree(self.topic))


@dataclass(frozen=True, kw_only=True, slots=True)
class Delete:
    """Delete the topic that is there for it."""

    phase: ClassVar = Phase.DELETE
    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Recreate:
    """Make the deleted topic anew with the content of this number."""

    phase: ClassVar = Phase.IMPORT
    request_id: str
    number: int
    packed: bool
    """True to import it, False to swap it in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Collect:
    """Remove what nothing needs."""

    phase: ClassVar = Phase.GC
    request_id: str
    keep_revisions: int | None
    """Revisions to keep besides snapshots; None = as set."""


Transaction = (
    Swap | Replace | Withhold | Restore | TakeSnapshot | DropSnapshot | RollBack | Delete | Recreate
)
"""What makes a revision."""

AdminOperation = Transaction | Collect
"""What the operator asks."""


@dataclass(frozen=True, slots=True)
class ArmKill:
    """Die at a mutating call of the storage."""

    calls: int
    """Calls before it."""
    after: bool
    """True to die after it, False in its middle."""


# ---- what is answered


@dataclass(frozen=True, kw_only=True, slots=True)
class Fetched:
    """Blocks of one shard, as of one revision."""

    revision: int
    versions: Mapping[BlockRef, int]
    weights: Mapping[BlockRef, bytes]
    """Of blocks with content alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Image:
    """Everything that can be said of a block but its version."""

    state: BlockState
    step: int
    arrays: tuple[bytes, ...] = field(repr=False)
    """Bytes per role, in the order of the spec; none for a deleted block."""

    def told_from(self, other: Image) -> str:
        """Return a description that says where `other` differs."""
        pairs = zip(SPEC.roles, self.arrays, other.arrays, strict=False)
        differing = [role.value for role, mine, theirs in pairs if mine != theirs]
        return f"{self} with another {', '.join(differing) or 'state'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Surveyed:
    """Blocks, as kept and as fetched."""

    versions: Mapping[BlockRef, int]
    images: Mapping[BlockRef, Image]
    served: Mapping[BlockRef, bytes]
    """Weights as a fetch returns them; of active blocks alone."""


# ---- contents by number


def marked_content(ref: BlockRef, value: int) -> Array:
    """Return the content of a marked block."""
    return np.full(SPEC.block_shape(ref.level), value, np.float32)


def numbered_content(ref: BlockRef, number: int) -> Array:
    """Return content that no other number and no other block has."""
    return gradient_for(SPEC, ref, number)


def doomed_pack(number: int) -> bytes:
    """Return a pack that makes the deleted topic anew."""
    return encode_pack(
        Pack(
            spec=SPEC,
            topic=DOOMED_TOPIC,
            revision=0,
            blocks=tuple(
                PackedBlock(ref=ref, version=1, step=0, weight=numbered_content(ref, number))
                for ref in sorted(DOOMED)
            ),
            labels={ref: f"label {number} of {ref}" for ref in DOOMED},
        )
    )
