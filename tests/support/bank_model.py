"""What a bank must hold after any program of operations: plain dicts, one short method each.

The model knows nothing of slots, manifests, journals or shards. Its arithmetic is numpy's; a bank whose
learning rates and momentum are powers of two gives the same bits, however its kernels round.
A model is never changed: each method returns the bank as it is afterwards, or raises `Refused`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from membank.wire.errors import Reason
from membank.wire.format import initial_weight
from membank.wire.records import Gradient, Update, UpdateResult
from membank.wire.spec import Array, BankSpec, BlockRef, BlockState

ACTIVE, WITHHELD, DELETED = BlockState.ACTIVE, BlockState.WITHHELD, BlockState.DELETED

Marks = frozenset[bytes]
"""Byte strings by which content is found again in a file."""

_MARK_BYTES = 16


class Refused(Exception):
    """The bank must refuse the operation, for this reason, and change nothing."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Content:
    """Weight and optimizer state of a block; two are the same content only if they are one object."""

    weight: Array
    """(L, P, R, D) in the bank's dtype."""
    momentum: Array
    """(L, P, R, D) float32."""

    def marks(self) -> Marks:
        """Return what would tell of this content."""
        return _marks(self.weight, self.momentum)


@dataclass(frozen=True)
class Block:
    """One block."""

    version: int
    """Changes so far."""
    state: BlockState
    """Its state."""
    step: int
    """Gradient steps that the content stands for."""
    content: Content | None
    """None exactly where it is deleted."""
    updates: int = 0
    """Updates since the last administrative change."""

    def changed(self, **fields: object) -> Block:
        """Return the block after an administrative change."""
        return replace(self, version=self.version + 1, updates=0, **fields)  # type: ignore[arg-type]

    def erased(self) -> Block:
        """Return what is left of the block in the past once it was deleted."""
        return replace(self, state=DELETED, step=0, content=None)


State = Mapping[BlockRef, Block]
"""Blocks at some moment."""


@dataclass(frozen=True)
class Pack:
    """An exported topic."""

    data: bytes
    """The file."""
    blocks: Mapping[BlockRef, Block]
    """What was exported."""
    labels: Mapping[BlockRef, str]
    """The labels in it."""


@dataclass(frozen=True)
class Snapshot:
    """A pinned state."""

    state: State
    """Every block."""
    revision: int = 0
    """The revision that made it; 0 = to be committed."""


@dataclass(frozen=True)
class BankModel:
    """A bank."""

    spec: BankSpec
    """What it is."""
    blocks: Mapping[BlockRef, Block]
    """Every block."""
    labels: Mapping[BlockRef, str] = field(default_factory=dict)
    """Labels of topics."""
    answers: Mapping[tuple[str, int], Mapping[BlockRef, UpdateResult]] = field(default_factory=dict)
    """What was answered, by request id and partition; refusals alone are not remembered."""
    revision: int = 0
    """Newest commit."""
    snapshots: Mapping[str, Snapshot] = field(default_factory=dict)
    """What is pinned, by name."""
    folds: Mapping[int, Sequence[State]] = field(default_factory=dict)
    """Per partition, the states that its newest manifest may hold: each since the newest fold that was
    asked for, because a shard may fold whenever it likes."""
    ends: Mapping[int, Mapping[int, Sequence[State]]] = field(default_factory=dict)
    """The same at the end of each revision before this one."""
    given_up: int = 0
    """Older history than this was given up, but for snapshots."""
    marks: Mapping[BlockRef, Marks] = field(default_factory=dict)
    """What may tell of a block in some file: everything since it last was deleted."""
    gone: Marks = frozenset()
    """What no file may hold any more."""

    @classmethod
    def new(cls, spec: BankSpec, labels: Mapping[BlockRef, str]) -> BankModel:
        """Return the bank as created."""
        blocks = {ref: _initial(spec, ref) for ref in spec.blocks()}
        return cls(spec, blocks, labels).folded(range(spec.num_partitions))

    # ---- updates

    def push(
        self, update: Update, partitions: Iterable[int] | None = None
    ) -> tuple[BankModel, dict[BlockRef, UpdateResult]]:
        """Apply an update in `partitions` (None = all); a partition applies a request once."""
        model, results = self, dict[BlockRef, UpdateResult]()
        concerned = {self.spec.partition_of(gradient.ref) for gradient in update.gradients}
        for number in sorted(concerned) if partitions is None else partitions:
            mine = [g for g in update.gradients if self.spec.partition_of(g.ref) == number]
            known = model.answers.get((update.request_id, number))
            if known is None:
                model, known = model._apply(update, number, mine)
            results |= {gradient.ref: known[gradient.ref] for gradient in mine}
        return model, results

    def _apply(
        self, update: Update, partition: int, gradients: Sequence[Gradient]
    ) -> tuple[BankModel, dict[BlockRef, UpdateResult]]:
        blocks, marks, gone = dict(self.blocks), dict(self.marks), self.gone
        results = {}
        for gradient in gradients:
            ref, block = gradient.ref, self.blocks[gradient.ref]
            reason = self._refusal(gradient)
            if reason is None:
                assert block.content is not None
                rate = self.spec.levels[ref.level - 1].learning_rate * update.learning_rate_scale
                content = _sgd(block.content, gradient.values, rate, self.spec.optimizer.beta1)
                blocks[ref] = replace(
                    block,
                    version=block.version + 1,
                    step=block.step + 1,
                    updates=block.updates + 1,
                    content=content,
                )
                traces = content.marks() | _marks(gradient.values)
                marks[ref] = marks.get(ref, frozenset()) | traces
                gone -= traces
            else:
                # What was refused was never written, so it needs no deletion to be nowhere.
                gone |= _marks(gradient.values)
            results[ref] = UpdateResult(
                ref=ref, accepted=reason is None, version=blocks[ref].version, reason=reason
            )
        model = replace(self, blocks=blocks, marks=marks, gone=gone)
        if any(result.accepted for result in results.values()):
            answers = {**self.answers, (update.request_id, partition): results}
            folds = {**self.folds, partition: [*self.folds[partition], model._part(partition)]}
            model = replace(model, answers=answers, folds=folds)
        return model, results

    def _refusal(self, gradient: Gradient) -> Reason | None:
        block = self.blocks[gradient.ref]
        lag = block.version - gradient.base_version
        if block.state is WITHHELD:
            return Reason.BLOCK_WITHHELD
        if block.state is DELETED:
            return Reason.BLOCK_DELETED
        if lag < 0:
            return Reason.VERSION_MISMATCH
        if lag > min(self.spec.max_staleness, block.updates):
            return Reason.STALE_VERSION
        return None if np.isfinite(gradient.values).all() else Reason.NOT_FINITE

    # ---- transactions

    def with_content(self, ref: BlockRef, weight: Array, state: BlockState) -> BankModel:
        """Give a block content, with which its optimizer starts afresh."""
        content = Content(weight, _zeros(self.spec, ref))
        return self._with({ref: self.blocks[ref].changed(state=state, step=0, content=content)})

    def labelled(self, topic: BlockRef, label: str) -> BankModel:
        """Give a topic another label; the one before is nowhere from then on."""
        before = {self.labels[topic].encode()} if topic in self.labels else set()
        gone = (self.gone | before) - {label.encode()}
        return replace(self, labels={**self.labels, topic: label}, gone=gone)

    def set_state(self, topic: BlockRef, state: BlockState, only_block: bool = False) -> BankModel:
        """Withhold or restore what is left of a topic."""
        return self._with(
            {
                ref: self.blocks[ref].changed(state=state)
                for ref in self.present(topic, only_block)
                if self.blocks[ref].state is not state
            }
        )

    def delete(self, topic: BlockRef, only_block: bool = False) -> BankModel:
        """Delete a topic: now, and from everything that could be returned to."""
        erased = set(self.present(topic, only_block))
        model = self._with(
            {ref: self.blocks[ref].changed(state=DELETED, step=0, content=None) for ref in erased}
        )

        def without(state: State) -> State:
            return {r: block.erased() if r in erased else block for r, block in state.items()}

        left = {ref: marks for ref, marks in self.marks.items() if ref not in erased}
        topic_refs = {topic} if only_block else set(self.spec.subtree(topic))
        told = {label.encode() for ref, label in self.labels.items() if ref in topic_refs}
        return replace(
            model,
            labels={ref: label for ref, label in self.labels.items() if ref not in topic_refs},
            snapshots={n: replace(s, state=without(s.state)) for n, s in self.snapshots.items()},
            folds={p: [without(state) for state in found] for p, found in self.folds.items()},
            ends={
                revision: {p: [without(s) for s in found] for p, found in parts.items()}
                for revision, parts in self.ends.items()
            },
            marks=left,
            # What was copied is still told by the copy.
            gone=self.gone.union(told, *(self.marks.get(ref, ()) for ref in erased)).difference(
                *left.values()
            ),
        )

    def install(self, pack: Pack) -> BankModel:
        """Import a pack."""
        model = self._with(
            {
                ref: self.blocks[ref].changed(
                    state=ACTIVE, step=packed.step, content=replace(packed.content)
                )
                for ref, packed in pack.blocks.items()
                if packed.content is not None
            }
        )
        told = {label.encode() for label in pack.labels.values()}
        return replace(model, labels={**self.labels, **pack.labels}, gone=model.gone - told)

    def snapshot(self, name: str) -> BankModel:
        """Pin everything under a name."""
        if name in self.snapshots:
            raise Refused(Reason.SNAPSHOT_EXISTS)
        return replace(self, snapshots={**self.snapshots, name: Snapshot(self.blocks)})

    def pinned(self, name: str) -> Snapshot:
        """Return a snapshot."""
        if name not in self.snapshots:
            raise Refused(Reason.UNKNOWN_SNAPSHOT)
        return self.snapshots[name]

    def delete_snapshot(self, name: str) -> BankModel:
        """Give a snapshot up."""
        gone = self.pinned(name)
        return replace(self, snapshots={n: s for n, s in self.snapshots.items() if s is not gone})

    def returned_to(self, past: State, refs: Iterable[BlockRef]) -> BankModel:
        """Return blocks to a state of the past; what is or was deleted since stays as it is."""
        changes = {}
        for ref in refs:
            now, then = self.blocks[ref], past[ref]
            if DELETED in {now.state, then.state}:
                continue
            if (then.content, then.state) != (now.content, now.state):
                changes[ref] = now.changed(state=then.state, step=then.step, content=then.content)
        return self._with(changes)

    def returned_to_end(self, revision: int, refs: Sequence[BlockRef]) -> list[BankModel]:
        """Return blocks to the end of a revision: what may come of it, none twice."""
        models = [self]
        for number in sorted({self.spec.partition_of(ref) for ref in refs}):
            mine = [ref for ref in refs if self.spec.partition_of(ref) == number]
            states = self.ends[revision][number]
            models = [model.returned_to(state, mine) for model in models for state in states]
        return list({tuple(model.blocks.items()): model for model in models}.values())

    # ---- time

    def folded(self, partitions: Iterable[int]) -> BankModel:
        """Return the bank once these partitions were folded."""
        return replace(self, folds={**self.folds, **{p: [self._part(p)] for p in partitions}})

    def committed(self, revision: int, before: BankModel) -> BankModel:
        """Return the bank, made from `before` by one transaction, with the number of that."""
        is_new = self.snapshots.keys() > before.snapshots.keys()
        parts = self.spec.partition_of
        touched = {parts(r) for r in self.blocks if is_new or self.blocks[r] != before.blocks[r]}
        # The revision before ends with what the transaction found there; what it deleted is gone.
        past = replace(self, blocks={**before.blocks, **self._erased_from(before)}).folded(touched)
        return replace(
            self.folded(touched),
            revision=revision,
            ends={**self.ends, before.revision: past.folds},
            snapshots={
                name: replace(s, revision=s.revision or revision)
                for name, s in self.snapshots.items()
            },
        )

    def give_up(self, num_revisions: int) -> BankModel:
        """Let go of the history before the newest revisions, of which one is yet to come."""
        oldest = [*self.ends, self.revision, self.revision + 1][-num_revisions:][0]
        return replace(self, given_up=max(self.given_up, oldest))

    def is_kept(self, revision: int, num_revisions: int) -> bool:
        """Say whether everything can be returned to the end of `revision`, for sure."""
        pinned = {snapshot.revision for snapshot in self.snapshots.values()}
        newest = [*self.ends, self.revision][-num_revisions:]
        return revision in pinned or (revision in newest and revision >= self.given_up)

    # ---- what is asked of it

    def present(self, topic: BlockRef, only_block: bool = False) -> list[BlockRef]:
        """Return the blocks of a topic that are not deleted; there must be one."""
        refs = [topic] if only_block else list(self.spec.subtree(topic))
        left = [ref for ref in refs if self.blocks[ref].state is not DELETED]
        if not left:
            raise Refused(Reason.BLOCK_DELETED)
        return left

    def is_present(self, topic: BlockRef) -> bool:
        """Say whether anything is left of a topic."""
        return any(self.blocks[ref].state is not DELETED for ref in self.spec.subtree(topic))

    def export(self, topic: BlockRef, data: bytes, *, weights_only: bool) -> Pack:
        """Return the pack whose file is `data`."""
        blocks = {ref: self.blocks[ref] for ref in self.present(topic)}
        if weights_only:
            blocks = {
                ref: replace(
                    block,
                    step=0,
                    content=replace(_content(block), momentum=_zeros(self.spec, ref)),
                )
                for ref, block in blocks.items()
            }
        labels = {ref: self.labels[ref] for ref in self.spec.subtree(topic) if ref in self.labels}
        return Pack(data, blocks, labels)

    def changes_to(self, after: BankModel) -> list[tuple[object, ...]]:
        """Return what a report must say of the way from here to `after`."""
        return [
            (ref, old.version, new.version, old.state, new.state)
            for (ref, old), new in zip(self.blocks.items(), after.blocks.values(), strict=True)
            if old.version != new.version
        ]

    def shown_by(self, name: str) -> State:
        """Return what a reader of a snapshot is told: nothing of what is hidden at present."""
        shown = {}
        for ref, then in self.pinned(name).state.items():
            now = self.blocks[ref]
            shown[ref] = then if now.state is ACTIVE else now
        return shown

    def haunted_by(self, other: BankModel) -> BankModel:
        """Return this bank, where what `other` would have written may lie about in some file."""
        refs = self.marks.keys() | other.marks.keys()
        none: Marks = frozenset()
        marks = {ref: self.marks.get(ref, none) | other.marks.get(ref, none) for ref in refs}
        return replace(self, marks=marks, gone=self.gone.difference(*marks.values()))

    def _part(self, partition: int) -> State:
        of = self.spec.partition_of
        return {ref: block for ref, block in self.blocks.items() if of(ref) == partition}

    def _erased_from(self, before: BankModel) -> State:
        return {
            ref: old.erased()
            for ref, old in before.blocks.items()
            if self.blocks[ref].state is DELETED
        }

    def _with(self, changes: Mapping[BlockRef, Block]) -> BankModel:
        marks, gone = dict(self.marks), self.gone
        for ref, block in changes.items():
            if block.content is not None:
                told = block.content.marks()
                marks[ref] = marks.get(ref, frozenset()) | told
                gone -= told
        return replace(self, blocks={**self.blocks, **changes}, marks=marks, gone=gone)


def _initial(spec: BankSpec, ref: BlockRef) -> Block:
    return Block(0, ACTIVE, 0, Content(initial_weight(spec, ref), _zeros(spec, ref)))


def _sgd(content: Content, gradient: Array, rate: float, beta: float) -> Content:
    momentum = content.momentum.astype(np.float32) * np.float32(beta) + gradient.astype(np.float32)
    weight = content.weight.astype(np.float32) - momentum * np.float32(rate)
    return Content(weight.astype(content.weight.dtype), momentum)


def _content(block: Block) -> Content:
    assert block.content is not None
    return block.content


def _zeros(spec: BankSpec, ref: BlockRef) -> Array:
    return np.zeros(spec.block_shape(ref.level), np.float32)


def _marks(*arrays: Array) -> Marks:
    # The beginning alone, so that half of a torn write is found too.
    return frozenset(
        array.tobytes()[:_MARK_BYTES]
        for array in arrays
        if array.any() and np.isfinite(array.astype(np.float32)).all()
    )
