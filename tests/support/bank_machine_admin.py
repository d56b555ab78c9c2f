"""Rules of the bank machine: everything that an operator may ask of a bank."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from bank_machine_core import REFS, REMEMBERED, BankMachineCore, Doubt, Failure, request
from bank_model import BankModel
from bank_rig import PROCESSES, Disturbance
from membank.bank_service.knowledge import AdminRequest
from membank.bank_service.shard.contract import SetContent
from membank.wire.errors import MembankError, Reason
from membank.wire.records import TransactionReport
from membank.wire.spec import BlockRef, BlockState, Role
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


class AdminRules(BankMachineCore):
    """A bank whose operator does whatever comes to mind."""

    @sure
    @rule(refs=some_refs, expect=st.sampled_from(["any", "right", "right", "wrong"]),
          with_state=st.booleans(), dry_run=st.booleans(), disturbance=maybe)  # fmt: skip
    def swap(
        self,
        refs: list[BlockRef],
        expect: str,
        with_state: bool,
        dry_run: bool,
        disturbance: Disturbance | None,
    ) -> None:
        """Replace blocks, if they have the expected version."""
        versions = {ref: self.model.blocks[ref].version for ref in refs}
        contents = [
            SetContent(
                ref=ref,
                weight=self.array(ref, self.spec.numpy_dtype),
                optimizer_state={Role.MOMENTUM: self.array(ref)} if with_state else {},
                step=5 if with_state else 0,
                expected_version=None if expect == "any" else versions[ref] + (expect == "wrong"),
            )
            for ref in refs
        ]
        self.transact(
            "swap",
            lambda asked: self.rig.operations.swap_blocks(asked, contents),
            lambda model: model.swap(contents),
            disturbance,
            dry_run=dry_run,
        )

    @sure
    @rule(topic=topics, withhold=st.booleans(), dry_run=st.booleans(), disturbance=maybe)
    def set_state(
        self, topic: BlockRef, withhold: bool, dry_run: bool, disturbance: Disturbance | None
    ) -> None:
        """Hide a topic, or show it again."""

        def call(asked: AdminRequest) -> TransactionReport:
            operations = self.rig.operations
            change = operations.withhold_topic if withhold else operations.restore_topic
            return change(asked, topic)

        self.transact(
            "withhold" if withhold else "restore",
            call,
            lambda model: model.set_state(
                topic, BlockState.WITHHELD if withhold else BlockState.ACTIVE
            ),
            disturbance,
            dry_run=dry_run,
        )

    @sure
    @rule(topic=topics, dry_run=st.booleans(), disturbance=maybe)
    def delete(self, topic: BlockRef, dry_run: bool, disturbance: Disturbance | None) -> None:
        """Destroy a topic."""
        self.transact(
            "delete",
            lambda asked: self.rig.operations.delete_topic(asked, topic),
            lambda model: model.delete(topic),
            disturbance,
            dry_run=dry_run,
        )

    @sure_and_up
    @rule(topic=topics, weights_only=st.booleans())
    def export(self, topic: BlockRef, weights_only: bool) -> None:
        """Take a topic out as a pack."""
        try:
            data = self.rig.operations.export_topic(topic, weights_only=weights_only).data
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
