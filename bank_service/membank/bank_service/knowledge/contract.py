"""What an operator may ask of a bank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from membank.wire.records import (
    Applied,
    AuditRecord,
    BankStats,
    BlockDescription,
    GarbageReport,
    Snapshot,
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedPack:
    """A topic as a file."""

    data: bytes
    """The pack (`membank.wire.format.pack`)."""
    revision: int
    """Revision it was read at."""


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

    def export_topic(self, topic: BlockRef, *, weights_only: bool = False) -> ExportedPack:
        """Return a topic as a pack."""

    def import_topic(
        self, request: AdminRequest, pack: bytes
    ) -> tuple[TransactionReport, BlockRef]:
        """Install a pack; returns the topic it was installed under."""

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
