"""One partition: its blocks, how updates reach them, and its part in transactions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from membank.bank_service.shard.content import BlockRecord, Content
from membank.bank_service.shard.contract import PartitionGarbage, PartitionHistory
from membank.bank_service.shard.folding import Folding
from membank.bank_service.shard.inventory import Inventory, take_inventory
from membank.bank_service.shard.state import Hold, PartitionState
from membank.bank_service.shard.update_frame import UpdateFrame
from membank.bank_service.shard.update_path import UpdatePath
from membank.bank_service.store.journal import Journal, ShippedJournal
from membank.wire.errors import NotFoundError, Reason, UnavailableError
from membank.wire.format import Manifest
from membank.wire.records import BlockEvent, Gradient, Update, UpdateResult
from membank.wire.spec import BlockRef, BlockState


class Partition:
    """One partition of a shard. Locks: see `PartitionState`.

    Parameters
    ----------
    state
        Its data, as it was when its owner took over.
    """

    def __init__(self, state: PartitionState) -> None:
        self._state = state
        self._folding = Folding(state)
        self._updates = UpdatePath(state, self._folding)
        self.number = state.number
        self.store = state.store

    # ---- reading (state lock held by the caller, unless said otherwise)

    @property
    def manifest(self) -> Manifest:
        """The manifest in force."""
        return self._state.manifest

    @property
    def revision(self) -> int:
        """Newest committed revision of the bank."""
        return self._state.revision

    def enter(self, revision: int) -> None:
        """Take note that `revision` is in force."""
        self._state.revision = revision

    @property
    def held(self) -> Hold | None:
        """The transaction that holds updates back, if any."""
        return self._state.held

    @property
    def journal_bytes(self) -> int:
        """Bytes of the journal; no lock is needed."""
        return self._state.journal.num_bytes

    @property
    def unshipped_s(self) -> float:
        """Age in seconds of the oldest update that the bank's storage should have and has not."""
        journal = self._state.journal
        return journal.lag().seconds if isinstance(journal, ShippedJournal) else 0.0

    @property
    def is_folded(self) -> bool:
        """Whether all that was acknowledged is in slots; no lock is needed once it is closed."""
        return self._state.journal.last_lsn <= self._state.manifest.lsn

    @property
    def fenced(self) -> UnavailableError | None:
        """Why nothing is acknowledged any more: there is another owner. No lock is needed."""
        return self._state.fenced

    def record(self, ref: BlockRef) -> BlockRecord:
        """Return what is known of `ref`."""
        return self._state.table.record(ref)

    def keep(self, ref: BlockRef, record: BlockRecord, content: Content) -> None:
        """Keep a loaded content in memory, if `record` still is what is known of `ref`.

        Takes the state lock itself.
        """
        with self._state.context.state_lock:
            now = self.record(ref)
            has_less = now.content is None or len(now.content.arrays) < len(content.arrays)
            if now.entry == record.entry and has_less:
                self._state.set_record(ref, replace(now, content=content))

    def require_lease(self) -> None:
        """Return if this owner may answer; no lock is held by the caller.

        Raises
        ------
        UnavailableError
            If another owner took the partition over (FENCED), or the storage cannot be asked.
        """
        if self._state.fenced is not None:
            raise self._state.fenced
        self._state.lease.require()

    def renew_lease(self) -> None:
        """Make sure now that there is no other owner; raises as `require_lease` does."""
        self._state.lease.renew()

    def ship(self) -> None:
        """Copy to the bank's storage what of the journal is not there yet, where it is set so."""
        if isinstance(self._state.journal, ShippedJournal):
            self._state.journal.ship()

    # ---- updates

    def push(
        self, update: Update, gradients: Sequence[Gradient]
    ) -> tuple[tuple[UpdateResult, ...], bool]:
        """See `UpdatePath.push`."""
        return self._updates.push(update, gradients)

    def replay(self, frame: UpdateFrame) -> None:
        """See `UpdatePath.replay`."""
        self._updates.replay(frame)

    def consolidate(self) -> bool:
        """See `Folding.consolidate`."""
        return self._folding.consolidate()

    def tidy(self) -> None:
        """See `Folding.tidy`; for an owner that is about to serve."""
        with self._state.folding:
            self._folding.tidy()

    def settle_inheritance(self, inherited: Journal) -> None:
        """Bring what was replayed from another journal into slots, and give that journal up."""
        with self._state.folding:
            self._folding.fold()
            inherited.trim(inherited.last_lsn)
            inherited.close()

    # ---- history

    def history(self) -> PartitionHistory:
        """See `Folding.history`."""
        return self._folding.history()

    def collect(self, *, history_from: int, dry_run: bool) -> PartitionGarbage:
        """See `Folding.collect`."""
        return self._folding.collect(history_from=history_from, dry_run=dry_run)

    # ---- transactions

    def retained_manifest(self, number: int) -> Manifest:
        """Return a manifest that a block may be restored from.

        Raises
        ------
        NotFoundError
            If it is not retained (OBJECT_MISSING).
        """
        with self._state.folding:
            if not self.store.manifests.is_retained(number):
                raise NotFoundError(
                    f"manifest {number} of partition {self.number} is not retained; "
                    "choose a later revision, or a snapshot",
                    reason=Reason.OBJECT_MISSING,
                    metadata={"partition": str(self.number), "manifest": str(number)},
                )
            return self.store.manifests.read(number)

    def count_slots(self, refs: Sequence[BlockRef]) -> int:
        """Return how many slots hold versions of `refs`; one to come counts for a dirty block."""
        with self._state.folding:
            dirty = sum(self._state.record(ref).is_dirty for ref in refs)
            held = self.store.holdings(refs, self.manifest.owner)
            return sum(map(len, held.slots.values())) + dirty

    def take_inventory(self, refs: Iterable[BlockRef]) -> Inventory:
        """Return what there is of blocks, for a transaction that holds the partition, folded."""
        state = self._state
        with state.folding:
            records = {ref: state.record(ref) for ref in refs}
            spec = state.context.bank.spec
            return take_inventory(self.store, spec, records, self.manifest.owner)

    def hold(self, revision: int) -> None:
        """Hold updates back until `release` or `finish`; a consolidation under way ends first."""
        state = self._state
        with state.folding, state.writer:
            assert state.held is None
            if state.fenced is not None:
                raise state.fenced
            # A journal that failed cannot be trimmed, so it would keep what is to be deleted.
            state.journal.require_usable()
            state.held = Hold(revision, state.context.clock())

    def fold_held(self) -> None:
        """Bring the partition into slots for the transaction that holds it."""
        with self._state.folding:
            self._folding.finish_removal()
            self._folding.fold()

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
        state = self._state
        with state.folding:
            assert state.held is not None
            manifest, records = self._folding.publish_prepared(changes, state.held.revision)
            with state.writer:
                state.held = replace(state.held, manifest=manifest, records=records)
            return manifest

    def resume_hold(self, manifest: Manifest) -> None:
        """Hold updates back for a transaction that was prepared before a restart."""
        state = self._state
        mine = state.manifest
        # Another owner prepared it; from here on it is this one's to publish after.
        adopted = replace(
            manifest,
            epoch=mine.epoch,
            owner=mine.owner,
            lock=mine.lock,
            lease_s=mine.lease_s,
            durability=mine.durability,
        )
        with state.folding, state.writer:
            records = {
                ref: BlockRecord(entry)
                for ref, entry in manifest.entries.items()
                if state.record(ref).entry != entry
            }
            state.held = Hold(manifest.revision, state.context.clock(), adopted, records)

    def install(self) -> list[BlockEvent]:
        """Put what was prepared in force; the caller holds the state lock of the shard."""
        state = self._state
        assert state.held is not None
        events = []
        for ref, record in state.held.records.items():
            old = self.record(ref)
            state.set_record(ref, record)
            entry = record.entry
            if entry.state is BlockState.DELETED and old.content is not None:
                old.content.wipe()
            events.append(
                BlockEvent(
                    ref=ref,
                    version=entry.version,
                    state=entry.state,
                    revision=state.held.revision,
                )
            )
        if state.held.manifest is not None:
            state.manifest = state.held.manifest
            state.table.rebase(state.manifest.entries)
        return events

    def release(self, *, drop_prepared: bool) -> None:
        """Let updates pass again, after a transaction was put in force or given up."""
        state = self._state
        with state.folding:
            with state.writer:
                held, state.held = state.held, None
                state.changed.notify_all()
            if held is not None and held.manifest is not None and drop_prepared:
                self._folding.drop_prepared(held.manifest)

    def finish(self) -> None:
        """After `install`: destroy what was deleted, then let updates pass again."""
        state = self._state
        with state.folding:
            assert state.held is not None
            if any(
                record.entry.state is BlockState.DELETED for record in state.held.records.values()
            ):
                self._folding.expect_removal()
            try:
                self.finish_removal()
            finally:
                self.release(drop_prepared=False)
            self._folding.tidy()

    def finish_removal(self) -> None:
        """See `Folding.finish_removal`."""
        self._folding.finish_removal()

    # ---- the end

    def close(self, *, consolidate: bool) -> None:
        """Fold the journal if asked to and possible, and let go; accept nothing more."""
        state = self._state
        with state.folding:
            is_folded = False
            try:
                if consolidate and state.fenced is None:
                    is_folded = self._folding.consolidate()
            finally:
                with state.writer:
                    state.journal.close()
            if is_folded:
                # No update can come any more that the manifest does not contain.
                self._folding.let_go()
