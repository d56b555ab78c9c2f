"""What all rules of the bank machine share: how an operation is run, cut short and found out about, and what
must hold after every step.

An operation may be cut short: by a fault of the storage at some call, or by the death of a shard or of the
coordinator. The machine is in doubt then. Each shard must show the bank either as it was or as it would be;
a restart settles which of the two it is, and a retry with the same request id leads to the same end
whatever had happened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar

import numpy as np
from hypothesis.stateful import RuleBasedStateMachine, invariant

from bank_model import BankModel, Block, Pack, Refused
from bank_rig import BankRig, Disturbance, LocalPlace, MemoryPlace, refs_by_owner
from membank.bank_service.fsck import Severity, check_bank
from membank.bank_service.knowledge import AdminRequest
from membank.bank_service.shard import ShardConfig
from membank.wire.errors import MembankError, Reason, ResourceExhaustedError, UnavailableError
from membank.wire.records import Block as FetchedBlock
from membank.wire.records import TransactionReport, Update, UpdateResult
from membank.wire.spec import (
    Array,
    BankSpec,
    BlockRef,
    BlockState,
    LevelSpec,
    OptimizerKind,
    OptimizerSpec,
    Role,
    dtype_of,
)
from shard_rig import full_tree
from storage_faults import Crash

SPEC = BankSpec(
    name="machine",
    num_layers=1,
    width=4,
    # Powers of two, so that numpy and torch give the same bits.
    levels=(
        LevelSpec(fan_out=3, block_width=1, learning_rate=0.5),
        LevelSpec(fan_out=2, block_width=1, learning_rate=0.25),
    ),
    optimizer=OptimizerSpec(kind=OptimizerKind.SGD, beta1=0.5),
    num_partitions=3,
    # A topic's leaves lie in other partitions than the topic, and on the other shard.
    partition_level=2,
    max_staleness=2,
    init_seed=7,
)
CONFIG = ShardConfig(
    consolidate_bytes=2000,
    segment_bytes=1200,
    resident_bytes=200,
    retained_revisions=3,
    hold_wait_s=0,
)
REFS = tuple(SPEC.blocks())
REMEMBERED = 4
"""Updates, packs and transactions of the past that later steps may come back to."""

Call = Callable[[AdminRequest], Any]
Failure = (Crash, MembankError)
Visible = tuple[int, BlockState, int, tuple[bytes, bytes] | None]
"""Version, state, step, weight and momentum of a block."""


@dataclass(frozen=True)
class Doubt:
    """An operation that was cut short."""

    before: BankModel
    """The bank before it."""
    possible: Sequence[BankModel]
    """The bank as it may be now; of a transaction, the first is the one without it."""
    retry: Callable[[], BankModel]
    """Asks again with the same request id, checks the answer, and says how the bank is then."""
    request_id: str | None = None
    """Of a transaction, by which its record is found."""


class BankMachineCore(RuleBasedStateMachine):
    """A bank, a model of it, and the steps between them."""

    place_type: ClassVar[type[LocalPlace | MemoryPlace]] = LocalPlace
    spec: ClassVar[BankSpec] = SPEC
    config: ClassVar[ShardConfig] = CONFIG
    hits: ClassVar[Counter[str]] = Counter()
    """Steps of all programs of this process, by rule and by what became of it."""

    def __init__(self) -> None:
        super().__init__()
        tree = full_tree(self.spec)
        self.rig = BankRig(self.place_type(), self.spec, tree=tree, config=self.config)
        self.model = BankModel.new(self.rig.spec, tree.labels)
        self.doubt: Doubt | None = None
        self.updates: list[Update] = []
        self.packs: list[tuple[BlockRef, Pack]] = []
        self.answered: list[tuple[str, Call, Any]] = []
        self.readers: list[tuple[Array, bytes]] = []
        self._versions = dict.fromkeys(REFS, 0)
        self._number = 0
        self.hits["programs"] += 1

    def teardown(self) -> None:
        """Stop, and remove the bank."""
        self.rig.close()

    # ---- operations

    def push(self, update: Update, disturbance: Disturbance | None = None) -> None:
        """Send an update, or a part of one, for the first time or again."""
        before = self.model
        partitions = sorted({self.spec.partition_of(g.ref) for g in update.gradients})

        def send() -> BankModel:
            after, expected = before.push(update)
            assert self._send(update) == expected
            return after

        with self.rig.disturbed(disturbance):
            try:
                self.model = send()
            except Failure as err:
                self.require_excuse(err)
                # Each partition takes its part whole or not at all.
                possible = [
                    before.push(update, taken)[0]
                    for count in range(len(partitions) + 1)
                    for taken in combinations(partitions, count)
                ]
                self.doubt = Doubt(before, possible, send)

    def _send(self, update: Update) -> dict[BlockRef, UpdateResult]:
        results: dict[BlockRef, UpdateResult] = {}
        for name, refs in refs_by_owner(self.rig, [g.ref for g in update.gradients]).items():
            part = replace(update, gradients=tuple(g for g in update.gradients if g.ref in refs))
            results |= {result.ref: result for result in self.rig.shard(name).push(part).results}
        return results

    def transact(
        self,
        what: str,
        call: Call,
        predict: Callable[[BankModel], BankModel | list[BankModel]],
        disturbance: Disturbance | None,
        *,
        dry_run: bool = False,
        may_refuse: Reason | None = None,
    ) -> None:
        """Run a transaction that leads to what `predict` says, or to one of that.

        It may be refused for the reason `may_refuse`, if there is one.
        """
        request_id = f"{what}-{self.next_number()}"
        before, refusal = self.model, None
        try:
            found = predict(before)
        except Refused as err:
            found, refusal = before, err.reason
        outcomes = found if isinstance(found, list) else [found]

        def ask() -> BankModel:
            try:
                answer = call(request(request_id))
            except MembankError as err:
                if err.reason not in {refusal, may_refuse}:
                    raise
                return before
            assert refusal is None, f"this should have been refused: {refusal}"
            revision = _revision_of(answer)
            assert revision == self.rig.committed_by(request_id)
            self.answered = [*self.answered, (request_id, call, answer)][-REMEMBERED:]
            reported = [m for m in outcomes if _agrees_with(answer, before, m)]
            return self._seen_of(reported).committed(revision, before)

        if dry_run and not self.rig.down():
            self._try_dry(call, before, outcomes, refusal, may_refuse)
        with self.rig.disturbed(disturbance):
            try:
                self.model = ask()
                if refusal is not None and self._is_disturbed():
                    # It is refused for sure, but something may be left that has to be tidied up.
                    self.doubt = Doubt(before, [before], ask)
            except Failure as err:
                self.require_excuse(err)
                self.doubt = Doubt(before, [before, *outcomes], ask, request_id)
            self.note(what if refusal is None else f"{what}, refused")

    def _try_dry(
        self,
        call: Call,
        before: BankModel,
        outcomes: Sequence[BankModel],
        refusal: Reason | None,
        may_refuse: Reason | None,
    ) -> None:
        try:
            report = call(request("dry", dry_run=True))
        except MembankError as err:
            if err.reason not in {refusal, may_refuse}:
                raise
            return
        assert refusal is None
        assert report.dry_run
        assert report.revision == before.revision
        assert any(_agrees_with(report, before, model) for model in outcomes)

    def disturb(
        self, what: str, disturbance: Disturbance | None, action: Callable[[], object]
    ) -> bool:
        """Do something that changes nothing, whatever happens meanwhile; say whether it was done."""
        with self.rig.disturbed(disturbance):
            try:
                action()
            except Failure as err:
                self.require_excuse(err)
                return False
            finally:
                self.note(what)
        return True

    def resolve(self, names: set[str], retry: bool, disturbance: Disturbance | None) -> None:
        """Start what is down, and ask again or find out what became of the operation."""
        doubt = self.doubt
        assert doubt is not None
        with self.rig.disturbed(disturbance):
            try:
                self.rig.kill(*names)
                self.rig.start()
                model = doubt.retry() if retry else self._find_out(doubt)
            except Failure as err:
                self.require_excuse(err)
            else:
                self.model, self.doubt = model, None
                # Whatever it wrote for nothing may lie about until somebody collects garbage.
                for other in doubt.possible:
                    self.model = self.model.haunted_by(other)
            self.note("retry" if retry else "find out")

    def _find_out(self, doubt: Doubt) -> BankModel:
        self.rig.recover()
        if doubt.request_id is None:
            return self._seen_of(doubt.possible)
        revision = self.rig.committed_by(doubt.request_id)
        if revision is None:
            return self._seen_of(doubt.possible[:1])
        return self._seen_of(doubt.possible[1:]).committed(revision, doubt.before)

    def _seen_of(self, possible: Sequence[BankModel]) -> BankModel:
        """Return which of the models it is that the shards show."""
        up = self.rig.shards
        found = [m for m in possible if all(self._seen(n) == self._expected(n, m) for n in up)]
        assert found, "the bank shows none of what is possible"
        return found[0]

    def _is_disturbed(self) -> bool:
        return self.rig.was_disturbed or bool(self.rig.down())

    def require_excuse(self, err: BaseException) -> None:
        """Raise `err` unless a fault or a process that is down explains it."""
        explained = isinstance(err, Crash | UnavailableError | ResourceExhaustedError)
        if not (explained and self._is_disturbed()):
            raise err

    # ---- what must hold after every step

    @invariant()
    def every_block_is_as_expected(self) -> None:
        """Versions, states, steps and bytes agree, on every shard that runs."""
        possible = self.doubt.possible if self.doubt is not None else [self.model]
        for name in self.rig.shards:
            seen = self._seen(name)
            expected = [self._expected(name, model) for model in possible]
            assert seen in expected, f"{name} shows\n{seen}\ninstead of one of\n{expected}"
            for ref, (version, *_) in seen.items():
                assert version >= self._versions[ref], f"the version of {ref} has decreased"
                self._versions[ref] = version

    @invariant()
    def every_snapshot_is_as_it_was(self) -> None:
        """Who reads a snapshot sees the same for ever, less what is hidden at present."""
        if self.doubt is not None:
            return
        for snapshot in self.model.snapshots:
            shown = self.model.shown_by(snapshot)
            for name, shard in self.rig.shards.items():
                found = shard.fetch(self._refs_of(name), snapshot=snapshot)
                for block in found.blocks:
                    self.check_fetched(block, shown[block.ref])

    @invariant()
    def what_was_fetched_stays(self) -> None:
        """Nobody changes an array that a reader holds."""
        for array, held in self.readers:
            assert array.tobytes() == held

    @invariant()
    def nothing_deleted_is_in_any_file(self) -> None:
        """No file holds content, optimizer state, gradients or labels of what was deleted."""
        if self.doubt is None and self.model.gone:
            for path, data in self.rig.place.files().items():
                for mark in self.model.gone:
                    assert mark not in data, f"{path} holds {mark!r}, which was deleted"

    @invariant()
    def nothing_is_damaged(self) -> None:
        """A check of the files finds nothing wrong, and nothing to repair where nothing is open."""
        report = check_bank(self.rig.objects, journal_dir=self.rig.place.journals)
        bad = {Severity.DAMAGE} if self.doubt is not None else set(Severity) - {Severity.NOTE}
        found = [finding for finding in report.findings if finding.severity in bad]
        assert not found, found

    def check_fetched(
        self, block: FetchedBlock, expected: Block, *, held: int | None = None, dtype: str = ""
    ) -> None:
        """Check a block as fetched by somebody who holds version `held`."""
        is_active = expected.state is BlockState.ACTIVE
        unchanged = is_active and held == expected.version
        header = block.header
        assert (header.version, header.state) == (expected.version, expected.state), block.ref
        assert header.unchanged == unchanged
        if not is_active or unchanged or expected.content is None:
            assert block.weight is None
            return
        assert block.weight is not None
        weight = expected.content.weight.astype(dtype_of(dtype or self.spec.dtype)).tobytes()
        assert block.weight.tobytes() == weight
        self.readers = [*self.readers, (block.weight, weight)][-2 * REMEMBERED :]

    def _seen(self, name: str) -> dict[BlockRef, Visible]:
        refs, shard = self._refs_of(name), self.rig.shard(name)
        contents: Mapping[BlockRef, tuple[bytes, bytes]] = {
            content.ref: (
                content.weight.tobytes(),
                content.optimizer_state[Role.MOMENTUM].tobytes(),
            )
            for content in shard.read(refs)
        }
        return {
            s.ref: (s.version, s.state, s.step, contents.get(s.ref)) for s in shard.describe(refs)
        }

    def _expected(self, name: str, model: BankModel) -> dict[BlockRef, Visible]:
        return {ref: _visible(model.blocks[ref]) for ref in self._refs_of(name)}

    def _refs_of(self, name: str) -> list[BlockRef]:
        return [ref for ref in REFS if self.rig.owner_of(ref) == name]

    # ---- small things

    def next_number(self) -> int:
        """Return a number that this program has not used."""
        self._number += 1
        return self._number

    def array(self, ref: BlockRef, dtype: Any = np.float32) -> Array:
        """Return content for a block, or a gradient, that this program has not used."""
        rng = np.random.default_rng((self.next_number(), *ref))
        return rng.standard_normal(self.spec.block_shape(ref.level)).astype(dtype)

    def note(self, what: str) -> None:
        """Count a step, by what became of it."""
        self.hits["steps"] += 1
        outcome = "in doubt" if self.doubt is not None else "done"
        if self.rig.was_disturbed:
            outcome += " after a fault"
        self.hits[f"{what}: {outcome}"] += 1


def aimed_at(disturbance: Disturbance | None, *names: str) -> Disturbance | None:
    """Return the disturbance, of one of these processes if it would miss them all."""
    if disturbance is None or disturbance.victim in names:
        return disturbance
    return replace(disturbance, victim=names[0])


def request(request_id: str, *, dry_run: bool = False) -> AdminRequest:
    """Return a request."""
    return AdminRequest(request_id=request_id, principal="alice", dry_run=dry_run)


def _revision_of(answer: Any) -> int:
    # Of a snapshot that was given up: the snapshot, and the revision after it.
    return int(answer[1] if isinstance(answer, tuple) else answer.revision)


def _agrees_with(answer: Any, before: BankModel, after: BankModel) -> bool:
    if not isinstance(answer, TransactionReport):
        return True
    reported = [
        (c.ref, c.version_before, c.version_after, c.state_before, c.state_after)
        for c in answer.changes
    ]
    return reported == before.changes_to(after)


def _visible(block: Block) -> Visible:
    found = block.content
    content = None if found is None else (found.weight.tobytes(), found.momentum.tobytes())
    return block.version, block.state, block.step, content
