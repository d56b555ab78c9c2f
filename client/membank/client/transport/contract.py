"""The seam to a service: one endpoint's RPCs in domain types.

A `Transport` is a connection to one endpoint. The gateway answers all of it, a shard the data path.
Every method but `watch` takes the seconds it may last, makes one attempt, and raises the leaves of
`membank.wire.errors`: `UnavailableError` where another attempt may help, `DeadlineError` where the
time ran out. Retries, placement and revisions are the caller's; a faster path to the same endpoint,
or a faulty one for a test, is a transport around a transport.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol, runtime_checkable

from membank.wire.records import (
    Applied,
    AuditRecord,
    BankInfo,
    BankStats,
    Block,
    BlockDescription,
    BlockEvent,
    GarbageReport,
    Snapshot,
    StoredPack,
    Topic,
    TransactionReport,
    Update,
    UpdateResult,
)
from membank.wire.spec import Array, BankSpec, BlockRef
from membank.wire.steps import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchAnswer:
    """Blocks of one revision."""

    revision: int
    """The revision."""
    blocks: tuple[Block, ...]
    """In the order of the request; a weight of None where no content travelled."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PushAnswer:
    """What became of an update."""

    results: tuple[UpdateResult, ...]
    """In the order of the gradients."""
    duplicate: bool
    """True where a shard had applied this request before: an earlier attempt did arrive."""

    @property
    def versions(self) -> dict[BlockRef, int]:
        """Version of each block after the update, or the present one where it was refused."""
        return {result.ref: result.version for result in self.results}

    @property
    def refused(self) -> tuple[UpdateResult, ...]:
        """The gradients that were not applied, with the reason of each."""
        return tuple(result for result in self.results if not result.accepted)


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchAnswer:
    """Changes in the order in which they took effect."""

    events: tuple[BlockEvent, ...]
    """The changes; empty in the first answer, which says that the watch is on."""
    num_dropped: int = 0
    """Changes that were left out because the watcher was too slow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackInfo:
    """What is known of an exported pack."""

    num_bytes: int
    """Its size in bytes."""
    crc32c: int
    """CRC-32C of the whole pack, verified where it was sent."""
    revision: int
    """Revision it was read at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportAnswer:
    """What an import did, or would do."""

    report: TransactionReport
    """The transaction."""
    topic: BlockRef
    """The topic that the pack was installed under."""


class LayerListener(Protocol):
    """Hears of the layers of blocks as they come; from any thread, from one at a time."""

    def restart(self) -> None:
        """Hear that an answer begins: what came of an earlier attempt is void.

        Raises
        ------
        UnavailableError
            If somebody has used that already.
        """

    def take(self, revision: int, block: Block, num_layers: int) -> None:
        """Hear that the first layers of a block are there and checked.

        Parameters
        ----------
        revision
            Revision of the answer.
        block
            The block. Its weight is the same array each time, whose other layers may still change;
            None where no content travels.
        num_layers
            How many are there.
        """


class BlockTransport(Protocol):
    """The data path of one endpoint."""

    async def get_bank(self, *, timeout_s: float) -> BankInfo:
        """Return spec, revision and placement."""

    async def get_tree(self, *, timeout_s: float) -> bytes:
        """Return the tree document."""

    async def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held_versions: Sequence[int | None] | None = None,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
        into: Mapping[BlockRef, Array] | None = None,
        timeout_s: float,
    ) -> FetchAnswer:
        """Return blocks of one revision, at least `min_revision`; a held one without content.

        With `snapshot`, as that pins them: the answer has its revision, and `min_revision` says up
        to where withholding and deletion must be taken account of. `into` has writable C-contiguous
        memory of the right size for blocks: content that has to be copied anyway lands there, also
        where the call then fails.
        """

    async def fetch_layers(
        self,
        refs: Sequence[BlockRef],
        listener: LayerListener,
        *,
        layers_per_part: int,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
        into: Mapping[BlockRef, Array] | None = None,
        timeout_s: float,
    ) -> None:
        """Fetch blocks layer by layer, and tell `listener` of each few as soon as they can be used.

        Where nothing travels, or the service cannot cut blocks, it may hear of all at once.
        Arguments are those of `fetch`; what `listener` raises ends the call.
        """

    async def push(self, update: Update, *, timeout_s: float) -> PushAnswer:
        """Apply gradients."""

    def watch(self, refs: Sequence[BlockRef], *, admin_only: bool) -> AsyncGenerator[WatchAnswer]:
        """Yield changes of `refs` (empty = all of this endpoint) until it is closed.

        The first answer has no events and comes as soon as no later change can be missed.
        """


class AdminTransport(Protocol):
    """The operations on what a bank knows, at the gateway."""

    async def create_bank(
        self, spec: BankSpec, tree: bytes, *, request_id: str, timeout_s: float
    ) -> BankSpec:
        """Create the bank and return its spec with the bank_id."""

    async def list_topics(
        self, parent: BlockRef | None, *, depth: int, timeout_s: float
    ) -> tuple[Topic, ...]:
        """Return topics by level and cluster."""

    async def describe(
        self, refs: Sequence[BlockRef], *, timeout_s: float
    ) -> tuple[BlockDescription, ...]:
        """Return blocks in full, in the order of the request."""

    async def apply(
        self, steps: Sequence[Step], *, request_id: str, dry_run: bool, timeout_s: float
    ) -> Applied:
        """Apply steps as one transaction."""

    async def export(
        self,
        topic: BlockRef,
        target: BinaryIO,
        *,
        weights_only: bool,
        since: str | int | None = None,
        timeout_s: float,
    ) -> PackInfo:
        """Write a topic's pack to `target`; on an error it holds a part of it.

        With `since`, only what differs from a snapshot, or from the end of a revision.
        """

    async def store_pack(
        self,
        topic: BlockRef,
        name: str,
        *,
        weights_only: bool,
        since: str | int | None,
        timeout_s: float,
    ) -> PackInfo:
        """Keep a topic's pack in the bank's own store."""

    async def list_packs(self, *, timeout_s: float) -> tuple[StoredPack, ...]:
        """Return the packs in the bank's own store, by name."""

    async def delete_pack(self, name: str, *, request_id: str, timeout_s: float) -> StoredPack:
        """Destroy a pack in the bank's own store, and return it."""

    async def import_pack(
        self,
        pack: BinaryIO | str,
        *,
        topic: BlockRef | None = None,
        force: bool = False,
        request_id: str,
        dry_run: bool,
        timeout_s: float,
    ) -> ImportAnswer:
        """Install a pack: from its present position (seekable), or the one that is stored by a name.

        `topic` says where to (None = where it came from); `force` installs a diff whatever there is.
        """

    async def create_snapshot(self, name: str, *, request_id: str, timeout_s: float) -> Snapshot:
        """Pin the present state."""

    async def list_snapshots(self, *, timeout_s: float) -> tuple[Snapshot, ...]:
        """Return the snapshots, oldest first."""

    async def delete_snapshot(
        self, name: str, *, request_id: str, timeout_s: float
    ) -> tuple[Snapshot, int]:
        """Give a snapshot up; return it, and the revision after it."""

    async def rollback(
        self,
        target: str | int,
        topic: BlockRef | None,
        *,
        only_block: bool,
        request_id: str,
        dry_run: bool,
        timeout_s: float,
    ) -> TransactionReport:
        """Bring the bank, a topic or a block back to a snapshot or to the end of a revision."""

    async def collect_garbage(
        self, *, keep_revisions: int | None, dry_run: bool, request_id: str, timeout_s: float
    ) -> GarbageReport:
        """Remove what nothing retained needs."""

    async def get_stats(self, *, timeout_s: float) -> BankStats:
        """Return counters and sizes."""

    async def get_receipt(self, revision: int, *, timeout_s: float) -> bytes:
        """Return the signed receipt of what a revision deleted."""

    async def list_audit_records(
        self, *, limit: int, retained_only: bool, timeout_s: float
    ) -> tuple[AuditRecord, ...]:
        """Return who did what, newest first; on request, only what can be rolled back to."""


@runtime_checkable
class Transport(BlockTransport, AdminTransport, Protocol):
    """A connection to one endpoint."""

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Close it; calls that still run have `grace_s` seconds to end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SameHostDoor:
    """Where a shard lets callers of its own machine in to shared memory."""

    boot_id: str
    """Identity of the kernel that the shard runs on."""
    socket_name: str
    """Unix socket, in the kernel's abstract namespace."""
    ticket: bytes
    """To be shown there, once, within seconds; stands for the caller."""


Connector = Callable[[str], Transport]
"""Connects to an endpoint, host:port; must not block and makes no call."""
