"""Rules of the bank machine: everything that an operator may ask of a bank."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from bank_machine_core import REFS, REMEMBERED, BankMachineCore, Doubt, Failure, request
from bank_model import BankModel
from bank_model_steps import applied
from bank_rig import PROCESSES, Disturbance
from membank.bank_service.knowledge import AdminRequest
from membank.wire.errors import MembankError, Reason
from membank.wire.records import TransactionReport
from membank.wire.spec import BlockRef
from membank.wire.steps import Combine, Delete, Place, Restore, Step, Swap, Withhold
from storage_faults import StorageFault

NAMES = ("red", "green", "blue")

some_refs = st.lists(st.sampled_from(REFS), min_size=1, max_size=3, unique=True)
topics = st.sampled_from(REFS)
indices = st.integers(0, REMEMBERED - 1)
faults = st.builds(
    Disturbance,
    st.sampled_from(PROCESSES),
    st.sampled_from(StorageFault),
    st.integers(1, 3) | st.integers(1, 12),
)
maybe = st.none() | faults

sure = precondition(lambda self: self.doubt is None)
"""For a step that would make a second doubt of one."""
sure_and_up = precondition(lambda self: self.doubt is None and not self.rig.down())
sure_and_pinned = precondition(lambda self: self.doubt is None and self.model.snapshots)


expectations = st.sampled_from(["any", "any", "right", "right", "wrong"])
factors = st.sampled_from([0.0, 0.0, 1.0, 0.5, -1.0, 2.0])
DrawnStep = tuple[str, BlockRef, BlockRef, float, float, bool]
some_step = st.tuples(
    st.sampled_from(["swap", "combine", "combine", "withhold", "restore", "delete", "place"]),
    topics,
    topics,
    factors,
    factors,
    st.booleans(),
)


class AdminRules(BankMachineCore):
    """A bank whose operator does whatever comes to mind."""

    @sure
    @rule(refs=some_refs, expect=expectations, dry_run=st.booleans(), disturbance=maybe)
    def swap(
        self, refs: list[BlockRef], expect: str, dry_run: bool, disturbance: Disturbance | None
    ) -> None:
        """Replace blocks, if they have the expected version."""
        steps = [
            Swap(
                ref=ref,
                weight=self.array(ref, self.spec.numpy_dtype),
                expected_version=self.expected(ref, expect),
            )
            for ref in refs
        ]
        self.apply("swap", steps, disturbance, dry_run=dry_run)

    @sure
    @rule(ref=topics, other=st.none() | topics, keep=factors, add=factors, expect=expectations,
          expect_other=expectations, dry_run=st.booleans(), disturbance=maybe)  # fmt: skip
    def combine(
        self,
        ref: BlockRef,
        other: BlockRef | None,
        keep: float,
        add: float,
        expect: str,
        expect_other: str,
        dry_run: bool,
        disturbance: Disturbance | None,
    ) -> None:
        """Compute a block from itself and another, wherever that lies."""
        step = Combine(
            ref=ref,
            keep=keep,
            other=other,
            add=0.0 if other is None else add,
            expected_version=self.expected(ref, expect),
            expected_other_version=None if other is None else self.expected(other, expect_other),
        )
        self.apply("combine", [step], disturbance, dry_run=dry_run)

    @sure
    @rule(topic=topics, change=st.sampled_from([Withhold, Restore, Delete]),
          only_block=st.booleans(), dry_run=st.booleans(), disturbance=maybe)  # fmt: skip
    def change_topic(
        self,
        topic: BlockRef,
        change: type[Withhold | Restore | Delete],
        only_block: bool,
        dry_run: bool,
        disturbance: Disturbance | None,
    ) -> None:
        """Hide a topic or its block, show it again, or destroy it."""
        step = change(topic=topic, only_block=only_block)
        self.apply(change.kind, [step], disturbance, dry_run=dry_run)

    @sure
    @rule(drawn=st.lists(some_step, min_size=2, max_size=4), dry_run=st.booleans(),
          disturbance=maybe)  # fmt: skip
    def apply_steps(
        self, drawn: list[DrawnStep], dry_run: bool, disturbance: Disturbance | None
    ) -> None:
        """Do several things at once."""
        steps = [self.step(*one) for one in drawn]
        self.apply("steps", steps, disturbance, dry_run=dry_run)

    def step(
        self,
        kind: str,
        ref: BlockRef,
        other: BlockRef,
        keep: float,
        add: float,
        flag: bool,
    ) -> Step:
        match kind:
            case "swap":
                return Swap(ref=ref, weight=self.array(ref, self.spec.numpy_dtype))
            case "combine":
                return Combine(ref=ref, keep=keep, other=other, add=add)
            case "withhold":
                return Withhold(topic=ref, only_block=flag)
            case "restore":
                return Restore(topic=ref, only_block=flag)
            case "delete":
                return Delete(topic=ref, only_block=flag)
            case _:
                if flag:
                    return Place(topic=ref, remove_centroid=True)
                return Place(topic=ref, label=f"placed as {self.next_number():06}")

    def apply(
        self,
        what: str,
        steps: Sequence[Step],
        disturbance: Disturbance | None,
        *,
        dry_run: bool,
    ) -> None:
        """Run a transaction of steps."""
        self.transact(
            what,
            lambda asked: self.rig.operations.apply(asked, steps).report,
            lambda model: applied(model, steps),
            disturbance,
            dry_run=dry_run,
        )

    def expected(self, ref: BlockRef, expect: str) -> int | None:
        """Return a version to expect of a block."""
        if expect == "any":
            return None
        return self.model.blocks[ref].version + (expect == "wrong")

    @sure_and_up
    @rule(topic=topics, weights_only=st.booleans())
    def export(self, topic: BlockRef, weights_only: bool) -> None:
        """Take a topic out as a pack."""
        try:
            with self.rig.operations.export_topic(topic, weights_only=weights_only) as exported:
                data = exported.data
            pack = self.model.export(topic, data, weights_only=weights_only)
        except MembankError as err:
            if err.reason is not Reason.BLOCK_DELETED or self.model.is_present(topic):
                raise
            return
        self.packs = [*self.packs, (topic, pack)][-REMEMBERED:]
        self.note("export")

    @precondition(lambda self: self.doubt is None and self.packs)
    @rule(index=indices, dry_run=st.booleans(), disturbance=maybe)
    def install(self, index: int, dry_run: bool, disturbance: Disturbance | None) -> None:
        """Import a pack that was exported some time ago."""
        topic, pack = self.packs[index % len(self.packs)]

        def call(asked: AdminRequest) -> TransactionReport:
            report, found = self.rig.operations.import_topic(asked, pack.data)
            assert found == topic
            return report

        self.transact(
            "import", call, lambda model: model.install(pack), disturbance, dry_run=dry_run
        )

    @sure
    @rule(name=st.sampled_from(NAMES), disturbance=maybe)
    def snapshot(self, name: str, disturbance: Disturbance | None) -> None:
        """Pin the bank as it is."""
        self.transact(
            "snapshot",
            lambda asked: self.rig.operations.create_snapshot(asked, name),
            lambda model: model.snapshot(name),
            disturbance,
        )

    @sure_and_pinned
    @rule(index=indices, disturbance=maybe)
    def delete_snapshot(self, index: int, disturbance: Disturbance | None) -> None:
        """Give a snapshot up."""
        name = self.pick_snapshot(index)
        self.transact(
            "delete snapshot",
            lambda asked: self.rig.operations.delete_snapshot(asked, name),
            lambda model: model.delete_snapshot(name),
            disturbance,
        )

    @sure_and_pinned
    @rule(index=indices, topic=st.none() | topics, only_block=st.booleans(),
          dry_run=st.booleans(), disturbance=maybe)  # fmt: skip
    def rollback(
        self,
        index: int,
        topic: BlockRef | None,
        only_block: bool,
        dry_run: bool,
        disturbance: Disturbance | None,
    ) -> None:
        """Return a block, a topic or everything to a snapshot."""
        name, only_block = self.pick_snapshot(index), only_block and topic is not None
        refs = self.below(topic, only_block)
        self.transact(
            "rollback",
            lambda asked: self.rig.operations.rollback(asked, name, topic, only_block=only_block),
            lambda model: model.returned_to(model.pinned(name).state, refs),
            disturbance,
            dry_run=dry_run,
        )

    @precondition(lambda self: self.doubt is None and self.model.ends)
    @rule(back=st.sampled_from([0, 0, 1, 1, 2, 3, 5]), topic=st.none() | topics,
          only_block=st.booleans(), dry_run=st.booleans(), disturbance=maybe)  # fmt: skip
    def rollback_to_revision(
        self,
        back: int,
        topic: BlockRef | None,
        only_block: bool,
        dry_run: bool,
        disturbance: Disturbance | None,
    ) -> None:
        """Return a block, a topic or everything to the end of a revision."""
        revisions = [*self.model.ends][::-1]
        revision = revisions[back % len(revisions)]
        only_block = only_block and topic is not None
        refs = self.below(topic, only_block)

        is_kept = self.model.is_kept(revision, self.config.retained_revisions)
        self.transact(
            "rollback to revision",
            lambda asked: self.rig.operations.rollback(
                asked, revision, topic, only_block=only_block
            ),
            lambda model: model.returned_to_end(revision, refs),
            disturbance,
            dry_run=dry_run,
            # What nobody promised may still be there; then it must be right all the same.
            may_refuse=None if is_kept else Reason.UNKNOWN_REVISION,
        )

    @sure
    @rule(keep=st.none() | st.integers(1, 3), disturbance=maybe)
    def collect_garbage(self, keep: int | None, disturbance: Disturbance | None) -> None:
        """Remove what nothing needs: all of it, and nothing else."""
        before = self.model
        after = before if keep is None else before.give_up(keep)
        request_id = f"gc-{self.next_number()}"

        def collect() -> BankModel:
            self.rig.operations.collect_garbage(request(request_id), keep_revisions=keep)
            revision = self.rig.committed_by(request_id)
            return after if revision is None else after.committed(revision, before)

        predicted = None if self.rig.down() else self._garbage(keep)
        stored = self.keys()
        with self.rig.disturbed(disturbance):
            try:
                self.model = collect()
            except Failure as err:
                self.require_excuse(err)
                self.doubt = Doubt(before, [after, after], collect, request_id)
            if self.rig.was_disturbed or self.doubt is not None:
                predicted = None
            self.note("gc" if keep is None else "gc of history")
        if predicted is not None:
            self._check_collected(stored, predicted, keep)

    def _check_collected(self, stored: set[str], predicted: set[str], keep: int | None) -> None:
        left = self.keys()
        removed, created = stored - left, left - stored
        assert predicted <= removed, sorted(predicted - removed)
        if keep is None:
            # To promise less, it publishes a manifest, and the one before goes with the rest.
            replaced = {_folder(key) for key in removed - predicted}
            assert replaced <= {_folder(key) for key in created}, sorted(removed - predicted)
            assert self._garbage(None) == set()

    def _garbage(self, keep: int | None) -> set[str]:
        report = self.rig.operations.collect_garbage(
            request("dry", dry_run=True), keep_revisions=keep
        )
        return {key for garbage in report.garbage for key in garbage.keys}

    @precondition(lambda self: self.doubt is None and self.answered and not self.rig.down())
    @rule(index=indices)
    def ask_again(self, index: int) -> None:
        """Repeat a transaction that was answered: the answer is the same, and nothing changes."""
        request_id, call, answer = self.answered[index % len(self.answered)]
        assert call(request(request_id)) == answer
        self.note("ask again")

    def pick_snapshot(self, index: int) -> str:
        names = [*self.model.snapshots]
        return names[index % len(names)]

    def keys(self) -> set[str]:
        return set(self.rig.objects.list(""))

    def below(self, topic: BlockRef | None, only_block: bool = False) -> list[BlockRef]:
        if topic is None:
            return list(REFS)
        return [topic] if only_block else list(self.spec.subtree(topic))


def _folder(key: str) -> str:
    return key.rsplit("/", 1)[0]
