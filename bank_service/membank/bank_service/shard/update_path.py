"""How updates reach a partition: compute, write to the journal, install, acknowledge.

A change that cannot be journalled is not installed, and readers see nothing that is not in the
journal. Pushes that arrive while others are being journalled wait together, and the next one that
gets its turn takes all of them along: one write and one sync for the lot (group commit).

Each push computes *ahead*, in its own thread and with no lock held, what its gradients make of the
blocks, while those before it compute or are journalled. Nothing is decided by that. When its turn
comes, with the partition's `writer` held, each block is looked at anew: what was computed on this
very version of it is taken over, and else it is computed again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from membank.bank_service.shard.content import BlockRecord, Content, content_crcs, kept
from membank.bank_service.shard.folding import Folding
from membank.bank_service.shard.optimizer import kernel_fingerprint
from membank.bank_service.shard.push_queue import Ahead, Call, PushQueue
from membank.bank_service.shard.request_log import answer_of
from membank.bank_service.shard.state import PartitionState
from membank.bank_service.shard.update_frame import AppliedBlock, UpdateFrame, encode_update
from membank.bank_service.shard.update_rule import Step
from membank.bank_service.store.journal import FrameKind, Payload
from membank.wire.errors import (
    CorruptionError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.format import Entry
from membank.wire.records import BlockEvent, Gradient, Update, UpdateResult
from membank.wire.spec import Array, BlockRef

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Staged:
    """An accepted gradient and what it makes of its block."""

    result: UpdateResult
    entry: Entry
    content: Content
    gradient: Gradient | None
    """None at recovery."""


@dataclass(slots=True)
class _Batch:
    """What the pushes of one batch make of the partition; nobody sees it before it is journalled."""

    records: dict[BlockRef, BlockRecord] = field(default_factory=dict)
    results: dict[str, tuple[UpdateResult, ...]] = field(default_factory=dict)
    accepted: list[tuple[Call, list[_Staged]]] = field(default_factory=list)
    followers: list[tuple[Call, tuple[UpdateResult, ...]]] = field(default_factory=list)
    payloads: list[Payload] = field(default_factory=list)


class UpdatePath:
    """Applies pushes to one partition.

    Parameters
    ----------
    state
        The partition.
    folding
        Its consolidation.
    """

    def __init__(self, state: PartitionState, folding: Folding) -> None:
        self._state = state
        self._folding = folding
        self._rule = state.context.rule
        self._kernel = kernel_fingerprint()
        self._frame_kind = (
            FrameKind.IMAGE if state.context.config.is_replayed_elsewhere else FrameKind.UPDATE
        )
        self._queue = PushQueue()

    def push(
        self, update: Update, gradients: Sequence[Gradient]
    ) -> tuple[tuple[UpdateResult, ...], bool]:
        """Apply those gradients of `update` that belong here; also say whether it is a repeat.

        Notes
        -----
        All of them take effect, as far as they are accepted, or none. The results say which were.
        """
        state = self._state
        self._require_room()
        call = Call(update, gradients)
        should_compute = self._queue.add(call)
        try:
            if should_compute:
                self._compute_ahead(call)
        finally:
            call.ready.set()
        with state.writer:
            while not call.is_done:
                self._wait_until_free(call)
                if not call.is_done:
                    self._commit_next()
        if call.error is not None:
            raise call.error
        if self._folding.is_due():
            state.context.maintenance.request(self._folding)
        if state.fenced is not None:
            # Nobody will ever read this journal, so nothing may be acknowledged.
            raise state.fenced
        state.lease.require()
        assert call.results is not None
        return call.results, call.is_repeat

    def replay(self, frame: UpdateFrame) -> None:
        """Apply a journalled update again, at recovery.

        Raises
        ------
        CorruptionError
            If the result differs from what was journalled (REPLAY_MISMATCH).
        """
        staged = []
        for block in frame.blocks:
            found = self._again(frame, block)
            if found is None or _traits(found[0]) != _traits(block.after):
                raise self._replay_mismatch(frame, block)
            result = UpdateResult(ref=block.ref, accepted=True, version=block.after.version)
            staged.append(_Staged(result, *found, gradient=None))
        with self._state.context.state_lock:
            self._set(staged)
        self._state.requests.add(frame.request_id, frame.results)

    def _again(self, frame: UpdateFrame, block: AppliedBlock) -> tuple[Entry, Content] | None:
        record = self._state.record(block.ref)
        if block.arrays is None:
            assert block.gradient is not None
            return self._apply(block.ref, record, block.gradient, frame.learning_rate_scale)
        crcs = content_crcs(self._state.context.bank.spec, block.arrays)
        # The frame's own buffer goes when the journal is trimmed; the content must not hold it.
        arrays = {role: kept(array) for role, array in block.arrays.items()}
        return replace(block.after, crcs=crcs), Content(arrays, crcs[0])

    # ---- waiting

    def _require_room(self) -> None:
        """Wait until journal and dirty blocks are within their bounds, or refuse."""
        state, folding = self._state, self._folding
        if not folding.is_full():
            return
        state.context.maintenance.request(folding)
        with state.writer:
            state.changed.wait_for(
                lambda: not folding.is_full() or state.fold_error is not None,
                state.context.config.hold_wait_s,
            )
        if not folding.is_full():
            return
        error = state.fold_error
        raise ResourceExhaustedError(
            f"partition {state.number} takes no updates before it is consolidated"
            + (f", and that fails: {error}" if error is not None else "; retry"),
            reason=Reason.OVERLOADED if error is None else error.reason,
            metadata={"partition": str(state.number)},
        )

    def _wait_until_free(self, call: Call) -> None:
        state = self._state
        wait_s = state.context.config.hold_wait_s
        if not state.changed.wait_for(lambda: state.held is None or call.is_done, wait_s):
            self._queue.remove(call)
            raise state.in_transaction()
        if state.fenced is not None and not call.is_done:
            self._queue.remove(call)
            raise state.fenced

    # ---- ahead of its turn

    def _compute_ahead(self, call: Call) -> None:
        """Compute what `call` makes of its blocks as they are now; no lock is held."""
        scale = call.update.learning_rate_scale
        try:
            steps = [
                Step(ref, record.entry, self._content(ref, record), gradient.values, scale)
                for gradient, ref, record in self._acceptable(call.gradients)
            ]
            found = self._rule.apply_all(steps)
        except Exception as err:
            # Such as a slot that was removed because another push went first. What is really
            # wrong is found again in its turn, and answered then.
            _LOG.debug("partition %d: nothing computed ahead: %s", self._state.number, err)
            return
        call.ahead.update(
            (step.ref, Ahead(step.before, after)) for step, after in zip(steps, found, strict=True)
        )

    def _acceptable(
        self, gradients: Sequence[Gradient]
    ) -> Iterator[tuple[Gradient, BlockRef, BlockRecord]]:
        for gradient in gradients:
            record = self._state.record(gradient.ref)
            if self._rule.refusal(record.entry, gradient.base_version) is None:
                yield gradient, gradient.ref, record

    # ---- one batch

    def _commit_next(self) -> None:
        calls = self._queue.next_batch()
        try:
            self._commit(calls)
        finally:
            self._queue.settle(calls)

    def _commit(self, calls: Sequence[Call]) -> None:
        batch = _Batch()
        for call in calls:
            try:
                self._stage_call(batch, call)
            except Exception as err:
                # One push that fails must not fail those that happen to wait beside it.
                call.error = err
        if not batch.payloads:
            return
        try:
            self._state.journal.append(self._frame_kind, batch.payloads)
        except Exception as err:
            if isinstance(err, UnavailableError) and err.reason is Reason.FENCED:
                self._state.fenced = err
            for call, _ in [*batch.accepted, *batch.followers]:
                call.error = err
            return
        self._install(batch)

    def _stage_call(self, batch: _Batch, call: Call) -> None:
        refs = [gradient.ref for gradient in call.gradients]
        request_id = call.update.request_id
        known = self._state.requests.answer(request_id, refs)
        if known is not None:
            call.is_repeat, call.results = True, known
            return
        if request_id in batch.results:
            # A retry that came before its first attempt was journalled; it shares its fate.
            call.is_repeat = True
            batch.followers.append((call, answer_of(request_id, batch.results[request_id], refs)))
            return
        self._state.journal.require_usable()
        staged = [self._stage(batch, call, gradient) for gradient in call.gradients]
        results = tuple(item.result if isinstance(item, _Staged) else item for item in staged)
        accepted = [item for item in staged if isinstance(item, _Staged)]
        if not accepted:
            if batch.payloads:
                # Refused for what the batch makes of the blocks, which may yet fail.
                batch.followers.append((call, results))
            else:
                call.results = results
            return
        batch.payloads.append(
            encode_update(
                self._frame_kind,
                call.update,
                results,
                [_applied(s) for s in accepted],
                self._kernel,
            )
        )
        batch.records |= {s.result.ref: BlockRecord(s.entry, s.content) for s in accepted}
        batch.results[request_id] = results
        batch.accepted.append((call, accepted))

    def _stage(self, batch: _Batch, call: Call, gradient: Gradient) -> _Staged | UpdateResult:
        ref = gradient.ref
        record = batch.records.get(ref) or self._state.record(ref)
        if (reason := self._rule.refusal(record.entry, gradient.base_version)) is not None:
            return _refused(ref, record.entry, reason)
        ahead = call.ahead.pop(ref, None)
        if ahead is not None and _traits(ahead.before) == _traits(record.entry):
            found = ahead.after
        else:
            found = self._apply(ref, record, gradient.values, call.update.learning_rate_scale)
        if found is None:
            return _refused(ref, record.entry, Reason.NOT_FINITE)
        entry, content = found
        result = UpdateResult(ref=ref, accepted=True, version=entry.version)
        return _Staged(result, entry, content, gradient)

    def _apply(
        self, ref: BlockRef, record: BlockRecord, values: Array, scale: float
    ) -> tuple[Entry, Content] | None:
        return self._rule.apply(ref, record.entry, self._content(ref, record), values, scale)

    def _content(self, ref: BlockRef, record: BlockRecord) -> Content:
        state = self._state
        return state.store.load_content(ref, record, state.context.bank.spec.roles)

    def _install(self, batch: _Batch) -> None:
        state = self._state
        with state.context.state_lock:
            for _, staged in batch.accepted:
                self._set(staged)
        for call, _ in batch.accepted:
            call.results = batch.results[call.update.request_id]
            state.requests.add(call.update.request_id, call.results)
        for call, results in batch.followers:
            call.results = results
        state.context.hub.publish(
            [
                BlockEvent(
                    ref=item.result.ref,
                    version=item.entry.version,
                    state=item.entry.state,
                    revision=state.revision,
                    is_update=True,
                )
                for _, staged in batch.accepted
                for item in staged
            ]
        )

    def _set(self, staged: Sequence[_Staged]) -> None:
        for item in staged:
            self._state.set_record(item.result.ref, BlockRecord(item.entry, item.content))
        self._state.num_unfolded += len(staged)

    def _replay_mismatch(self, frame: UpdateFrame, block: AppliedBlock) -> CorruptionError:
        return CorruptionError(
            f"replaying update {frame.request_id} on block {block.ref} does not give what was "
            f"acknowledged as version {block.after.version} (journalled with {frame.kernel}, "
            f"replayed with {self._kernel}); start the shard where it ran before",
            reason=Reason.REPLAY_MISMATCH,
            metadata={"block": str(block.ref), "request_id": frame.request_id},
        )


def _applied(staged: _Staged) -> AppliedBlock:
    gradient = staged.gradient
    assert gradient is not None
    return AppliedBlock(
        staged.result.ref, staged.entry, gradient.values, gradient.crc32c, staged.content.arrays
    )


def _traits(entry: Entry) -> tuple[object, ...]:
    """Return what tells one content of a block from any other; where it is stored does not."""
    return (entry.version, entry.step, entry.updates, entry.crcs)


def _refused(ref: BlockRef, entry: Entry, reason: Reason) -> UpdateResult:
    return UpdateResult(ref=ref, accepted=False, version=entry.version, reason=reason)
