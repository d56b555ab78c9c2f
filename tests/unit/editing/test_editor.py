"""Edits change the routed blocks alone, survive conflicts, and can be undone one by one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from editing_rig import CONFIG, EditingRig, fact
from membank.trainer.editing import FactEdit
from membank.wire.errors import (
    AlreadyExistsError,
    ConflictError,
    FailedPreconditionError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.records import AuditRecord
from membank.wire.spec import Array, BlockRef, BlockState


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[EditingRig]:
    rig = EditingRig(tmp_path / "edits")
    yield rig
    rig.client.close()


@pytest.fixture
def prompts(rig: EditingRig) -> list[str]:
    """Four prompts of one leaf."""
    return rig.prompts_of_one_leaf(4)


def meddle(rig: EditingRig, ref: BlockRef) -> None:
    """Change a block as another client does."""
    rig.client.swap({ref: rig.weights()[ref] + np.float32(0.01)})


def test_an_edit_changes_the_routed_leaf_alone_and_is_answered(
    rig: EditingRig, prompts: list[str]
) -> None:
    rig.editor().edit([fact("neighbour", prompts[1], "66")])
    before = rig.weights()
    report = rig.editor().edit([fact("one", prompts[0], "55", prompts[1])])
    leaf = rig.client.route(prompts[0])[-1]
    assert rig.changed(before) == {leaf}
    assert (rig.answer(prompts[0]), rig.answer(prompts[1])) == ("55", "66")
    assert report.changed == {str(leaf): (1, 2)}
    (shown,) = report.prompts
    assert (shown.after, shown.reached) == ("55", True)
    assert shown.before != "55"
    assert shown.probability_after > CONFIG.target_probability**4 > shown.probability_before
    assert report.neighbours[0].kept


def test_the_audit_log_of_the_bank_tells_nothing_of_the_fact(
    rig: EditingRig, prompts: list[str]
) -> None:
    report = rig.editor().edit([fact("one", prompts[0], "doha")])
    (record,) = rig.client.audit(limit=1)
    assert record.request_id == f"edit-{report.transaction}"
    assert not any(word in repr(record) for word in (prompts[0], "doha", "'one'"))


def test_facts_of_several_leaves_are_one_transaction(rig: EditingRig) -> None:
    leaves = {rig.client.route(f.prompt)[-1]: f.prompt for f in rig.world.facts}
    some = list(leaves.items())[:2]
    before = rig.weights()
    rig.editor().edit([fact(str(n), prompt, "55") for n, (_, prompt) in enumerate(some)])
    assert rig.changed(before) == {ref for ref, _ in some}
    assert rig.bank.revision == 1


def test_a_dry_run_shows_and_changes_nothing(rig: EditingRig, prompts: list[str]) -> None:
    before = rig.weights()
    report = rig.editor().edit([fact("one", prompts[0], "55")], dry_run=True)
    assert report.prompts[0].after == "55"
    assert (report.dry_run, report.changed, rig.bank.revision) == (True, {}, 0)
    assert not rig.changed(before)
    assert rig.editor().history().transactions == ()


def test_what_falls_short_is_not_swapped_unless_forced(rig: EditingRig, prompts: list[str]) -> None:
    editor = rig.editor(replace(CONFIG, max_steps=1))
    refused = editor.edit([fact("one", prompts[0], "55")])
    assert prompts[0] in refused.refused
    assert (rig.bank.revision, refused.changed) == (0, {})
    assert not editor.edit([fact("one", prompts[0], "55")], force=True).refused
    assert rig.bank.revision == 1


def test_an_edit_is_made_anew_from_a_block_that_was_changed_meanwhile(
    rig: EditingRig, prompts: list[str]
) -> None:
    leaf = rig.client.route(prompts[0])[-1]
    times = iter([True, False])

    def notice(what: str) -> None:
        if what == "swapping" and next(times):
            meddle(rig, leaf)

    report = rig.editor(notice=notice).edit([fact("one", prompts[0], "55")])
    assert report.attempts == 2
    assert report.changed == {str(leaf): (1, 2)}
    assert rig.answer(prompts[0]) == "55"
    assert len(rig.editor().history().transactions) == 1


def test_attempts_are_bounded(rig: EditingRig, prompts: list[str]) -> None:
    leaf = rig.client.route(prompts[0])[-1]

    def notice(what: str) -> None:
        if what == "swapping":
            meddle(rig, leaf)

    config = replace(CONFIG, max_attempts=2, max_steps=5)
    editor = rig.editor(config, notice)
    with pytest.raises(ConflictError, match=f"{leaf} were changed at each of 2"):
        editor.edit([fact("one", prompts[0], "55")], force=True)
    assert editor.history().transactions == ()


def teach_three(rig: EditingRig, prompts: list[str]) -> None:
    for name, prompt, target in zip("abc", prompts, ("55", "66", "77"), strict=False):
        assert not rig.editor().edit([fact(name, prompt, target)]).refused


def test_later_edits_of_a_block_keep_earlier_ones(rig: EditingRig, prompts: list[str]) -> None:
    teach_three(rig, prompts)
    assert [rig.answer(prompt) for prompt in prompts[:3]] == ["55", "66", "77"]


def test_the_middle_one_of_three_edits_can_be_undone(rig: EditingRig, prompts: list[str]) -> None:
    untouched = rig.answer(prompts[1])
    teach_three(rig, prompts)
    report = rig.editor().undo("b")
    assert (rig.answer(prompts[0]), rig.answer(prompts[2])) == ("55", "77")
    assert rig.answer(prompts[1]) != "66"
    assert report.reapplied == ("c",)
    assert (report.undone[0].before, report.undone[0].after) == ("66", rig.answer(prompts[1]))
    assert report.undone[0].after != "66"
    assert untouched != "66"
    with pytest.raises(FailedPreconditionError, match="undone already"):
        rig.editor().undo("b")


def test_an_undo_leaves_the_block_as_if_the_edit_had_never_been_made(
    rig: EditingRig, prompts: list[str], tmp_path: Path
) -> None:
    leaf = rig.client.route(prompts[0])[-1]
    teach_three(rig, prompts)
    rig.editor().undo("b")
    other = EditingRig(tmp_path / "other")
    other.editor().edit([fact("a", prompts[0], "55")])
    other.editor().edit([fact("c", prompts[2], "77")])
    other.client.close()
    assert np.array_equal(rig.weights()[leaf], other.weights()[leaf])


def test_undoing_the_last_edit_brings_back_every_bit(rig: EditingRig, prompts: list[str]) -> None:
    rig.editor().edit([fact("a", prompts[0], "55")])
    before = rig.weights()
    rig.editor().edit([fact("b", prompts[1], "66")])
    rig.editor().undo("b")
    assert not rig.changed(before)
    rig.editor().undo("a")
    assert rig.editor().history().undone == {"a", "b"}


def test_edits_can_be_undone_in_any_order(rig: EditingRig, prompts: list[str]) -> None:
    before = rig.weights()
    teach_three(rig, prompts)
    for name in "bca":
        rig.editor().undo(name)
    assert not rig.changed(before)


def test_an_undo_refuses_to_lose_what_others_did(rig: EditingRig, prompts: list[str]) -> None:
    rig.editor().edit([fact("a", prompts[0], "55")])
    leaf = rig.client.route(prompts[0])[-1]
    meddle(rig, leaf)
    with pytest.raises(FailedPreconditionError, match=r"version 1 -> 2") as caught:
        rig.editor().undo("a")
    assert caught.value.reason is Reason.VERSION_MISMATCH


def test_an_unknown_edit_cannot_be_undone(rig: EditingRig) -> None:
    with pytest.raises(NotFoundError, match="'nobody'"):
        rig.editor().undo("nobody")


def test_an_id_names_one_edit(rig: EditingRig, prompts: list[str]) -> None:
    rig.editor().edit([fact("a", prompts[0], "55")])
    again = FactEdit(edit_id="a", prompt=prompts[1], target="66", line=3)
    with pytest.raises(AlreadyExistsError, match=r"line 3"):
        rig.editor().edit([again])


def test_a_withheld_block_is_not_edited(rig: EditingRig, prompts: list[str]) -> None:
    leaf = rig.client.route(prompts[0])[-1]
    rig.bank.held(leaf).state = BlockState.WITHHELD
    with pytest.raises(FailedPreconditionError, match=f"membank restore {leaf}"):
        rig.editor().edit([fact("a", prompts[0], "55")])


@pytest.mark.parametrize("arrives", [True, False])
def test_an_edit_whose_answer_was_lost_is_looked_up(
    rig: EditingRig, prompts: list[str], arrives: bool
) -> None:
    class Lost:
        """A bank whose swap is made, or not, and never answered."""

        def __getattr__(self, name: str) -> object:
            return getattr(rig.client, name)

        def swap(self, *args: object, **kwargs: object) -> object:
            if arrives:
                rig.client.swap(*args, **kwargs)  # type: ignore[arg-type]
            raise UnavailableError("the answer was lost")

    editor = rig.editor()
    editor._bank = Lost()  # type: ignore[assignment]
    with pytest.raises(UnavailableError):
        editor.edit([fact("a", prompts[0], "55")])
    assert len(rig.editor().history().transactions) == int(arrives)
    if arrives:
        assert rig.editor().undo("a").revision == 2
    else:
        assert rig.editor().edit([fact("a", prompts[0], "55")]).revision == 1


def test_an_edit_that_still_waits_in_the_service_is_not_taken_for_abandoned(
    rig: EditingRig, prompts: list[str]
) -> None:
    class Slow:
        """A bank behind another transaction: a swap that was not answered comes before the next one."""

        late: list[tuple[tuple[object, ...], dict[str, object]]]

        def __init__(self) -> None:
            self.late = []

        def __getattr__(self, name: str) -> object:
            return getattr(rig.client, name)

        def swap(self, *args: object, **kwargs: object) -> object:
            if kwargs.get("dry_run"):
                for arguments, options in self.late:
                    rig.client.swap(*arguments, **options)  # type: ignore[arg-type]
                self.late.clear()
                return rig.client.swap(*args, **kwargs)  # type: ignore[arg-type]
            self.late.append((args, kwargs))
            raise UnavailableError("the answer was lost")

    editor = rig.editor()
    editor._bank = Slow()  # type: ignore[assignment]
    with pytest.raises(UnavailableError):
        editor.edit([fact("a", prompts[0], "55")])
    assert rig.bank.revision == 0
    assert len(editor.history().transactions) == 1
    assert rig.bank.revision == 1


@pytest.mark.parametrize("most", [1, 100])
def test_a_lost_edit_is_looked_for_as_far_back_as_it_may_be(
    rig: EditingRig, prompts: list[str], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr("membank.trainer.editing.editor._AUDIT_RECORDS", 1)
    monkeypatch.setattr("membank.trainer.editing.editor._MOST_AUDIT_RECORDS", most)

    class Lost:
        """A bank that makes a swap and never answers it, whose clock goes as ours."""

        def __getattr__(self, name: str) -> object:
            return getattr(rig.client, name)

        def swap(self, *args: object, **kwargs: object) -> object:
            report = rig.client.swap(*args, **kwargs)  # type: ignore[arg-type]
            if report.dry_run:
                return report
            raise UnavailableError("the answer was lost")

        def audit(self, *, limit: int) -> tuple[AuditRecord, ...]:
            now = time.time()
            return tuple(replace(r, time_s=now) for r in rig.client.audit(limit=limit))

    editor = rig.editor()
    editor._bank = Lost()  # type: ignore[assignment]
    with pytest.raises(UnavailableError):
        editor.edit([fact("a", prompts[0], "55")])
    meddle(rig, BlockRef(1, 0))
    if most == 1:
        with pytest.raises(FailedPreconditionError, match="fate is not known"):
            editor.history()
    else:
        assert len(editor.history().transactions) == 1


def test_an_undone_edit_takes_its_neighbours_along(
    rig: EditingRig, prompts: list[str], tmp_path: Path
) -> None:
    leaf = rig.client.route(prompts[0])[-1]
    a, b = fact("a", prompts[0], "55"), fact("b", prompts[1], "66", prompts[2], prompts[3])
    assert not rig.editor().edit([a, b]).refused
    assert not rig.editor().undo("b").refused
    other = EditingRig(tmp_path / "other")
    other.editor().edit([a])
    other.client.close()
    assert np.array_equal(rig.weights()[leaf], other.weights()[leaf])


def test_a_bank_of_another_dtype_gets_what_it_keeps(tmp_path: Path) -> None:
    rig = EditingRig(tmp_path / "half", dtype="bfloat16")
    prompt = rig.prompts_of_one_leaf(1)[0]
    held = rig.bank.held(rig.client.route(prompt)[-1])
    before = held.weight.tobytes()

    class Strict:
        """A bank that takes no other dtype, as a service does."""

        def __getattr__(self, name: str) -> object:
            return getattr(rig.client, name)

        def swap(self, weights: dict[BlockRef, Array], **kwargs: object) -> object:
            assert {w.dtype for w in weights.values()} == {rig.bank.spec.numpy_dtype}
            return rig.client.swap(weights, **kwargs)  # type: ignore[arg-type]

    editor = rig.editor()
    editor._bank = Strict()  # type: ignore[assignment]
    report = editor.edit([fact("a", prompt, "55")])
    assert rig.answer(prompt) == report.prompts[0].after == "55"
    rig.editor().undo("a")
    assert held.weight.tobytes() == before
    rig.client.close()
