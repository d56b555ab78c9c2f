"""What an operator may ask of a bank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO, Protocol, Self, runtime_checkable

from membank.wire.crc import Buffer
from membank.wire.format.pack import FinishedPack
from membank.wire.records import (
    Applied,
    AuditRecord,
    BankStats,
    BlockDescription,
    GarbageReport,
    Snapshot,
    StoredPack,
    Topic,
    TransactionReport,
)
from membank.wire.spec import BankSpec, BlockRef
from membank.wire.steps import Step


@dataclass(frozen=True, kw_only=True, slots=True)
class AdminRequest:
    """Who asks for a change, and under which id."""

    request_id: str
    """Unique id (UUID); a retry carries the same and gets the first answer."""
    principal: str
    """Name of the caller, as written to the audit log."""
    dry_run: bool = False
    """True only reports what would change."""
    check_wanted: Callable[[], None] = field(default=lambda: None, repr=False, compare=False)
    """Raises where nobody waits for the answer any more; asked when it is the request's turn."""


class ExportedPack:
    """A topic as a file; close it, or leave its context, when it was sent.

    Parameters
    ----------
    pack
        The pack.
    spool
        Where its content waits; closed together with this.
    revision
        Revision it was read at.
    """

    def __init__(self, pack: FinishedPack, spool: BinaryIO, *, revision: int) -> None:
        self._pack = pack
        self._spool = spool
        self.revision = revision
        """Revision it was read at."""
        self.num_bytes = pack.num_bytes
        """Its size."""
        self.crc32c = pack.crc32c()
        """CRC-32C of all of it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def data(self) -> bytes:
        """All of it (`membank.wire.format.pack`)."""
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """Yield it in pieces of the size of a message."""
        return self._pack.chunks()

    def close(self) -> None:
        """Give up what it takes up, in memory or on disk."""
        self._spool.close()


@runtime_checkable
class BankAdmin(Protocol):
    """Operations on one bank. Every change is one transaction across all shards.

    A change raises `ConflictError` where a version is not the expected one, and
    `UnavailableError` where a shard cannot take part; in both cases nothing was changed. The one
    exception is said in the message: a committed change whose shards have not all confirmed it
    yet; the same request id asks for its answer again.
    """

    @property
    def spec(self) -> BankSpec:
        """Spec of the bank."""

    def list_topics(
        self, parent: BlockRef | None = None, *, depth: int = 0
    ) -> tuple[tuple[Topic, ...], int]:
        """Return `parent` (None = all) and `depth` levels under it (0 = all), and the revision."""

    def describe_blocks(self, refs: Sequence[BlockRef]) -> tuple[BlockDescription, ...]:
        """Return blocks in full, in the order asked."""

    def apply(self, request: AdminRequest, steps: Sequence[Step]) -> Applied:
        """Apply steps as one transaction; returns once every owner has done its part.

        Where something is deleted, that is once nothing of it is left and its receipt is signed.

        Parameters
        ----------
        request
            Who asks.
        steps
            At least one. Each sees the bank as it was before; no block is changed by two of them.

        Raises
        ------
        NotFoundError
            If the bank has no such block or topic.
        ConflictError
            If a block has not the expected version (VERSION_MISMATCH).
        FailedPreconditionError
            If all of a topic is deleted, or content is asked of a block that is deleted
            (BLOCK_DELETED) or withheld (BLOCK_WITHHELD), or there is no tree to change (NO_TREE).
        InvalidArgumentError
            If there is no step, two are at odds, or content does not fit or is not finite.
        """

    def export_topic(
        self, topic: BlockRef, *, weights_only: bool = False, since: str | int | None = None
    ) -> ExportedPack:
        """Return a topic as a pack, or what of it differs from an earlier state.

        Parameters
        ----------
        topic
            The topic.
        weights_only
            True leaves the optimizer state out.
        since
            Name of a snapshot, or number of a revision, to whose end to compare; None = all of it.
        """

    def store_pack(
        self,
        topic: BlockRef,
        name: str,
        *,
        weights_only: bool = False,
        since: str | int | None = None,
    ) -> ExportedPack:
        """Keep a topic as a pack under `name` in the bank's own store; as `export_topic`.

        A repetition that comes to the same pack has no effect; any other pack of the name is
        `AlreadyExistsError` (PACK_EXISTS).
        """

    def list_packs(self) -> tuple[StoredPack, ...]:
        """Return the packs in the bank's own store, by name."""

    def delete_pack(self, request: AdminRequest, name: str) -> StoredPack:
        """Destroy a pack in the bank's own store; `NotFoundError` (UNKNOWN_PACK) without one."""

    def import_topic(
        self,
        request: AdminRequest,
        pack: Buffer,
        *,
        topic: BlockRef | None = None,
        force: bool = False,
    ) -> tuple[TransactionReport, BlockRef]:
        """Install a pack; returns the topic it was installed under.

        Parameters
        ----------
        request
            Who asks.
        pack
            The pack's bytes, not retained.
        topic
            Where to install it: a topic of the same level and shape; None = where it came from.
        force
            True installs a diff also where the bank does not hold what it was made against.
        """

    def import_stored(
        self,
        request: AdminRequest,
        name: str,
        *,
        topic: BlockRef | None = None,
        force: bool = False,
    ) -> tuple[TransactionReport, BlockRef]:
        """Install a pack of the bank's own store; as `import_topic`."""

    def create_snapshot(self, request: AdminRequest, name: str) -> Snapshot:
        """Pin the present state under `name`."""

    def list_snapshots(self) -> tuple[Snapshot, ...]:
        """Return the snapshots, oldest first."""

    def delete_snapshot(self, request: AdminRequest, name: str) -> tuple[Snapshot, int]:
        """Give a snapshot up; returns it, and the revision after it."""

    def rollback(
        self,
        request: AdminRequest,
        target: str | int,
        topic: BlockRef | None = None,
        *,
        only_block: bool = False,
    ) -> TransactionReport:
        """Bring the bank, a topic or a block back; deleted blocks stay deleted.

        Parameters
        ----------
        request
            Who asks.
        target
            Name of a snapshot, or number of a revision to whose end to return.
        topic
            Only this topic; None = the whole bank.
        only_block
            True leaves what lies under the topic as it is.
        """

    def collect_garbage(
        self, request: AdminRequest, *, keep_revisions: int | None = None
    ) -> GarbageReport:
        """Remove what nothing retained needs.

        No transaction, unless it gives history up: that is put on record before it happens.

        Parameters
        ----------
        request
            Who asks.
        keep_revisions
            Newest revisions whose history is kept, at least 1, whatever the settings say; older
            history goes for good, but for snapshots. None = as the settings say.
        """

    def receipt(self, revision: int) -> bytes:
        """Return the signed receipt of what `revision` deleted.

        `NotFoundError` (UNKNOWN_RECEIPT) if it deleted nothing.
        """

    def stats(self) -> BankStats:
        """Return counters and sizes."""

    def audit(self, limit: int, *, retained_only: bool = False) -> tuple[AuditRecord, ...]:
        """Return the newest `limit` audit records, newest first.

        With `retained_only`, those of revisions that the whole bank can be rolled back to.
        """


@runtime_checkable
class BankHost(Protocol):
    """A service that has a bank, or waits for one to be created."""

    def create_bank(self, request: AdminRequest, spec: BankSpec, tree: bytes) -> BankSpec:
        """Create the bank with a tree document (b"" = none); return its spec with `bank_id`.

        `AlreadyExistsError` (BANK_EXISTS) if there is one, unless this request made it.
        """

    def operations(self) -> BankAdmin:
        """Return the operations of the bank; `NotFoundError` (UNKNOWN_BANK) while there is none."""
