"""What a shard offers, and the operations that a transaction may ask of it.

A shard owns some partitions of a bank. The data path (`fetch`, `push`, `subscribe`) is called by
the gRPC servicer; the transaction path (`prepare`, `commit`, `abort`) by the controller, through
whatever carries calls between processes. A transaction over several shards works so:

1. every shard *prepares*: it checks the operations, folds its journal and the operations into a
   new manifest per touched partition, marked with the next revision, and holds back updates of
   those partitions. Readers still see the old state;
2. the coordinator creates the record of that revision (create-only). That is the commit: whoever
   creates it first, as a commit or as an abort, decides;
3. every shard *commits* (installs the prepared manifests, destroys what was erased).

A coordinator that gives up before the second step tells the shards to *abort*: one that has
prepared something creates the record as an abort. So nothing prepared is ever dropped while
somebody could still commit it.

A shard that dies in between reads the record when it starts again: a prepared manifest counts
exactly if the record of its revision exists, is a commit, and names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from membank.wire.format import RevisionRecord
from membank.wire.format.receipt import DestroyedBlock, ProcessLife
from membank.wire.records import (
    Block,
    BlockChange,
    BlockEvent,
    Garbage,
    ShardStats,
    Update,
    UpdateResult,
)
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState, Role


@dataclass(frozen=True, kw_only=True, slots=True)
class SetContent:
    """Replace the content of a block and make it active; this also creates a deleted one anew."""

    ref: BlockRef
    """The block."""
    weight: Array
    """(L, P, R, D) in the bank's dtype."""
    optimizer_state: Mapping[Role, Array] = field(default_factory=dict)
    """(L, P, R, D) float32 per role; empty = start afresh from zero."""
    step: int = 0
    """Gradient steps that the optimizer state stands for."""
    expected_version: int | None = None
    """Version that the block must have; None = any."""
    is_given: bool = False
    """Whether the arrays are the shard's to keep: made by `kept`, and nobody else has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Combine:
    """Make the content of a block ``keep * own + add * other``, in float32, rounded once.

    A term whose factor is 0 is left out. The optimizer state starts afresh. A withheld block stays
    withheld; a deleted one is created anew, active, where `keep` is 0, and refused else.
    """

    ref: BlockRef
    """The block."""
    keep: float
    """Factor of its own content; finite."""
    other: Array | None = None
    """(L, P, R, D) in the bank's dtype; None = none."""
    add: float = 0.0
    """Factor of `other`; finite, 0 where there is none."""
    expected_version: int | None = None
    """Version that the block must have; None = any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SetState:
    """Withhold an active block, or make a withheld one active; deleted ones are left alone."""

    ref: BlockRef
    """The block."""
    state: BlockState
    """ACTIVE or WITHHELD."""
    expected_version: int | None = None
    """Version that the block must have; None = any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Erase:
    """Delete a block: no slot, journal frame or copy in memory of any version of it remains."""

    ref: BlockRef
    """The block."""
    expected_version: int | None = None
    """Version that the block must have; None = any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RestoreEntry:
    """Give a block the content and state that a retained manifest names; deleted stays deleted."""

    ref: BlockRef
    """The block."""
    manifest: int
    """Number of the manifest of the block's partition; 0 = as initialised."""


BlockOperation = SetContent | Combine | SetState | Erase | RestoreEntry
"""One step of a transaction."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchResult:
    """Blocks of one revision."""

    revision: int
    """The revision."""
    blocks: tuple[Block, ...]
    """In the order of the request. Weights are read-only views that stay valid and unchanged
    however the block is updated afterwards; asked for in an encoding that no bank keeps, they are as
    they travel, (num_bytes,) uint8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushResult:
    """What became of an update."""

    results: tuple[UpdateResult, ...]
    """In the order of the gradients."""
    duplicate: bool
    """True where the request had been applied before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Destruction:
    """What a shard destroys at commit, for the receipt of it."""

    partitions: tuple[int, ...]
    """Partitions that hold it."""
    blocks: tuple[DestroyedBlock, ...]
    """Every block of it."""
    num_manifests: int
    """Manifests to be rewritten, as they name the blocks."""
    journal_bytes: int
    """Bytes of the partitions' journals before they were folded."""
    process: ProcessLife
    """Process of the shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """What a shard would do at commit."""

    manifests: Mapping[int, int]
    """Manifest of each partition that takes part, for the record of the revision; empty for a
    dry run."""
    changes: tuple[BlockChange, ...]
    """The blocks that change."""
    num_slots_destroyed: int = 0
    """Slots that the commit destroys, every retained version counted."""
    destruction: Destruction | None = None
    """What it destroys, in full; None = nothing, or for a dry run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockStatus:
    """What a shard knows of a block without reading its content."""

    ref: BlockRef
    """The block."""
    version: int
    """Its version."""
    state: BlockState
    """Its state."""
    step: int
    """Gradient steps it has taken."""
    crc32c: int
    """CRC-32C of its weight; 0 for a deleted block and for one that was never written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockContent:
    """A block with its optimizer state, as exported."""

    ref: BlockRef
    """The block."""
    version: int
    """Its version."""
    step: int
    """Gradient steps it has taken."""
    weight: Array
    """(L, P, R, D) in the bank's dtype; read-only."""
    optimizer_state: Mapping[Role, Array]
    """(L, P, R, D) float32 per role; read-only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionHistory:
    """What a partition can be returned to."""

    partition: int
    """The partition."""
    history_from: int
    """Oldest revision whose end is kept, as are those of all later ones; snapshots aside."""
    ends: Mapping[int, int]
    """Manifest that ends each revision that has one of its own. The end of any other revision is
    that of the greatest revision below it; where there is none, the partition is as initialised."""

    def end_of(self, revision: int) -> int:
        """Return the number of the manifest that ends `revision`; 0 = as initialised."""
        until = [number for number in self.ends if number <= revision]
        return self.ends[max(until)] if until else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionGarbage:
    """What a collection removed from a partition, or would remove."""

    garbage: tuple[Garbage, ...]
    """One entry for each kind of which there was something."""
    history_from: int
    """Oldest revision that the partition can be returned to afterwards, snapshots aside."""
    is_complete: bool = True
    """False where more is left than one call removes."""


class Subscription(Protocol):
    """Changes as they take effect; holds at most a bounded number of them."""

    def next_events(self, timeout_s: float) -> tuple[tuple[BlockEvent, ...], int]:
        """Return the next events and the number that was dropped since the last call.

        Waits at most `timeout_s` for the first event; then the tuple is empty.
        """

    def close(self) -> None:
        """End the subscription; `next_events` returns at once from then on."""


@runtime_checkable
class ShardApi(Protocol):
    """A shard as servicers and the controller see it. Every method is safe to call from threads.

    Errors are those of `membank.wire.errors`; a block of a partition that the shard does not own
    is `UnavailableError` with reason NOT_OWNER, so that a client refreshes its placement.
    """

    @property
    def spec(self) -> BankSpec:
        """Spec of the bank."""

    @property
    def revision(self) -> int:
        """Newest revision that this shard has installed."""

    @property
    def process(self) -> ProcessLife:
        """Process that it lives in."""

    def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held_versions: Sequence[int | None] | None = None,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
    ) -> FetchResult:
        """Return blocks of one revision; a held version is answered without content.

        Parameters
        ----------
        refs
            The blocks.
        held_versions
            Version that the caller holds of each, None = none; None = of none.
        dtype
            Element type or encoding to return (`membank.wire.codec`); None = as kept in the bank.
        min_revision
            Revision that this shard must have installed.
        snapshot
            Name of the snapshot to read; "" = the present state. The result has its revision, and
            what is withheld or deleted at present is answered as such.

        Raises
        ------
        NotFoundError
            If there is no such snapshot (UNKNOWN_SNAPSHOT), also where it is given up meanwhile.
        UnavailableError
            If the shard is behind `min_revision` (BEHIND_REVISION).
        """

    def push(self, update: Update) -> PushResult:
        """Apply gradients, each block's atomically; return once the journal holds them."""

    def subscribe(self, refs: Sequence[BlockRef] = (), *, admin_only: bool = False) -> Subscription:
        """Subscribe to changes of `refs` (empty = all of this shard)."""

    def prepare(
        self,
        revision: int,
        operations: Sequence[BlockOperation],
        *,
        all_partitions: bool = False,
        dry_run: bool = False,
    ) -> Prepared:
        """Prepare a transaction (module docstring); a dry run changes and holds back nothing.

        Parameters
        ----------
        revision
            The revision that it would create: one more than the newest record.
        operations
            What to do, at most one operation per block.
        all_partitions
            True to let every partition of the shard take part, so that the record pins the state
            of all of them (a snapshot, or a revision that can be returned to exactly).
        dry_run
            True to find out what would change.

        Raises
        ------
        ConflictError
            If `revision` is not the next one (TRANSACTION_CONFLICT), or a block does not have the
            expected version (VERSION_MISMATCH).
        UnavailableError
            If an earlier transaction still waits for its decision (TRANSACTION_IN_PROGRESS).
        """

    def commit(self, record: RevisionRecord) -> None:
        """Install what was prepared for this revision; a shard without a part notes the number.

        The record must have been created already. May be repeated; if it fails while it destroys
        deleted content, the repetition goes on from there.
        """

    def abort(self, revision: int) -> None:
        """Give up what was prepared for `revision`, by an abort record; no effect where nothing was.

        Whoever prepared it may be another coordinator than the caller: a call may be late. The
        record keeps it from committing what is gone, as it keeps the caller. Where the revision
        has been decided, that is followed.
        """

    def settle(self, now: float) -> tuple[int, ...]:
        """Decide transactions that were prepared longer ago than the shard's patience.

        An abort is recorded for them, unless somebody recorded a decision before.

        Parameters
        ----------
        now
            The present time by the shard's clock, in seconds; infinity settles everything.

        Returns
        -------
        tuple[int, ...]
            Revisions that were waited for and are decided now.
        """

    def consolidate(self) -> None:
        """Fold the journals into slots now."""

    def close(self, *, consolidate: bool = True) -> None:
        """Stop; fold the journals first if asked to. A second call has no effect."""

    def describe(self, refs: Sequence[BlockRef]) -> tuple[BlockStatus, ...]:
        """Return version, state, step and CRC of blocks; of many, not all as of one moment."""

    def read(self, refs: Sequence[BlockRef]) -> Iterator[BlockContent]:
        """Yield blocks with their optimizer state; withheld ones too, deleted ones not."""

    def history(self) -> tuple[PartitionHistory, ...]:
        """Return what each partition can be returned to."""

    def collect(
        self, partition: int, *, history_from: int = 0, dry_run: bool = False
    ) -> PartitionGarbage:
        """Remove what nothing retained of a partition needs; to be called until it is complete.

        What a transaction under way, a consolidation or a snapshot needs is kept. A call that is
        cut off does no harm.

        Parameters
        ----------
        partition
            The partition.
        history_from
            Give the ends of older revisions up, for good; 0 = as the settings say. For a dry run it
            may be the revision that the caller will make first, which begins every partition anew.
        dry_run
            True to find out what would be removed.

        Raises
        ------
        UnavailableError
            If history is to be given up while a transaction holds the partition
            (TRANSACTION_IN_PROGRESS), or another owner has taken it over (FENCED).
        """

    def stats(self) -> ShardStats:
        """Return counters and sizes."""
