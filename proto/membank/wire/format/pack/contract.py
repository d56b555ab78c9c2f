"""What a pack holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from membank.wire.format.pack.digest import sha256_of
from membank.wire.format.tree import TreeDocument
from membank.wire.signing import Signature
from membank.wire.spec import Array, BankSpec, BlockRef, Role


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockBase:
    """What a block held at some time."""

    version: int
    """Its version in the bank that the pack comes from."""
    crc32c: int
    """CRC-32C of its weight, as kept; of the initial content, where it was never written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBlock:
    """One block of a pack."""

    ref: BlockRef
    """The block."""
    version: int
    """Version it had when it was exported."""
    step: int
    """Gradient steps it had taken."""
    weight: Array
    """(L, P, R, D) in the bank's dtype."""
    optimizer_state: Mapping[Role, Array] = field(default_factory=dict)
    """(L, P, R, D) float32 per role; empty = exported without."""
    base: BlockBase | None = None
    """In a diff, what the block held at the base; None = it was deleted there, or this is no diff."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackBase:
    """The state that a diff was made against."""

    revision: int
    """Revision whose end, or with `snapshot` whose beginning, it is."""
    snapshot: str
    """Name of the snapshot; "" = the end of the revision."""
    unchanged: Mapping[BlockRef, BlockBase]
    """The blocks of the topic that the diff does not carry, and what they hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pack:
    """A topic and what is needed to install it elsewhere."""

    spec: BankSpec
    """Spec of the bank it comes from; its fingerprint says which anchor the blocks belong to."""
    topic: BlockRef
    """The topic."""
    revision: int
    """Revision of the bank it was read at."""
    blocks: tuple[PackedBlock, ...]
    """The blocks of the topic that were not deleted, by level, then by cluster; in a diff, only
    those that differ from the base."""
    labels: Mapping[BlockRef, str] = field(default_factory=dict)
    """Labels of the topic and of those under it."""
    num_documents: Mapping[BlockRef, int] = field(default_factory=dict)
    """Documents of the training corpus in each of them."""
    centroids: Mapping[BlockRef, Array] = field(default_factory=dict)
    """(dims,) float32 of each of them; rows of NaN are left out."""
    retriever_sha256: str = ""
    """`retriever_sha256` of the bank's tree: centroids mean nothing to another; "" = no retriever."""
    base: PackBase | None = None
    """What it is a diff against; None = it is no diff."""
    sha256: str = ""
    """Digest of all the above, hexadecimal, as read and checked; "" = it was not read from a file."""
    signatures: tuple[Signature, ...] = ()
    """Signatures of that digest, as read: `check_signatures` says what they are worth."""

    @property
    def refs(self) -> Iterator[BlockRef]:
        """The blocks of which it has content, label or count, by level, then by cluster.

        Centroids do not count: that of a deleted topic stays in a bank as the place where paths end.
        """
        told = {block.ref for block in self.blocks}
        told.update(self.labels, self.num_documents)
        if self.base is not None:
            told.update(self.base.unchanged)
        return iter(sorted(told))


def retriever_sha256(tree: TreeDocument) -> str:
    """Return the digest of a tree's embedder, "" where it has none."""
    if not tree.embedder:
        return ""
    return sha256_of(dict(tree.embedder), tree.arrays)
