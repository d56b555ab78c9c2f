"""Transactions across shards: all of them take part, or nothing happened.

The life of a transaction: every shard concerned prepares; the record of the next revision is
created, which is the commit; every shard installs it. Whoever dies, and when:

==========================================  ====================================================
at that moment                              what holds afterwards
==========================================  ====================================================
a shard, before the record                  nothing happened: the others are told to give up
the coordinator, before the record          nothing happened: `recover` tells the shards to give
                                            up, who put that on record, so that nobody can commit
                                            it any more
the store, while the record is created      whatever the store says when it answers again
a shard, after the record                   done: it reads the record when it starts again
the coordinator, after the record           done: `recover` tells the shards
==========================================  ====================================================
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from membank.bank_service.knowledge.contract import AdminRequest
from membank.bank_service.knowledge.receipts import ReceiptDesk, held_up, read_receipt
from membank.bank_service.knowledge.reports import (
    change_row,
    report_of,
    report_on,
    tree_change_row,
)
from membank.bank_service.knowledge.requests import check_same, request_sha256
from membank.bank_service.knowledge.revisions import RevisionDraft, RevisionLog
from membank.bank_service.knowledge.shards import (
    ShardGroup,
    ShardMember,
    raise_first,
    unreachable,
)
from membank.bank_service.knowledge.stored_packs import StoredPacks
from membank.bank_service.knowledge.trees import TreeStore
from membank.bank_service.shard.contract import BlockOperation, Erase, Prepared
from membank.bank_service.store import Bank
from membank.wire.errors import (
    InvalidArgumentError,
    MembankError,
    Reason,
    UnavailableError,
)
from membank.wire.format import RevisionRecord, TreeDocument
from membank.wire.format.receipt import DELETION
from membank.wire.format.revision import REQUEST_SHA256
from membank.wire.records import TransactionReport, TreeChange
from membank.wire.spec import BlockState

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CoordinatorConfig:
    """Patience of the coordinator."""

    lock_wait_s: float = 30.0
    """Longest wait for the transaction before."""
    commit_patience_s: float = 60.0
    """Longest wait for shards to confirm a committed revision."""
    commit_pause_s: float = 0.1
    """Pause between two attempts to reach a shard."""

    def __post_init__(self) -> None:
        for name in ("lock_wait_s", "commit_patience_s", "commit_pause_s"):
            value = getattr(self, name)
            if not value >= 0:
                raise InvalidArgumentError(f"{name} is {value}; accepted: >= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a transaction is to do; made under the lock, from the state that it will change."""

    operations: Sequence[BlockOperation] = ()
    """The steps, at most one per block."""
    detail: Mapping[str, object] = field(default_factory=dict)
    """What it is applied to; JSON-able, no content, no labels."""
    tree: TreeDocument | None = None
    """The tree document that comes into force with it; None = unchanged."""
    tree_changes: tuple[TreeChange, ...] = ()
    """What that changes, for the report."""
    all_partitions: bool = False
    """True where partitions without an operation prepare too, so that all journals are folded."""
    before_commit: Callable[[int], None] | None = None
    """Called with the revision once all have prepared; an error gives the plan up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a transaction."""

    report: TransactionReport
    """What it did."""
    record: RevisionRecord | None
    """Its record; None for a dry run."""
    receipt: bytes = b""
    """Signed receipt of what it deleted; empty where it deleted nothing."""


class Coordinator:
    """Runs the transactions of one bank, one at a time.

    Lock order: `_lock` is taken first and held for a whole transaction; shards and the revision
    log have locks of their own below it.

    Parameters
    ----------
    bank
        The bank.
    shards
        All shards.
    log
        The bank's records.
    trees
        The bank's tree documents.
    receipts
        Makes the receipts of deletions; None = there are none.
    config
        Patience.
    sleep
        Waits for some seconds.
    clock
        Monotonic seconds.
    """

    def __init__(
        self,
        bank: Bank,
        shards: ShardGroup,
        *,
        log: RevisionLog,
        trees: TreeStore,
        receipts: ReceiptDesk | None = None,
        config: CoordinatorConfig | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bank = bank
        self._shards = shards
        self._log = log
        self._trees = trees
        self._packs = StoredPacks(bank)
        self._receipts = receipts
        self._config = config or CoordinatorConfig()
        self._sleep = sleep
        self._clock = clock
        self._lock = threading.Lock()
        # True while shards may hold something prepared, or lag, that nobody has settled.
        self._unsettled = True
        self._held_up = ""

    @property
    def held_up(self) -> str:
        """What keeps every transaction waiting, and what to do about it; empty = nothing known."""
        return self._held_up

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep transactions out, for a read that must not straddle one.

        Raises
        ------
        UnavailableError
            If another transaction holds the bank for longer than the configured wait.
        """
        if not self._lock.acquire(timeout=self._config.lock_wait_s):
            raise UnavailableError(
                "another transaction is under way; retry when it is done",
                reason=Reason.TRANSACTION_IN_PROGRESS,
            )
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Keep transactions out while none is undecided, and what is committed is in force.

        Raises
        ------
        UnavailableError
            If another transaction holds the bank, or a shard cannot be told.
        """
        with self.exclusive():
            self._settle_first()
            yield

    def run(
        self,
        request: AdminRequest,
        operation: str,
        asked: Mapping[str, object],
        make_plan: Callable[[], Plan],
    ) -> Outcome:
        """Run one transaction, or return what it did before.

        Parameters
        ----------
        request
            Who asks, and under which id.
        operation
            Name in the audit log, such as "delete".
        asked
            What is asked, with every option, by which a retry is known; JSON-able.
        make_plan
            Called under the lock, unless the request is a retry.

        Returns
        -------
        Outcome
            What was done, or would be.

        Raises
        ------
        ConflictError
            If a block has not the expected version, or the request id is somebody else's
            (REQUEST_ID_REUSED); nothing was changed.
        InvalidArgumentError
            If the request id was used for something else (REQUEST_ID_REUSED).
        UnavailableError
            If a shard or the store cannot take part; nothing was changed, unless the message says
            that the revision is committed.
        DeadlineError
            If nobody waits for it any more, now that it is its turn; nothing was changed.
        """
        digest = request_sha256(request.request_id, operation, asked)
        with self.exclusive():
            done = None if request.dry_run else self._log.find(request.request_id)
            if done is not None:
                check_same(done, request, operation, digest)
                self._settle_first(own=done)
                return self._outcome(report_of(done), done)
            self._settle_first()
            # Whoever is gone may have been told, or have concluded, that nothing was done: a change
            # that waited for its turn must not come after that.
            request.check_wanted()
            plan = make_plan()
            if request.dry_run:
                return self._dry_run(plan)
            return self._run(request, operation, digest, plan)

    def recover(self) -> None:
        """Settle what an earlier coordinator left: wholly done, or wholly undone."""
        with self.exclusive():
            self._unsettled = True
            self._settle()

    # ---- one transaction

    def _dry_run(self, plan: Plan) -> Outcome:
        revision = self._log.last + 1
        prepared = raise_first(self._prepare(revision, plan, dry_run=True))
        report = self._report(self._log.committed.revision, prepared, plan, dry_run=True)
        return Outcome(report=report, record=None)

    def _run(self, request: AdminRequest, operation: str, digest: str, plan: Plan) -> Outcome:
        revision = self._log.last + 1
        if self._receipts is not None and any(isinstance(o, Erase) for o in plan.operations):
            self._receipts.check_storage()
        self._unsettled = True
        results = self._prepare(revision, plan)
        try:
            prepared = raise_first(results)
            if plan.tree is not None:
                self._trees.write(revision, plan.tree)
            if plan.before_commit is not None:
                plan.before_commit(revision)
            if self._receipts is not None:
                self._receipts.introduce(prepared)
            report = self._report(revision, prepared, plan)
            draft = self._draft(request, operation, digest, plan, prepared, report)
            record = self._log.append(draft)
        except Exception:
            problem = self._give_up(revision)
            done = self._log.find(request.request_id)
            if done is None:
                raise
            # The store created the record, though it did not say so.
            if problem is not None:
                # It is not in force everywhere, or what it destroys is still there.
                with self._worded(own=done):
                    raise problem from None
            return self._outcome(report_of(done), done)
        with self._worded(own=record):
            self._install(record)
        return self._outcome(report, record)

    def _outcome(self, report: TransactionReport, record: RevisionRecord) -> Outcome:
        if self._receipts is not None and DELETION in record.detail:
            receipt = read_receipt(self._bank, record.revision)
            return Outcome(report=report, record=record, receipt=receipt)
        return Outcome(report=report, record=record)

    def _prepare(
        self, revision: int, plan: Plan, *, dry_run: bool = False
    ) -> list[Prepared | Exception]:
        refs = [operation.ref for operation in plan.operations]
        if len(set(refs)) != len(refs):
            raise InvalidArgumentError("a transaction names a block twice")
        owners = self._shards.by_owner(refs)
        operations = {operation.ref: operation for operation in plan.operations}
        members = [
            member
            for member in self._shards.members()
            if member.shard_id in owners or plan.all_partitions
        ]

        def prepare(member: ShardMember) -> Prepared:
            mine = [operations[ref] for ref in owners.get(member.shard_id, ())]
            return member.handle.prepare(
                revision, mine, all_partitions=plan.all_partitions, dry_run=dry_run
            )

        return self._shards.call(members, prepare)

    def _draft(
        self,
        request: AdminRequest,
        operation: str,
        digest: str,
        plan: Plan,
        prepared: Sequence[Prepared],
        report: TransactionReport,
    ) -> RevisionDraft:
        changes_tree = plan.tree is not None
        destroyed = (
            {}
            if self._receipts is None
            else self._receipts.detail_of(
                prepared,
                packs=report.packs,
                changes_tree=changes_tree,
            )
        )
        return RevisionDraft(
            operation=operation,
            principal=request.principal,
            request_id=request.request_id,
            manifests={p: n for part in prepared for p, n in part.manifests.items()},
            changes_tree=changes_tree,
            removes=any(change.state_after is not BlockState.ACTIVE for change in report.changes),
            detail={
                **plan.detail,
                **destroyed,
                "changes": [change_row(change) for change in report.changes],
                **(
                    {"tree_changes": [tree_change_row(change) for change in report.tree_changes]}
                    if report.tree_changes
                    else {}
                ),
                **({"packs": list(report.packs)} if report.packs else {}),
                "num_slots_destroyed": report.num_slots_destroyed,
                REQUEST_SHA256: digest,
            },
        )

    def _report(
        self, revision: int, prepared: Sequence[Prepared], plan: Plan, *, dry_run: bool = False
    ) -> TransactionReport:
        # Only what is older than the transaction goes.
        goes_with = partial(self._packs.holding, revision=self._log.last + 1)
        return report_on(
            revision, prepared, plan.tree_changes, packs_holding=goes_with, dry_run=dry_run
        )

    def _give_up(self, revision: int) -> MembankError | None:
        """Settle what failed; return what kept that from being done."""
        try:
            self._settle()
        except MembankError as err:
            # Tried again before anything else. Where nothing was committed, the caller hears of the
            # first failure.
            _LOG.warning("revision %d is not settled yet: %s", revision, err)
            return err
        return None

    # ---- bringing shards and store to what the records say

    def _settle_first(self, own: RevisionRecord | None = None) -> None:
        """Settle what is under way, before a request whose record is `own`, if it has one yet."""
        with self._worded(own):
            self._settle()

    @contextmanager
    def _worded(self, own: RevisionRecord | None) -> Iterator[None]:
        """Have an error of settling say what waits for it, and what to do.

        The caller's own request may have nothing to do with what is under way, or with the shard.
        """
        try:
            yield
        except UnavailableError as err:
            worded = held_up(err, own, self._owed())
            self._held_up = worded.message
            raise worded from err
        self._held_up = ""

    def _owed(self) -> RevisionRecord | None:
        try:
            return None if self._receipts is None else self._receipts.owed()
        except MembankError:
            return None  # the caller has an error to tell already

    def _settle(self) -> None:
        """Make every shard and the trees agree with the records, after any failure."""
        if not self._unsettled:
            return
        self._log.reload()
        revision = self._log.last + 1
        raise_first(self._shards.call(self._shards.members(), lambda m: m.handle.abort(revision)))
        # A shard that had prepared something has put the abort on record, unless the commit came
        # first after all: by an earlier coordinator, or by a put of ours whose answer was lost.
        self._log.reload()
        self._install(self._log.committed)

    def _install(self, record: RevisionRecord) -> None:
        """Tell every shard of `record`, waiting for those that are down; then what it ended goes."""
        self._unsettled = True
        self._confirm(record)
        self._trees.destroy_others(record.tree_revision)
        self._packs.destroy_ended(record)
        self._bank.remove_ended_snapshot(record)
        if self._receipts is not None and (owed := self._receipts.owed()) is not None:
            self._receipts.issue(owed, self._confirm)
        self._unsettled = False

    def _confirm(self, record: RevisionRecord) -> None:
        deadline = self._clock() + self._config.commit_patience_s
        while lagging := self._tell(record):
            if self._clock() >= deadline:
                raise unreachable(lagging, record.revision)
            self._sleep(self._config.commit_pause_s)

    def _tell(self, record: RevisionRecord) -> list[str]:
        members = self._shards.members()

        def tell(member: ShardMember) -> None:
            installed = member.handle.revision
            for missed in self._log.committed_after(installed):
                if missed.revision < record.revision:
                    member.handle.commit(missed)
            # Also where it is installed: what was deleted may not be destroyed yet.
            member.handle.commit(record)

        lagging = []
        for member, result in zip(members, self._shards.call(members, tell), strict=True):
            if isinstance(result, UnavailableError):
                lagging.append(member.shard_id)
            elif isinstance(result, Exception):
                raise result
        return lagging
