"""Records that both ends of the wire share.

Shapes: L layers, P parts (gate, up, down), R block width, D model width. A block is one array of
shape (L, P, R, D); the down part is kept transposed so that all three parts have the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from membank.wire.errors import Reason
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState, Durability


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockHeader:
    """What travels with, or instead of, the content of one block."""

    ref: BlockRef
    """The block."""
    version: int
    """Version of the content; 0 = as initialised, +1 at every change."""
    state: BlockState = BlockState.ACTIVE
    """Anything but ACTIVE has no content and ends the path there."""
    dtype: str = "float32"
    """Element type of the content as it travels; ``int8`` is an encoding of float32."""
    shape: tuple[int, ...] = ()
    """(L, P, R, D); empty where there is no content."""
    num_bytes: int = 0
    """Bytes of the content as it travels; 0 where nothing does."""
    crc32c: int = 0
    """CRC-32C of those bytes; of an unchanged block's too, where the service knows it, else 0."""
    unchanged: bool = False
    """True where the caller already holds this version."""
    first_layer: int = 0
    """First layer of the content, where that is a part of the block's."""
    num_layers: int = 0
    """Layers of that part, whose size and CRC the header has; 0 = the content is all of the block's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A block as fetched."""

    header: BlockHeader
    """Version, state and shape."""
    weight: Array | None
    """(L, P, R, D) in ``header.dtype``, float32 where that is ``int8``; None where nothing travelled."""

    @property
    def ref(self) -> BlockRef:
        """The block's name."""
        return self.header.ref

    @property
    def version(self) -> int:
        """The block's version."""
        return self.header.version


@dataclass(frozen=True, kw_only=True, slots=True)
class Gradient:
    """The gradient of one block, to be pushed."""

    ref: BlockRef
    """The block."""
    base_version: int
    """Version that the gradient was computed on."""
    values: Array
    """(L, P, R, D), C-contiguous, float32, bfloat16 or float16; not retained."""
    crc32c: int | None = None
    """CRC-32C of the bytes of `values`, as whoever received them has checked it: what is kept of them
    is then checked end to end. None = not known."""
    encoding: str = ""
    """Encoding that `values` are in, on their way to a service: then they are a payload of
    `membank.wire.codec`, (num_bytes,) uint8. Empty = none; what a shard gets has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """One push: gradients of some blocks, applied once however often it is sent."""

    request_id: str
    """Unique id; a retry carries the same."""
    step: int
    """Training step of the sender; recorded."""
    gradients: tuple[Gradient, ...]
    """One gradient per block, no block twice."""
    learning_rate_scale: float = 1.0
    """Multiplies the bank's learning rates (schedule); finite, >= 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateResult:
    """What became of one gradient."""

    ref: BlockRef
    """The block."""
    accepted: bool
    """True where it was applied."""
    version: int
    """Version after it, or the current one where it was refused."""
    reason: Reason | None = None
    """Why it was refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockEvent:
    """One change of one block, as told to watchers."""

    ref: BlockRef
    """The block."""
    version: int
    """Version after the change."""
    state: BlockState
    """State after the change."""
    revision: int
    """Revision in force after the change."""
    is_update: bool = False
    """True for a gradient update, False for an admin transaction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockChange:
    """What a transaction did, or would do, to one block."""

    ref: BlockRef
    """The block."""
    version_before: int
    """Version before."""
    version_after: int
    """Version after."""
    state_before: BlockState
    """State before."""
    state_after: BlockState
    """State after."""
    num_bytes: int
    """Bytes of weight and optimizer state that the block occupies or occupied."""


class CentroidChange(IntEnum):
    """What became of the centroid of a topic; the numbers travel."""

    KEPT = 0
    """It is as it was."""
    SET = 1
    """It was replaced, or there was none before."""
    REMOVED = 2
    """It was removed: texts of the topic go to its neighbours."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TreeChange:
    """What a transaction changed, or would change, in what the tree says of one topic.

    It holds neither labels nor centroids, so that records may keep it for longer than those are kept.
    """

    topic: BlockRef
    """The topic."""
    changes_label: bool = False
    """True where its label changed."""
    changes_num_documents: bool = False
    """True where its number of documents changed."""
    centroid_change: CentroidChange = CentroidChange.KEPT
    """What became of its centroid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TransactionReport:
    """What a transaction did, or would do."""

    revision: int
    """Revision of the bank after it; the present one for a dry run."""
    changes: tuple[BlockChange, ...]
    """The blocks it changed."""
    dry_run: bool = False
    """True where nothing was changed."""
    num_slots_destroyed: int = 0
    """Slots destroyed (delete), every retained version counted."""
    tree_changes: tuple[TreeChange, ...] = ()
    """What it changed in the tree, by topic."""
    packs: tuple[str, ...] = ()
    """Packs in the bank's own store that go with what it deletes, by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What the steps of a transaction did, or would do."""

    report: TransactionReport
    """What changed."""
    receipt: bytes = field(default=b"", repr=False)
    """Signed receipt of what was deleted (JSON); empty where nothing was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionOwner:
    """Which shard serves a partition."""

    partition: int
    """The partition."""
    shard_id: str
    """Identity of the shard."""
    endpoint: str
    """Its gRPC address, host:port."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Which shard serves which partition."""

    generation: int
    """Grows whenever an owner changes."""
    owners: tuple[PartitionOwner, ...]
    """One entry per partition."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BankInfo:
    """What a client must know before its first fetch."""

    spec: BankSpec
    """What was fixed at creation."""
    revision: int
    """Newest committed revision."""
    placement: Placement
    """Which shard serves which partition."""
    tree_revision: int = 0
    """Revision at which the tree document last changed."""
    removal_revision: int = 0
    """Newest revision at which something was withheld or deleted."""
    server_version: str = ""
    """Version of the server software."""
    durability: Durability = Durability.PROCESS
    """What an acknowledged update survives."""
    ship_every_s: float = 0.0
    """Seconds between two copies of the journals to the bank's storage; 0 = none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topic:
    """A cluster with its label and the state of its own block."""

    ref: BlockRef
    """Its block."""
    label: str
    """Label for people; empty once deleted."""
    state: BlockState
    """State of its own block."""
    version: int
    """Version of its own block."""
    step: int
    """Gradient steps its own block has taken."""
    num_bytes: int
    """Bytes of its own block's weight."""
    num_documents: int
    """Documents of the training corpus in it; 0 where unknown."""
    partition: int
    """Partition of its own block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockDescription:
    """One block in full."""

    topic: Topic
    """The topic it belongs to."""
    crc32c: int
    """CRC-32C of the weight as kept."""
    shape: tuple[int, ...]
    """(L, P, R, D)."""
    optimizer_bytes: int
    """Bytes of optimizer state."""
    shard_id: str
    """Shard that serves it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A pinned state of a bank."""

    name: str
    """Its name."""
    revision: int
    """Revision it pins."""
    create_time_s: float
    """Seconds since 1970-01-01 UTC."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPack:
    """A pack in the bank's own store."""

    name: str
    """Its name."""
    topic: BlockRef
    """The topic."""
    revision: int
    """Revision it was read at."""
    num_bytes: int
    """Its size."""
    create_time_s: float
    """Seconds since 1970-01-01 UTC."""


class GarbageKind(IntEnum):
    """Kinds of objects that nothing needs; the numbers travel."""

    UNKNOWN = 0
    """A kind that only a newer service knows."""
    RETIRED_MANIFEST = 1
    """A manifest that no retained revision and no snapshot needs."""
    ABANDONED_MANIFEST = 2
    """A manifest that was prepared for a transaction that was given up."""
    RETIRED_SLOT = 3
    """Part of a slot that only such manifests name."""
    UNNAMED_SLOT = 4
    """Part of a slot that no manifest names: its writer failed before it published."""
    SNAPSHOT = 5
    """The name of a snapshot whose revision was never committed."""
    TREE = 6
    """A tree document that is not in force."""
    PROBE = 7
    """What a test of the storage left, cut off in the middle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Garbage:
    """Objects of one kind that nothing needs."""

    kind: GarbageKind
    """The kind."""
    num_objects: int
    """How many."""
    num_bytes: int
    """Their bytes."""
    keys: tuple[str, ...] = ()
    """Their keys in the bank's storage; the first ones only where there are very many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GarbageReport:
    """What a collection removed, or would remove."""

    garbage: tuple[Garbage, ...]
    """One entry for each kind of which there was something."""
    history_from: int
    """Oldest revision that the whole bank can be rolled back to afterwards, snapshots aside."""
    dry_run: bool = False
    """True where nothing was removed."""

    @property
    def num_bytes(self) -> int:
        """Bytes in all."""
        return sum(garbage.num_bytes for garbage in self.garbage)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardStats:
    """Counters of one shard since it started, and its present sizes."""

    shard_id: str
    """Identity of the shard."""
    endpoint: str
    """gRPC address, host:port."""
    pid: int
    """Process id on its host."""
    partitions: tuple[int, ...]
    """Partitions it owns."""
    num_blocks_fetched: int = 0
    """Blocks served."""
    num_bytes_fetched: int = 0
    """Payload bytes sent."""
    num_updates_applied: int = 0
    """Gradients applied."""
    num_updates_refused: int = 0
    """Gradients refused."""
    num_bytes_pushed: int = 0
    """Bytes of the gradients received, as they are applied; encoded ones took fewer on the way."""
    resident_bytes: int = 0
    """Bytes of blocks and optimizer state in memory."""
    journal_bytes: int = 0
    """Bytes of journal that are not folded into slots yet."""
    num_restarts: int = 0
    """Times the shard was started again by its supervisor."""
    unshipped_s: float = 0.0
    """Age in seconds of the oldest update that would be lost with the shard's machine, where the
    journals are copied to the bank's storage; 0 = none would be, or they are not copied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BankStats:
    """Statistics of a served bank."""

    shards: tuple[ShardStats, ...]
    """One entry per shard."""
    revision: int
    """Newest committed revision."""
    num_blocks: int
    """Number of blocks of the bank."""
    num_blocks_written: int
    """Number of blocks that have been changed since creation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditRecord:
    """Who did what to a bank."""

    revision: int
    """Revision that the operation created."""
    time_s: float
    """Seconds since 1970-01-01 UTC."""
    principal: str
    """Name of the caller."""
    operation: str
    """Operation, such as "delete"."""
    request_id: str
    """Request id."""
    detail: dict[str, object]
    """What it was applied to."""
