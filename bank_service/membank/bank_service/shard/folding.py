"""Consolidation: from the journal into slots, a manifest that names them, and what may go then."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from membank.bank_service.shard.content import INITIAL_ENTRY, BlockRecord
from membank.bank_service.shard.contract import PartitionGarbage, PartitionHistory
from membank.bank_service.shard.garbage import MAX_REMOVED, summed
from membank.bank_service.shard.retention import StoredManifest
from membank.bank_service.shard.state import PartitionState
from membank.wire.errors import (
    FailedPreconditionError,
    MembankError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.format import EntryTable, Manifest
from membank.wire.spec import BlockRef, BlockState
from membank.wire.wiping import wipe_pools

_LOG = logging.getLogger(__name__)
_UPDATES_LIMIT = 4
"""Updates wait once there are so many times as many as make a consolidation due."""


@dataclass(frozen=True, slots=True)
class _Capture:
    """A partition as it was at one moment."""

    manifest: Manifest
    """What to publish, but for the entries of the dirty blocks."""
    dirty: Mapping[BlockRef, BlockRecord]
    """Blocks whose content is in no slot."""
    num_unfolded: int
    """Updates of blocks that are in the journal only."""


class Folding:
    """Consolidates one partition, and publishes its manifests.

    Slots are written while updates go on: the manifest describes the moment of the capture, and
    what came after stays in the journal.

    Parameters
    ----------
    state
        The partition.
    """

    def __init__(self, state: PartitionState) -> None:
        self._state = state
        self.number = state.number
        self._set_thresholds()
        # A removal may have been cut short before this owner started.
        self._removal_pending = True

    # ---- when

    def _set_thresholds(self, num_bytes: int = 0, num_updates: int = 0) -> None:
        """Let the next consolidation be due as much later than at so many bytes and updates."""
        config = self._state.context.config
        self._consolidate_at = num_bytes + config.consolidate_bytes
        self._consolidate_at_updates = num_updates + config.consolidate_updates

    def is_due(self) -> bool:
        """Say whether journal or dirty blocks are large enough to be folded."""
        state = self._state
        return (
            state.journal.num_bytes >= self._consolidate_at
            or state.num_unfolded >= self._consolidate_at_updates
            or state.table.dirty_bytes >= state.context.dirty_share_bytes
        )

    def is_full(self) -> bool:
        """Say whether updates must wait for a consolidation."""
        state = self._state
        config = state.context.config
        return (
            state.journal.num_bytes >= config.journal_limit_bytes
            or state.num_unfolded >= _UPDATES_LIMIT * config.consolidate_updates
            or state.table.dirty_bytes >= 2 * state.context.dirty_share_bytes
        )

    def try_consolidate(self) -> None:
        """Consolidate for the sake of room; a failure is noted for those who need the room."""
        state, error = self._state, None
        try:
            self.consolidate()
        except MembankError as err:
            # The updates are in the journal, so they stand; try again after as many bytes.
            self._set_thresholds(state.journal.num_bytes, state.num_unfolded)
            _LOG.warning("partition %d was not consolidated: %s", state.number, err)
            error = err
            if isinstance(err, ResourceExhaustedError):
                self._make_room()
        with state.writer:
            state.fold_error = error
            state.changed.notify_all()

    def _make_room(self) -> None:
        """Give back what the journal keeps for speed: the next attempt may need the space."""
        try:
            self._state.journal.erase()
        except MembankError as err:
            _LOG.warning("partition %d keeps its spare segments: %s", self.number, err)

    # ---- how

    def consolidate(self) -> bool:
        """Fold the journal into slots; False where a transaction holds the partition."""
        with self._state.folding:
            if self._state.held is not None:
                return False
            self.fold()
            return True

    def fold(self) -> None:
        """Write dirty blocks to slots, publish a manifest that names them, trim the journal.

        For the holder of `folding`; others call `consolidate`.
        """
        state = self._state
        capture = self.capture()
        if not capture.dirty and capture.manifest.lsn <= state.manifest.lsn:
            with state.context.state_lock:
                state.num_unfolded -= capture.num_unfolded
            return
        with self._fresh_slots(capture.dirty) as slotted, self._lent(capture.dirty):
            published = self.publish(self._with(capture.manifest, slotted))
            with state.context.state_lock:
                state.manifest = published
                state.num_unfolded -= capture.num_unfolded
                state.table.rebase(published.entries)
                for ref, record in slotted.items():
                    if state.table.record(ref).entry.version == record.entry.version:
                        state.set_record(ref, record)
        self.tidy()

    def capture(self) -> _Capture:
        """Return the partition as it is now."""
        state = self._state
        with state.writer:
            lsn = state.journal.last_lsn
            requests = state.requests.export()
            with state.context.state_lock:
                dirty = state.table.dirty()
                num_unfolded = state.num_unfolded
                before = state.manifest
                revision = state.revision
        manifest = replace(
            before,
            revision=revision,
            lsn=max(lsn, before.lsn),
            requests=requests,
            prepared=False,
        )
        return _Capture(manifest, dirty, num_unfolded)

    def publish_prepared(
        self, changes: Mapping[BlockRef, BlockRecord], revision: int
    ) -> tuple[Manifest, dict[BlockRef, BlockRecord]]:
        """Publish a manifest with `changes` that counts once `revision` is committed.

        Parameters
        ----------
        changes
            The changed blocks as they will be; new content (a dirty record) goes into slots.
        revision
            The revision.

        Returns
        -------
        tuple[Manifest, dict[BlockRef, BlockRecord]]
            The manifest, and the changed blocks with their slots.
        """
        fresh = {ref: record for ref, record in changes.items() if record.is_dirty}
        draft = replace(self.capture().manifest, revision=revision, prepared=True)
        with self._fresh_slots(fresh) as slotted:
            records = {**changes, **slotted}
            return self.publish(self._with(draft, records)), records

    def let_go(self) -> None:
        """Say in the manifest that this owner answers no more, so that the next need not wait.

        For the holder of `folding`, once the journal is closed.
        """
        state = self._state
        if not state.manifest.lease_s or state.journal.last_lsn > state.manifest.lsn:
            return
        try:
            self._put_in_force(self.republish(lock=""))
        except MembankError as err:
            # The next owner waits out the lease, or is there already.
            _LOG.info("partition %d was not let go of: %s", state.number, err)

    def drop_prepared(self, prepared: Manifest) -> None:
        """Remove what was prepared for a transaction that will not be committed.

        It was decided against, or could not be prepared in all partitions. For the holder of
        `folding`.
        """
        state = self._state
        state.store.manifests.give_up(prepared.number)
        try:
            # Another one first: the one with the greatest number has to stay.
            self._put_in_force(self.republish())
            state.store.retire()
        except MembankError as err:
            # It counts for nothing, and goes once the next manifest is there.
            _LOG.info("partition %d keeps what was prepared: %s", state.number, err)

    def _put_in_force(self, manifest: Manifest) -> None:
        with self._state.context.state_lock:
            self._state.manifest = manifest
            self._state.table.rebase(manifest.entries)

    def republish(self, **changes: object) -> Manifest:
        """Publish the manifest in force once more, with `changes`."""
        draft = replace(self._state.manifest, prepared=False)
        return self.publish(replace(draft, **changes))  # type: ignore[arg-type]  # its own fields

    def publish(self, draft: Manifest) -> Manifest:
        """Publish `draft` as the next manifest and return it as it stands.

        Raises
        ------
        UnavailableError
            If another owner took the partition over (FENCED); this one acknowledges nothing from
            then on.
        """
        with self._noticing_fence():
            return self._state.store.publish(draft)

    @contextmanager
    def _noticing_fence(self) -> Iterator[None]:
        try:
            yield
        except UnavailableError as err:
            if err.reason is Reason.FENCED:
                self._state.fenced = err
            raise

    @contextmanager
    def _fresh_slots(
        self, records: Mapping[BlockRef, BlockRecord]
    ) -> Iterator[dict[BlockRef, BlockRecord]]:
        """Write contents to fresh slots; yield the records that name them, to be published."""
        store = self._state.store
        slots = store.write_blocks(records)
        try:
            yield {
                ref: replace(record, entry=replace(record.entry, slot=slots[ref]))
                for ref, record in records.items()
            }
        except (ResourceExhaustedError, FailedPreconditionError):
            # The space may be needed. Where the manifest may exist in spite of the error, as after
            # any other error, its slots must stay.
            if store.manifests.is_unpublished(self._state.manifest.owner):
                store.release((ref.level, slot) for ref, slot in slots.items())
            raise

    @contextmanager
    def _lent(self, records: Mapping[BlockRef, BlockRecord]) -> Iterator[None]:
        """Count the contents that are being written twice: their blocks may move on meanwhile."""
        context = self._state.context
        num_bytes = sum(r.content.num_bytes for r in records.values() if r.content is not None)
        with context.state_lock:
            context.residency.lend(num_bytes)
        try:
            yield
        finally:
            with context.state_lock:
                context.residency.lend(-num_bytes)

    def _with(self, manifest: Manifest, records: Mapping[BlockRef, BlockRecord]) -> Manifest:
        table = EntryTable.of(manifest.entries, len(self._state.context.bank.spec.roles))
        entries = {ref: record.entry for ref, record in records.items()}
        return replace(manifest, entries=table.updated(entries))

    # ---- what may go

    def tidy(self) -> None:
        """Trim the journal and remove what nothing retained needs; a failure is only logged."""
        state = self._state
        self._set_thresholds()
        try:
            state.journal.trim(state.manifest.lsn)
            self.retire()
        except MembankError as err:
            # Nothing is lost: what was to go is found and removed again at the next attempt.
            _LOG.warning("partition %d was not tidied: %s", state.number, err)

    def retire(self) -> None:
        """Remove the manifests, and their slots, that nothing retained needs."""
        self._state.store.retire()

    def history(self) -> PartitionHistory:
        """Return what the partition can be returned to."""
        state = self._state
        with state.folding:
            return PartitionHistory(
                partition=state.number,
                history_from=state.store.manifests.history_from,
                ends=state.store.manifests.ends(),
            )

    def collect(self, *, history_from: int, dry_run: bool) -> PartitionGarbage:
        """Remove what nothing retained needs (see `ShardApi.collect`)."""
        state = self._state
        # Nothing is folded or prepared meanwhile, so no slot is written that is still to be named.
        with state.folding:
            if state.fenced is not None:
                raise state.fenced
            floor = self._give_up_history(history_from, dry_run=dry_run)
            coming = None
            # The manifest with the greatest number stays, so another one has to come.
            is_topped = state.held is None and not state.store.manifests.is_newest_alive
            if dry_run and (is_topped or floor > state.revision):
                coming = self._coming(floor)
            elif is_topped:
                self._put_in_force(self.republish())
            with self._noticing_fence():
                items = state.store.garbage(floor, state.manifest.owner, coming)
                if not dry_run:
                    state.store.remove(items[:MAX_REMOVED])
        removed = items if dry_run else items[:MAX_REMOVED]
        return PartitionGarbage(
            garbage=summed(removed), history_from=floor, is_complete=len(removed) == len(items)
        )

    def _give_up_history(self, history_from: int, *, dry_run: bool) -> int:
        """Promise no more than what settings and caller ask to keep; return what is promised."""
        state = self._state
        promised = state.store.manifests.history_from
        asked = history_from if dry_run else min(history_from, state.revision)
        floor = max(state.store.manifests.floor(state.revision), asked)
        if dry_run or not state.store.manifests.would_free(floor):
            return floor
        if state.held is not None:
            # What the transaction prepared makes a promise of its own.
            if asked > promised:
                raise state.in_transaction()
            return promised
        # The manifest first: while it promises the older history, nothing of that may go.
        self._put_in_force(self.republish(history_from=floor))
        return floor

    def _coming(self, revision: int) -> StoredManifest:
        """Return the next manifest; that of a later revision has all that is dirty in fresh slots."""
        state = self._state
        is_later = revision > state.revision
        with state.context.state_lock:
            entries = EntryTable.of(state.manifest.entries)
            dirty = state.table.dirty() if is_later else {}
        return StoredManifest(
            number=state.store.manifests.next_number,
            revision=max(revision, state.revision),
            prepared=is_later,
            history_from=revision,
            slots=entries.updated(dict.fromkeys(dirty, INITIAL_ENTRY)).slots(),
        )

    def expect_removal(self) -> None:
        """Note that blocks were deleted, whose bytes are still to be destroyed."""
        self._removal_pending = True

    def finish_removal(self) -> None:
        """Destroy what journal, storage and idle memory hold of deleted blocks; may be repeated."""
        state = self._state
        with state.folding:
            if self._removal_pending and self._has_deleted():
                self._purge_journal()
                state.store.purge(state.manifest)
                # Last: to fold the journal brings earlier versions into memory, and lets go of them.
                wipe_pools()
            self._removal_pending = False

    def _has_deleted(self) -> bool:
        return bool(EntryTable.of(self._state.manifest.entries).in_state(BlockState.DELETED))

    def _purge_journal(self) -> None:
        """Make sure that no update of a deleted block is left in the journal."""
        state = self._state
        # What came before the delete; what comes after it has nothing of the block.
        until = state.manifest.lsn
        state.journal.trim(until)
        if state.journal.base < until:
            # Later updates share a segment with the deleted ones, or an earlier trim failed.
            self.fold()
            state.journal.trim(state.manifest.lsn)
        if state.journal.base < until:
            raise UnavailableError(
                f"the journal of partition {state.number} still has updates of deleted blocks, "
                "which could not be removed; the shard tries again by itself",
                reason=Reason.STORE_FAILED,
                metadata={"partition": str(state.number)},
            )
        state.journal.erase()
