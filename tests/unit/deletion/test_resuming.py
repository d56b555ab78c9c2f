"""What a deletion that was stopped meets when it goes on, or when another one begins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deletion_rig import ONE_THREAD, DeletionRig
from membank.trainer.deletion import DocumentDeletion
from membank.trainer.run import RunMaterial
from membank.trainer.training import Progress
from membank.wire.errors import ConflictError, FailedPreconditionError, InvalidArgumentError, Reason
from membank.wire.spec import BlockRef
from membank.wire.steps import Delete

ONE = (0,)
TOP, LEAF = BlockRef(1, 0), BlockRef(2, 0)


def _stop(rig: DeletionRig, where: str) -> None:
    rig.exchange.die_at = where
    with pytest.raises(KeyboardInterrupt):
        rig.delete(ONE)


def test_a_block_that_changed_before_the_destruction_lets_the_job_begin_anew(
    rig: DeletionRig,
) -> None:
    _stop(rig, "before destroy")
    rig.bank.held(LEAF).version += 1
    before = rig.contents()
    with pytest.raises(ConflictError, match="begins anew"):
        rig.delete(ONE)
    assert (rig.exchange.calls, rig.contents()) == ([], before)
    # The bank holds the documents still, so a plan of them can be made.
    assert rig.forecast(ONE, replace(ONE_THREAD, threshold=0.9)).plan.removed == ONE
    report = rig.delete(ONE)
    assert rig.exchange.calls == ["destroy", "install"]
    assert rig.bank.held(LEAF).version == 3
    assert report.to_json()["removed_documents"] == 1
    assert rig.contents()[LEAF] != before[LEAF]


def test_documents_whose_topics_are_deleted_already_need_no_transaction(rig: DeletionRig) -> None:
    rig.bank.apply([Delete(topic=TOP)], request_id="d", dry_run=False)
    with pytest.raises(InvalidArgumentError, match="deleted already"):
        rig.delete(ONE)


@pytest.mark.parametrize("where", ["before destroy", "after destroy"])
def test_no_other_deletion_begins_beside_one_that_is_not_done(rig: DeletionRig, where: str) -> None:
    _stop(rig, where)
    for rows, config in (((8,), ONE_THREAD), (ONE, replace(ONE_THREAD, threshold=0.9))):
        with pytest.raises(FailedPreconditionError, match="give its command again") as caught:
            rig.forecast(rows, config)
        assert caught.value.reason is Reason.TRANSACTION_IN_PROGRESS
    rig.delete(ONE)
    assert rig.forecast((8,)).plan.removed == (8,)


def test_two_processes_do_not_delete_by_one_run(rig: DeletionRig) -> None:
    def begin_again(progress: Progress) -> None:
        with pytest.raises(FailedPreconditionError, match="under way"):
            rig.delete((8,))
        with pytest.raises(FailedPreconditionError, match="under way"):
            rig.delete(ONE)

    rig.delete(ONE, on_progress=begin_again)
    assert rig.exchange.calls == ["destroy", "install"]


def test_a_forecast_that_another_process_has_overtaken_begins_nothing(rig: DeletionRig) -> None:
    forecast = rig.forecast(ONE)
    rig.delete(ONE)
    before = rig.contents()
    job = DocumentDeletion(
        rig.client, rig.exchange, RunMaterial(rig.run, rig.spec.bank_id), ONE_THREAD
    )
    with pytest.raises(ConflictError, match="meanwhile"):
        job.run(forecast)
    assert rig.contents() == before


def test_nothing_of_a_file_that_was_being_written_is_left(rig: DeletionRig) -> None:
    _stop(rig, "before install")
    folder = rig.forecast(ONE).folder
    (folder.path / f".{folder.staged_file.name}.0123").write_bytes(b"half of it")
    rig.delete(ONE)
    assert {path.name for path in folder.path.iterdir()} == {"deletion.json", "receipt.json"}


def test_what_the_log_of_edits_keeps_is_said(rig: DeletionRig) -> None:
    assert not any("log of edits" in words for words in rig.delete(ONE).residue)
    contents = rig.run.edits_dir / "contents"
    contents.mkdir(parents=True)
    (contents / "1.safetensors").write_bytes(b"")
    assert any("before 1 edits" in words for words in rig.delete(ONE).residue)
