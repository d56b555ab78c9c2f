"""Random programs on a whole bank: one rule for each thing that somebody may do, or that may happen."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from bank_machine_admin import (
    NAMES,
    AdminRules,
    indices,
    maybe,
    some_refs,
    sure,
    sure_and_up,
    topics,
)
from bank_machine_core import CONFIG, REMEMBERED, SPEC, aimed_at, request
from bank_model import Refused
from bank_rig import PROCESSES, SHARDS, Disturbance, MemoryPlace, refs_by_owner
from membank.bank_service.shard.config import Durability
from membank.wire.errors import MembankError, Reason
from membank.wire.records import Gradient, Update
from membank.wire.spec import DTYPES, BlockRef

durabilities = st.sampled_from([Durability.PROCESS, Durability.STORE])
processes = st.sets(st.sampled_from(PROCESSES), max_size=3)
in_doubt = precondition(lambda self: self.doubt is not None)


class BankMachine(AdminRules):
    """A bank in a directory."""

    @initialize(refs=some_refs, topic=topics, is_new=st.booleans())
    def begin(self, refs: list[BlockRef], topic: BlockRef, is_new: bool) -> None:
        """Start with a new bank, or with one that has some past already."""
        if not is_new:
            self.train(refs=refs, count=2)
            self.snapshot(name=NAMES[0], disturbance=None)
            self.export(topic=topic, weights_only=False)
            self.train(refs=refs, count=2)

    # ---- updates

    @sure
    @rule(refs=some_refs, lag=st.sampled_from([0, 0, 1, 2, 3, -1]),
          scale=st.sampled_from([1.0, 0.5]), is_finite=st.booleans(), disturbance=maybe)  # fmt: skip
    def push_gradients(
        self,
        refs: list[BlockRef],
        lag: int,
        scale: float,
        is_finite: bool,
        disturbance: Disturbance | None,
    ) -> None:
        """Push gradients whose base is some versions old, or one too new."""
        update = self._update(refs, lag=lag, scale=scale)
        if not is_finite and len(refs) > 1:
            update.gradients[-1].values.flat[0] = np.inf
        owners = refs_by_owner(self.rig, refs)
        self.push(update, aimed_at(disturbance, *owners))
        self.note("push")

    @sure_and_up
    @rule(refs=some_refs, count=st.integers(2, 6))
    def train(self, refs: list[BlockRef], count: int) -> None:
        """Push as often as it takes to fill segments and journals."""
        for _ in range(count):
            self.push(self._update(refs))
        self.note("train")

    @precondition(lambda self: self.doubt is None and self.updates)
    @rule(index=indices, num_refs=st.integers(1, 3), disturbance=maybe)
    def push_again(self, index: int, num_refs: int, disturbance: Disturbance | None) -> None:
        """Send an update again, or a part of it, however long ago it was answered."""
        update = self.updates[index % len(self.updates)]
        part = replace(update, gradients=update.gradients[:num_refs])
        self.push(part, aimed_at(disturbance, *SHARDS))
        self.note("push again")

    def _update(self, refs: list[BlockRef], *, lag: int = 0, scale: float = 1.0) -> Update:
        number = self.next_number()
        versions = {ref: self.model.blocks[ref].version for ref in refs}
        update = Update(
            request_id=f"update-{number}",
            step=number,
            gradients=tuple(
                Gradient(ref=ref, base_version=max(versions[ref] - lag, 0), values=self.array(ref))
                for ref in refs
            ),
            learning_rate_scale=scale,
        )
        self.updates = [*self.updates, update][-REMEMBERED:]
        return update

    # ---- reads

    @sure
    @rule(refs=some_refs, lag=st.none() | st.integers(0, 2), dtype=st.sampled_from(sorted(DTYPES)),
          ahead=st.sampled_from([0, 0, 0, 1]), name=st.sampled_from(["", *NAMES]))  # fmt: skip
    def fetch(
        self, refs: list[BlockRef], lag: int | None, dtype: str, ahead: int, name: str
    ) -> None:
        """Fetch blocks of which some version is held, as they are or as a snapshot pins them."""
        refusal, shown, revision = None, self.model.blocks, self.model.revision
        minimum = revision + ahead
        if name:
            try:
                revision = self.model.pinned(name).revision
                shown = self.model.shown_by(name)
            except Refused as err:
                refusal = err.reason
        if ahead:
            refusal = Reason.BEHIND_REVISION
        for owner, mine in refs_by_owner(self.rig, refs).items():
            if not self.rig.is_up(owner):
                continue
            held = [None if lag is None else max(shown[ref].version - lag, 0) for ref in mine]
            try:
                found = self.rig.shard(owner).fetch(
                    mine, held_versions=held, dtype=dtype, min_revision=minimum, snapshot=name
                )
            except MembankError as err:
                if err.reason is not refusal:
                    raise
                continue
            assert refusal is None
            assert found.revision == revision
            for block, version in zip(found.blocks, held, strict=True):
                self.check_fetched(block, shown[block.ref], held=version, dtype=dtype)
        self.note("fetch")

    @sure_and_up
    @rule(topic=st.none() | topics)
    def look(self, topic: BlockRef | None) -> None:
        """List topics, snapshots and the revisions that can be returned to."""
        operations, model = self.rig.operations, self.model
        found, revision = operations.list_topics(topic)
        assert revision == model.revision
        assert [(t.ref, t.label, t.state, t.version, t.step) for t in found] == [
            (ref, model.labels.get(ref, ""), block.state, block.version, block.step)
            for ref in self.below(topic)
            for block in [model.blocks[ref]]
        ]
        assert {s.name: s.revision for s in operations.list_snapshots()} == {
            name: snapshot.revision for name, snapshot in model.snapshots.items()
        }
        listed = [record.revision for record in operations.audit(99, retained_only=True)]
        kept = [r for r in model.ends if model.is_kept(r, self.config.retained_revisions)]
        assert set(kept) <= set(listed) <= model.ends.keys()
        for revision in listed:
            operations.rollback(request("dry", dry_run=True), revision)
        self.note("look")

    # ---- life and death

    @sure
    @rule(name=st.sampled_from(SHARDS), disturbance=maybe)
    def consolidate(self, name: str, disturbance: Disturbance | None) -> None:
        """Fold the journals of a shard."""
        is_up = self.rig.is_up(name)
        done = self.disturb(
            "consolidate",
            aimed_at(disturbance, name),
            lambda: self.rig.shard(name).consolidate() if is_up else None,
        )
        if done and is_up:
            self.model = self.model.folded(self.rig.partitions_of(name))

    @sure
    @rule(name=st.sampled_from(SHARDS), consolidate=st.booleans(), durability=durabilities,
          disturbance=maybe)  # fmt: skip
    def restart(
        self,
        name: str,
        consolidate: bool,
        durability: Durability,
        disturbance: Disturbance | None,
    ) -> None:
        """Stop a shard properly and start it again, perhaps with another kind of journal."""

        def restart() -> None:
            if self.rig.is_up(name):
                self.rig.stop(name, consolidate=consolidate)
            self.rig.set_durability(name, durability)
            self.rig.start_shard(name)

        self.disturb("restart", aimed_at(disturbance, name), restart)

    @sure
    @rule(names=processes, start=st.booleans(), disturbance=maybe)
    def kill(self, names: set[str], start: bool, disturbance: Disturbance | None) -> None:
        """Kill processes; start all that are down, or leave them so for a while."""
        self.rig.kill(*names)
        self.disturb("kill", disturbance, self.rig.start if start else lambda: None)

    @precondition(lambda self: any(map(self.rig.can_lose_machine_of, SHARDS)))
    @rule(disturbance=maybe)
    def lose_machine(self, disturbance: Disturbance | None) -> None:
        """Lose the machine of a shard that keeps its journal in the bank's own storage."""
        name = next(filter(self.rig.can_lose_machine_of, SHARDS))
        self.rig.lose_machine_of(name)
        self.disturb(
            "lose a machine", aimed_at(disturbance, name), lambda: self.rig.start_shard(name)
        )

    @in_doubt
    @rule(what=st.sampled_from(["kill", "restart", "consolidate", "settle"]),
          name=st.sampled_from(SHARDS), disturbance=maybe)  # fmt: skip
    def happen(self, what: str, name: str, disturbance: Disturbance | None) -> None:
        """Let something happen to a shard before anybody settles the matter."""

        def happen() -> None:
            if what == "kill" or not self.rig.is_up(name):
                self.rig.kill(name)
                self.rig.start_shard(name)
            elif what == "restart":
                self.rig.stop(name, consolidate=True)
                self.rig.start_shard(name)
            elif what == "consolidate":
                self.rig.shard(name).consolidate()
            else:
                self.rig.shard(name).settle(math.inf)

        self.disturb(what, aimed_at(disturbance, name), happen)

    @in_doubt
    @rule(names=processes, retry=st.booleans(), disturbance=maybe)
    def end_doubt(self, names: set[str], retry: bool, disturbance: Disturbance | None) -> None:
        """Start what is down, and ask again or find out what became of the operation."""
        self.resolve(names, retry, disturbance)

    @in_doubt
    @rule(retry=st.booleans())
    def end_doubt_in_peace(self, retry: bool) -> None:
        """The same, undisturbed."""
        self.resolve(set(), retry, None)


class ObjectBankMachine(BankMachine):
    """The same in an object storage, journals too, in bfloat16, with topics in one partition."""

    place_type = MemoryPlace
    spec = replace(SPEC, dtype="bfloat16", partition_level=1)
    config = replace(CONFIG, durability=Durability.STORE)
