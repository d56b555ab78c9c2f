"""Random programs on a shard against a dict: every answer and every byte must agree."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.content import Content, initial_content, zero_state
from membank.bank_service.shard.contract import (
    BlockOperation,
    Erase,
    RestoreEntry,
    SetContent,
    SetState,
)
from membank.bank_service.shard.optimizer import BlockOptimizer
from membank.wire.errors import NotFoundError, Reason
from membank.wire.records import Gradient, Update
from membank.wire.spec import Array, BlockRef, BlockState, Role
from tiny_bank import commit_record, create_bank, gradient_for, tiny_spec

SPEC = tiny_spec(max_staleness=2)
REFS = (BlockRef(1, 0), BlockRef(1, 1), BlockRef(1, 2), BlockRef(2, 5))
some_refs = st.lists(st.sampled_from(REFS), min_size=1, max_size=3, unique=True)
seeds = st.integers(0, 5)


@dataclass(frozen=True)
class Expected:
    """What the model knows of one block."""

    version: int
    state: BlockState
    step: int
    content: Content | None
    updates: int = 0


def _initial(ref: BlockRef) -> Expected:
    content = initial_content(SPEC, ref)
    full = Content({**content.arrays, **zero_state(SPEC, ref)}, content.weight_crc)
    return Expected(0, BlockState.ACTIVE, 0, full)


def _weight(ref: BlockRef, seed: int) -> Array:
    return np.full(SPEC.block_shape(ref.level), seed + 0.5, np.float32)


class ShardMachine(RuleBasedStateMachine):
    """A shard that is used, stopped and killed, beside a dict that says what it must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.model = {ref: _initial(ref) for ref in REFS}
        self.pinned: dict[int, dict[BlockRef, Expected]] = {}
        self.last_push: tuple[Update, list[tuple[bool, int, Reason | None]]] | None = None
        self.num_requests = 0

    @initialize()
    def create(self) -> None:
        """Start with an empty bank."""
        self.bank = create_bank(self.root, SPEC)
        self.shard = self._open()

    def _open(self) -> Shard:
        config = ShardConfig(
            consolidate_bytes=6000,
            segment_bytes=2000,
            resident_bytes=2000,
            retained_revisions=3,
            hold_wait_s=0,
        )
        return Shard.open(self.bank, config=config)

    @rule(refs=some_refs, lag=st.integers(-1, 3), seed=seeds)
    def push(self, refs: list[BlockRef], lag: int, seed: int) -> None:
        """Push gradients whose base is some versions old, or one too new."""
        update = Update(
            request_id=f"r{self.num_requests}",
            step=seed,
            gradients=tuple(
                Gradient(
                    ref=ref,
                    base_version=max(self.model[ref].version - lag, 0),
                    values=gradient_for(SPEC, ref, seed),
                )
                for ref in refs
            ),
        )
        self.num_requests += 1
        expected = [self._expect_update(gradient) for gradient in update.gradients]
        result = self.shard.push(update)
        assert [(r.accepted, r.version, r.reason) for r in result.results] == expected
        assert not result.duplicate
        by_partition: dict[int, list[bool]] = {}
        for ref, (accepted, _, _) in zip(refs, expected, strict=True):
            by_partition.setdefault(SPEC.partition_of(ref), []).append(accepted)
        # A refusal is remembered with what was accepted beside it; alone it is decided afresh.
        remembered = all(any(accepted) for accepted in by_partition.values())
        self.last_push = (update, expected) if remembered else None

    @rule()
    def retry(self) -> None:
        """Send the last update again."""
        if self.last_push is not None:
            update, expected = self.last_push
            result = self.shard.push(update)
            assert [(r.accepted, r.version, r.reason) for r in result.results] == expected
            assert result.duplicate

    def _expect_update(self, gradient: Gradient) -> tuple[bool, int, Reason | None]:
        block = self.model[gradient.ref]
        lag = block.version - gradient.base_version
        reason = None
        if block.state is BlockState.WITHHELD:
            reason = Reason.BLOCK_WITHHELD
        elif block.state is BlockState.DELETED:
            reason = Reason.BLOCK_DELETED
        elif lag < 0:
            reason = Reason.VERSION_MISMATCH
        elif lag > min(SPEC.max_staleness, block.updates):
            reason = Reason.STALE_VERSION
        if reason is not None:
            return (False, block.version, reason)
        assert block.content is not None
        after = BlockOptimizer(SPEC).apply(
            gradient.ref.level, block.content.arrays, block.step, gradient.values, 1.0
        )
        assert after is not None
        self.model[gradient.ref] = Expected(
            block.version + 1, block.state, block.step + 1, Content(after, 0), block.updates + 1
        )
        return (True, block.version + 1, None)

    @rule(refs=some_refs, kinds=st.lists(st.integers(0, 4), min_size=3, max_size=3),
          seed=seeds, ending=st.sampled_from(["commit", "commit", "abort", "die", "die-after"]))  # fmt: skip
    def transact(self, refs: list[BlockRef], kinds: list[int], seed: int, ending: str) -> None:
        """Run a transaction to its end, or let the shard die before or after the decision."""
        after = dict(self.model)
        operations: list[BlockOperation] = []
        for ref, kind in zip(refs, kinds, strict=False):
            operation, block = self._operation(ref, kind, seed)
            operations.append(operation)
            after[ref] = block
        revision = self.bank.latest_number() + 1
        prepared = self.shard.prepare(revision, operations, all_partitions=True)
        assert {change.ref for change in prepared.changes} == {
            ref for ref in REFS if after[ref].version != self.model[ref].version
        }
        if ending == "abort":
            self.shard.abort(revision)
            return
        if ending == "die":
            self.shard.close(consolidate=False)
            self.shard = self._open()
        record = self.bank.decide(commit_record(self.bank, revision, prepared))
        if ending == "die-after":
            self.shard.close(consolidate=False)
            self.shard = self._open()
        self.shard.commit(record)
        self.model = after
        self.pinned[revision] = dict(after)
        self._forget_deleted()

    def _operation(self, ref: BlockRef, kind: int, seed: int) -> tuple[BlockOperation, Expected]:
        block = self.model[ref]
        new = replace(block, version=block.version + 1, updates=0)
        is_deleted = block.state is BlockState.DELETED
        if kind == 0:
            weight = _weight(ref, seed)
            content = Content({Role.WEIGHT: weight, **zero_state(SPEC, ref)}, 0)
            return SetContent(ref=ref, weight=weight, expected_version=block.version), replace(
                new, content=content, step=0, state=BlockState.ACTIVE
            )
        if kind in (1, 2):
            state = BlockState.WITHHELD if kind == 1 else BlockState.ACTIVE
            same = is_deleted or block.state is state
            return SetState(ref=ref, state=state), block if same else replace(new, state=state)
        if kind == 3:
            gone = Expected(block.version + 1, BlockState.DELETED, 0, None)
            return Erase(ref=ref), block if is_deleted else gone
        revision = self._restorable()
        if revision is None:
            return SetState(ref=ref, state=block.state), block
        number = self.bank.named_manifest(revision, SPEC.partition_of(ref))
        target = self.pinned[revision][ref]
        if is_deleted or target.state is BlockState.DELETED or self._is_same(ref, number, block):
            return RestoreEntry(ref=ref, manifest=number), block
        return RestoreEntry(ref=ref, manifest=number), replace(
            new, content=target.content, step=target.step, state=target.state
        )

    def _restorable(self) -> int | None:
        promised = max(history.history_from for history in self.shard.history())
        kept = [
            revision
            for revision in sorted(self.pinned)
            if revision > self.bank.latest_commit().revision - 2 and revision >= promised
        ]
        return kept[0] if kept else None

    def _is_same(self, ref: BlockRef, number: int, block: Expected) -> bool:
        """Say whether nothing but the version separates the block from a manifest's."""
        self.shard.consolidate()
        partition = SPEC.partition_of(ref)
        (history,) = (h for h in self.shard.history() if h.partition == partition)
        # Not the greatest number: an owner may have come between preparation and commit.
        newest = self.bank.read_manifest(partition, history.end_of(self.shard.revision))
        then = self.bank.read_manifest(partition, number).entries.get(ref)
        now = newest.entries.get(ref)
        if then is None or now is None:
            return (
                then is None
                and (now is None or not now.crcs)
                and (block.state is BlockState.ACTIVE)
            )
        return (then.slot, then.crcs, then.step, then.state) == (
            now.slot, now.crcs, now.step, now.state)  # fmt: skip

    def _forget_deleted(self) -> None:
        # What was deleted is gone from every revision.
        for ref, block in self.model.items():
            if block.state is BlockState.DELETED:
                for state in self.pinned.values():
                    state[ref] = block

    @rule()
    def consolidate(self) -> None:
        """Fold the journals."""
        self.shard.consolidate()

    @rule(partition=st.integers(0, SPEC.num_partitions - 1), give_up=st.booleans())
    def collect(self, partition: int, give_up: bool) -> None:
        """Remove what nothing needs; a second look finds nothing more."""
        history_from = self.bank.latest_commit().revision if give_up else 0
        found = self.shard.collect(partition, history_from=history_from)
        assert found.is_complete
        assert found.history_from >= history_from
        assert self.shard.collect(partition).garbage == ()

    @rule(consolidate=st.booleans())
    def restart(self, consolidate: bool) -> None:
        """Stop the shard, or kill it, and start it again."""
        self.shard.close(consolidate=consolidate)
        self.shard = self._open()

    @rule(refs=some_refs)
    def restore_of_the_unknown_is_refused(self, refs: list[BlockRef]) -> None:
        """A manifest that does not exist changes nothing."""
        try:
            self.shard.prepare(
                self.bank.latest_number() + 1, [RestoreEntry(ref=refs[0], manifest=999_999)]
            )
        except NotFoundError:
            return
        raise AssertionError("a manifest that does not exist was accepted")

    @invariant()
    def every_block_is_as_expected(self) -> None:
        """Versions, states, steps and bytes agree."""
        found = {content.ref: content for content in self.shard.read(REFS)}
        for status in self.shard.describe(REFS):
            block = self.model[status.ref]
            assert (status.version, status.state, status.step) == (
                block.version, block.state, block.step)  # fmt: skip
            if block.content is None:
                assert status.ref not in found
                continue
            content = found[status.ref]
            arrays = {Role.WEIGHT: content.weight, **content.optimizer_state}
            for role, array in block.content.arrays.items():
                assert arrays[role].tobytes() == array.tobytes()
        for fetched in self.shard.fetch(REFS).blocks:
            assert (fetched.weight is None) == (
                self.model[fetched.ref].state is not BlockState.ACTIVE
            )

    def teardown(self) -> None:
        """Stop and tidy up."""
        if hasattr(self, "shard"):
            self.shard.close()
        shutil.rmtree(self.root)


TestShardMachine = ShardMachine.TestCase
# A program takes a tenth of a second; the profiles' counts are for cheaper examples.
TestShardMachine.settings = settings(
    max_examples=max(10, (settings.default or settings()).max_examples // 10),
    stateful_step_count=25,
)
