"""One partition: its blocks, and how updates reach them.

Every change takes the same way: compute, write to the journal, install, acknowledge. A change that
cannot be journalled is not installed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from threading import Condition, RLock

from membank.bank_service.shard.content import (
    INITIAL_ENTRY,
    BlockRecord,
    Content,
)
from membank.bank_service.shard.context import ShardContext
from membank.bank_service.shard.contract import PartitionGarbage, PartitionHistory
from membank.bank_service.shard.garbage import MAX_REMOVED, summed
from membank.bank_service.shard.optimizer import kernel_fingerprint
from membank.bank_service.shard.partition_store import PartitionStore
from membank.bank_service.shard.request_log import RequestLog
from membank.bank_service.shard.residency import Records
from membank.bank_service.shard.update_frame import (
    AppliedGradient,
    UpdateFrame,
    encode_update,
)
from membank.bank_service.store.journal import FrameKind, Journal
from membank.wire.errors import (
    CorruptionError,
    FailedPreconditionError,
    MembankError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.format import Entry, Manifest
from membank.wire.records import BlockEvent, Gradient, Update, UpdateResult
from membank.wire.spec import Array, BlockRef, BlockState

_LOG = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class _Staged:
    """An accepted gradient and what it makes of its block."""

    result: UpdateResult
    entry: Entry
    content: Content
    applied: AppliedGradient


class Partition:
    """One partition of a shard.

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
    """

    # Lock order: `_writer` (several of them: by ascending partition), then `context.state_lock`.
    # `_writer` is held by whoever changes the partition, during input and output; `state_lock`
    # guards `records`, `manifest` and `revision`, which readers look at. `_held`, `_requests`, the
    # journal and the store belong to the holder of `_writer`.

    def __init__(
        self,
        context: ShardContext,
        number: int,
        store: PartitionStore,
        journal: Journal,
        manifest: Manifest,
        revision: int,
    ) -> None:
        self.number = number
        self.store = store
        self.journal = journal
        self.records: Records = {r: BlockRecord(e) for r, e in manifest.entries.items()}
        self.manifest = manifest
        self.revision = revision
        self._context = context
        self._spec = context.bank.spec
        self._rule = context.rule
        self._kernel = kernel_fingerprint()
        self._writer = RLock()
        self._released = Condition(self._writer)
        self._held: Hold | None = None
        self._requests = RequestLog(context.config.retained_requests, manifest.requests)
        self._consolidate_at = context.config.consolidate_bytes
        self._fenced: UnavailableError | None = None
        # A removal may have been cut short before this owner started.
        self._removal_pending = True

    # ---- reading (state lock held by the caller)

    def record(self, ref: BlockRef) -> BlockRecord:
        """Return what is known of `ref`."""
        return self.records.get(ref, _INITIAL_RECORD)

    @property
    def held(self) -> Hold | None:
        """The transaction that holds updates back, if any."""
        return self._held

    def keep(self, ref: BlockRef, record: BlockRecord, content: Content) -> None:
        """Keep a loaded content in memory, if `record` still is what is known of `ref`."""
        with self._context.state_lock:
            if self.record(ref) is record:
                self._context.residency.put(self.records, ref, replace(record, content=content))

    # ---- updates

    def push(
        self, update: Update, gradients: Sequence[Gradient]
    ) -> tuple[tuple[UpdateResult, ...], bool]:
        """Apply those gradients of `update` that belong here; also say whether it is a repeat.

        Notes
        -----
        All of them take effect, as far as they are accepted, or none. The results say which were.
        """
        with self._writer:
            self._wait_until_free()
            refs = [gradient.ref for gradient in gradients]
            if (known := self._requests.answer(update.request_id, refs)) is not None:
                return known, True
            self.journal.require_usable()
            staged = [self._stage(update, gradient) for gradient in gradients]
            results = tuple(item.result if isinstance(item, _Staged) else item for item in staged)
            accepted = [item for item in staged if isinstance(item, _Staged)]
            if accepted:
                applied = [item.applied for item in accepted]
                payload = encode_update(update, results, applied, self._kernel)
                self.journal.append(FrameKind.UPDATE, [payload])
                self._install(update.request_id, results, accepted)
                self._maybe_consolidate()
            return results, False

    def apply_frame(self, frame: UpdateFrame) -> None:
        """Apply a journalled update again, at recovery.

        Raises
        ------
        CorruptionError
            If the result differs from what was journalled (REPLAY_MISMATCH).
        """
        staged = []
        for applied in frame.gradients:
            record = self.record(applied.ref)
            found = self._apply(applied.ref, record, applied.values, frame.learning_rate_scale)
            if found is None or (found[0].version, found[0].crcs) != (
                applied.version,
                applied.crcs,
            ):
                raise self._replay_mismatch(frame, applied)
            result = UpdateResult(ref=applied.ref, accepted=True, version=applied.version)
            staged.append(_Staged(result, *found, applied))
        self._install(frame.request_id, frame.results, staged, tell=False)

    def _stage(self, update: Update, gradient: Gradient) -> _Staged | UpdateResult:
        ref = gradient.ref
        record = self.record(ref)
        if (reason := self._rule.refusal(record.entry, gradient.base_version)) is not None:
            return _refused(ref, record.entry, reason)
        found = self._apply(ref, record, gradient.values, update.learning_rate_scale)
        if found is None:
            return _refused(ref, record.entry, Reason.NOT_FINITE)
        entry, content = found
        applied = AppliedGradient(ref, entry.version, entry.crcs, gradient.values)
        result = UpdateResult(ref=ref, accepted=True, version=entry.version)
        return _Staged(result, entry, content, applied)

    def _apply(
        self, ref: BlockRef, record: BlockRecord, values: Array, scale: float
    ) -> tuple[Entry, Content] | None:
        content = self.store.load_content(ref, record, self._spec.roles)
        return self._rule.apply(ref, record.entry, content, values, scale)

    def _install(
        self,
        request_id: str,
        results: tuple[UpdateResult, ...],
        staged: Sequence[_Staged],
        *,
        tell: bool = True,
    ) -> None:
        with self._context.state_lock:
            for item in staged:
                record = BlockRecord(item.entry, item.content)
                self._context.residency.put(self.records, item.applied.ref, record)
        self._requests.add(request_id, results)
        if tell:
            self._context.hub.publish(
                [
                    BlockEvent(
                        ref=item.applied.ref,
                        version=item.entry.version,
                        state=item.entry.state,
                        revision=self.revision,
                        is_update=True,
                    )
                    for item in staged
                ]
            )

    # ---- consolidation

    def consolidate(self) -> bool:
        """Fold the journal into slots; False where a transaction holds the partition."""
        with self._writer:
            if self._held is not None:
                return False
            self.fold()
            return True

    def fold(self) -> None:
        """Write dirty blocks to slots, publish a manifest that names them, trim the journal.

        For the holder of the partition; others call `consolidate`.
        """
        dirty = {ref: record for ref, record in self._all_records().items() if record.is_dirty}
        if not dirty and self.journal.last_lsn <= self.manifest.lsn:
            return
        with self.fresh_slots(dirty) as slotted:
            entries = {ref: record.entry for ref, record in slotted.items()}
            published = self.publish({**self.entries(), **entries})
        with self._context.state_lock:
            self.manifest = published
            for ref, record in slotted.items():
                self._context.residency.put(self.records, ref, record)
        self.tidy()

    @contextmanager
    def fresh_slots(
        self, records: Mapping[BlockRef, BlockRecord]
    ) -> Iterator[dict[BlockRef, BlockRecord]]:
        """Write contents to fresh slots; yield the records that name them, to be published."""
        slotted: dict[BlockRef, BlockRecord] = {}
        try:
            for ref, record in records.items():
                assert record.content is not None
                slot = self.store.write_block(ref, record.content, record.entry.crcs)
                slotted[ref] = replace(record, entry=replace(record.entry, slot=slot))
            self.store.sync((ref.level, r.entry.slot) for ref, r in slotted.items())
            yield slotted
        except (ResourceExhaustedError, FailedPreconditionError):
            # Surely not published, and the space may be needed. After any other error the
            # manifest may exist in spite of it, so its slots must stay.
            self.store.release((ref.level, r.entry.slot) for ref, r in slotted.items())
            raise

    def entries(self) -> dict[BlockRef, Entry]:
        """Return the entry of every block that was ever changed."""
        return {
            ref: record.entry for ref, record in self._all_records().items() if record.entry.version
        }

    def _all_records(self) -> Records:
        # A copy: readers add what they loaded at any time.
        with self._context.state_lock:
            return dict(self.records)

    def publish(
        self, entries: Mapping[BlockRef, Entry], *, prepared_for: int | None = None
    ) -> Manifest:
        """Publish and return the next manifest.

        Raises
        ------
        UnavailableError
            If another owner took the partition over (FENCED); this one accepts nothing from then
            on.
        """
        draft = replace(
            self.manifest,
            revision=self.revision if prepared_for is None else prepared_for,
            lsn=max(self.journal.last_lsn, self.manifest.lsn),
            entries=entries,
            prepared=prepared_for is not None,
            requests=self._requests.export(),
        )
        return self._publish(draft)

    def _publish(self, draft: Manifest) -> Manifest:
        with self._noticing_fence():
            return self.store.publish(draft)

    @contextmanager
    def _noticing_fence(self) -> Iterator[None]:
        try:
            yield
        except UnavailableError as err:
            if err.reason is Reason.FENCED:
                self._fenced = err
            raise

    def tidy(self) -> None:
        """Trim the journal and remove what nothing retained needs; a failure is only logged."""
        self._consolidate_at = self._context.config.consolidate_bytes
        try:
            self.journal.trim(self.manifest.lsn)
            self.retire()
        except MembankError as err:
            # Nothing is lost: what was to go is found and removed again at the next attempt.
            _LOG.warning("partition %d was not tidied: %s", self.number, err)

    def retire(self) -> None:
        """Remove the manifests, and their slots, that nothing retained needs."""
        self.store.retire()

    def history(self) -> PartitionHistory:
        """Return what the partition can be returned to."""
        with self._writer:
            return PartitionHistory(
                partition=self.number,
                history_from=self.store.history_from,
                ends=self.store.ends(),
            )

    def collect(self, *, history_from: int, dry_run: bool) -> PartitionGarbage:
        """Remove what nothing retained needs (see `ShardApi.collect`)."""
        # Nothing is folded or prepared meanwhile, so no slot is written that is still to be named.
        with self._writer:
            if self._fenced is not None:
                raise self._fenced
            floor = self._give_up_history(history_from, dry_run=dry_run)
            with self._noticing_fence():
                items = self.store.garbage(floor)
                if not dry_run:
                    self.store.remove(items[:MAX_REMOVED])
        removed = items if dry_run else items[:MAX_REMOVED]
        return PartitionGarbage(
            garbage=summed(removed), history_from=floor, is_complete=len(removed) == len(items)
        )

    def _give_up_history(self, history_from: int, *, dry_run: bool) -> int:
        """Promise no more than what settings and caller ask to keep; return what is promised."""
        floor = max(self.store.floor(self.revision), min(history_from, self.revision))
        if dry_run or not self.store.would_free(floor):
            return floor
        if self._held is not None:
            raise self._in_transaction()
        # The manifest first: while it promises the older history, nothing of that may go.
        promise = replace(self.manifest, history_from=floor, prepared=False)
        published = self._publish(promise)
        with self._context.state_lock:
            self.manifest = published
        return floor

    def _maybe_consolidate(self) -> None:
        if self.journal.num_bytes < self._consolidate_at:
            return
        try:
            self.fold()
        except MembankError as err:
            if self._fenced is not None:
                raise  # nobody will ever read this journal, so nothing may be acknowledged
            # The update is in the journal, so it stands; try again after as many bytes.
            self._consolidate_at = self.journal.num_bytes + self._context.config.consolidate_bytes
            _LOG.warning("partition %d was not consolidated: %s", self.number, err)

    # ---- transactions

    def retained_manifest(self, number: int) -> Manifest:
        """Return a manifest that a block may be restored from.

        Raises
        ------
        NotFoundError
            If it is not retained (OBJECT_MISSING).
        """
        with self._writer:
            if not self.store.is_retained(number):
                raise NotFoundError(
                    f"manifest {number} of partition {self.number} is not retained; "
                    "choose a later revision, or a snapshot",
                    reason=Reason.OBJECT_MISSING,
                    metadata={"partition": str(self.number), "manifest": str(number)},
                )
            return self.store.manifest(number)

    def count_slots(self, refs: Sequence[BlockRef]) -> int:
        """Return how many slots hold versions of `refs`; one to come counts for a dirty block."""
        with self._writer:
            dirty = sum(self.record(ref).is_dirty for ref in refs)
            return self.store.num_slots(refs) + dirty

    def hold(self, revision: int) -> None:
        """Hold updates back for a transaction; no other may hold the partition."""
        with self._writer:
            assert self._held is None
            if self._fenced is not None:
                raise self._fenced
            # A journal that failed cannot be trimmed, so it would keep what is to be deleted.
            self.journal.require_usable()
            self._held = Hold(revision, self._context.clock())

    def fold_held(self) -> None:
        """Bring the partition into slots for the transaction that holds it."""
        with self._writer:
            self.finish_removal()
            self.fold()

    def prepare(self, changes: Mapping[BlockRef, BlockRecord]) -> Manifest:
        """Make `changes` durable as a manifest that counts once the revision is committed.

        Parameters
        ----------
        changes
            The changed blocks as they will be; new content (a dirty record) goes into slots.
            Where nothing changes, the manifest keeps the present state until the decision: the
            present one might be superseded by then, if the shard starts again.

        Returns
        -------
        Manifest
            What the record of the revision must name.
        """
        with self._writer:
            assert self._held is not None
            fresh = {ref: record for ref, record in changes.items() if record.is_dirty}
            with self.fresh_slots(fresh) as slotted:
                records = {**changes, **slotted}
                entries = {ref: record.entry for ref, record in records.items()}
                manifest = self.publish(
                    {**self.entries(), **entries}, prepared_for=self._held.revision
                )
            self._held = replace(self._held, manifest=manifest, records=records)
            return manifest

    def resume_hold(self, manifest: Manifest) -> None:
        """Hold updates back for a transaction that was prepared before a restart."""
        before = self.entries()
        changed = {ref: e for ref, e in manifest.entries.items() if before.get(ref) != e}
        with self._writer:
            records = {ref: BlockRecord(entry) for ref, entry in changed.items()}
            self._held = Hold(manifest.revision, self._context.clock(), manifest, records)

    def install(self) -> list[BlockEvent]:
        """Put what was prepared in force; the caller holds the state lock of the shard."""
        assert self._held is not None
        events = []
        for ref, record in self._held.records.items():
            old = self.record(ref)
            self._context.residency.put(self.records, ref, record)
            entry = record.entry
            if entry.state is BlockState.DELETED and old.content is not None:
                old.content.wipe()
            events.append(
                BlockEvent(
                    ref=ref,
                    version=entry.version,
                    state=entry.state,
                    revision=self._held.revision,
                )
            )
        if self._held.manifest is not None:
            self.manifest = self._held.manifest
        return events

    def release(self, *, drop_prepared: bool) -> None:
        """Let updates pass again, after a transaction was put in force or given up."""
        with self._writer:
            held, self._held = self._held, None
            self._released.notify_all()
            if held is not None and held.manifest is not None and drop_prepared:
                self.store.drop(held.manifest.number)

    def finish(self) -> None:
        """After `install`: destroy what was deleted, then let updates pass again."""
        with self._writer:
            assert self._held is not None
            if any(
                record.entry.state is BlockState.DELETED for record in self._held.records.values()
            ):
                self._removal_pending = True
            try:
                self.finish_removal()
            finally:
                self.release(drop_prepared=False)
            self.tidy()

    def finish_removal(self) -> None:
        """Destroy what journal and storage still hold of deleted blocks; may be repeated."""
        with self._writer:
            if not self._removal_pending:
                return
            self.journal.trim(self.manifest.lsn)
            if self.journal.base < self.manifest.lsn:
                # An earlier trim failed, and later updates share a segment with the deleted ones.
                self.fold()
                self.journal.trim(self.manifest.lsn)
            self.store.purge(self.manifest)
            self._removal_pending = False

    def close(self, *, consolidate: bool) -> None:
        """Fold the journal if asked to and possible, then accept nothing more."""
        with self._writer:
            try:
                if consolidate and self._fenced is None:
                    self.consolidate()
            finally:
                self.journal.close()

    def _wait_until_free(self) -> None:
        wait_s = self._context.config.hold_wait_s
        if not self._released.wait_for(lambda: self._held is None, wait_s):
            raise self._in_transaction()
        if self._fenced is not None:
            raise self._fenced

    def _in_transaction(self) -> UnavailableError:
        return UnavailableError(
            f"a transaction holds partition {self.number} back; retry",
            reason=Reason.TRANSACTION_IN_PROGRESS,
            metadata={"partition": str(self.number)},
        )

    def _replay_mismatch(self, frame: UpdateFrame, applied: AppliedGradient) -> CorruptionError:
        return CorruptionError(
            f"replaying update {frame.request_id} on block {applied.ref} does not give what was "
            f"acknowledged as version {applied.version} (journalled with {frame.kernel}, "
            f"replayed with {self._kernel}); start the shard where it ran before",
            reason=Reason.REPLAY_MISMATCH,
            metadata={"block": str(applied.ref), "request_id": frame.request_id},
        )


_INITIAL_RECORD = BlockRecord(INITIAL_ENTRY)


def _refused(ref: BlockRef, entry: Entry, reason: Reason) -> UpdateResult:
    return UpdateResult(ref=ref, accepted=False, version=entry.version, reason=reason)
