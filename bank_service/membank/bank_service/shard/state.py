"""What the parts of one partition share: its data and its locks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Condition, RLock

from membank.bank_service.shard.content import BlockRecord
from membank.bank_service.shard.context import ShardContext
from membank.bank_service.shard.lease import Lease
from membank.bank_service.shard.partition_store import PartitionStore
from membank.bank_service.shard.request_log import RequestLog
from membank.bank_service.shard.table import BlockTable
from membank.bank_service.store.journal import Journal
from membank.wire.errors import MembankError, Reason, UnavailableError
from membank.wire.format import Manifest
from membank.wire.spec import BlockRef


@dataclass(frozen=True, slots=True)
class Hold:
    """A partition's share of a transaction; it holds updates back until the decision."""

    revision: int
    """Revision that the transaction would create."""
    since: float
    """When it began, by the shard's clock."""
    manifest: Manifest | None = None
    """The prepared manifest; None while it is being prepared."""
    records: Mapping[BlockRef, BlockRecord] = field(default_factory=dict)
    """The blocks that the transaction changes, as they will be."""


class PartitionState:
    """The data of one partition and the locks that guard it.

    Parameters
    ----------
    context
        What all partitions of the shard share.
    number
        The partition.
    store
        Its slots and manifests.
    journal
        Its journal.
    manifest
        Its newest manifest.
    revision
        Newest committed revision of the bank.
    lease_s
        Seconds that its owner may answer without asking the storage (see `Lease`).
    """

    # Lock order: `folding`, `writer` (of several partitions: by ascending number), then
    # `context.state_lock`.
    # `folding` is held by whoever publishes a manifest or removes one: a consolidation, a step of
    # a transaction, garbage collection. It guards the store, and may be held for seconds.
    # `writer` is held by whoever pushes. It guards the journal's end and `requests`, and is never
    # held while slots or manifests are written.
    # `context.state_lock` guards `table`, `manifest`, `num_unfolded` and `revision`, which readers look at.
    # `held` is changed with both `folding` and `writer`, so either is enough to read it.

    def __init__(
        self,
        context: ShardContext,
        number: int,
        store: PartitionStore,
        journal: Journal,
        manifest: Manifest,
        revision: int,
        lease_s: float,
    ) -> None:
        self.context = context
        self.number = number
        self.store = store
        self.journal = journal
        self.table = BlockTable(manifest.entries)
        self.manifest = manifest
        self.revision = revision
        self.lease = Lease(lease_s, self._ask, context.clock)
        self.requests = RequestLog(context.config.retained_requests, manifest.requests)
        self.num_unfolded = 0
        """Updates of blocks that the journal holds and the manifest does not contain."""
        self.folding = RLock()
        self.writer = RLock()
        self.changed = Condition(self.writer)
        """Notified when the hold ends and when a consolidation has ended."""
        self.held: Hold | None = None
        self.fenced: UnavailableError | None = None
        """Why nothing is acknowledged any more: there is another owner."""
        self.fold_error: MembankError | None = None
        """Why the last consolidation failed; None = it did not."""

    def record(self, ref: BlockRef) -> BlockRecord:
        """Return what is known of `ref`."""
        with self.context.state_lock:
            return self.table.record(ref)

    def set_record(self, ref: BlockRef, record: BlockRecord) -> None:
        """Make `record` what is known of `ref`; for the holder of the state lock."""
        self.context.residency.put(self.table, ref, record)

    def in_transaction(self) -> UnavailableError:
        """Return the error for a caller that a transaction keeps out."""
        return UnavailableError(
            f"a transaction holds partition {self.number} back; retry",
            reason=Reason.TRANSACTION_IN_PROGRESS,
            metadata={"partition": str(self.number)},
        )

    def _ask(self) -> None:
        try:
            self.store.manifests.require_sole_owner(self.manifest.owner)
        except UnavailableError as err:
            if err.reason is Reason.FENCED:
                self.fenced = err
            raise
