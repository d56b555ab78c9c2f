"""The log of edits survives a cut last line, and names damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from membank.trainer.editing.log import EditHistory, EditLog, LoggedBlock, LoggedTransaction
from membank.wire.errors import CorruptionError, FailedPreconditionError
from membank.wire.spec import BlockRef

REF = BlockRef(2, 1)


def transaction(name: str) -> LoggedTransaction:
    return LoggedTransaction(
        transaction=name,
        operation="edit",
        bank_id="bank",
        edit_ids=(f"edit-{name}",),
        blocks=(LoggedBlock(ref=str(REF), version_before=0, version_after=1),),
        time_s=1.5,
    )


@pytest.fixture
def log(tmp_path: Path) -> EditLog:
    log = EditLog(tmp_path)
    with log.exclusive():
        log.prepare(transaction("one"), {("", REF): torch.ones(2)})
        log.commit("one", 7)
    return log


def test_what_was_put_on_record_is_read_again(log: EditLog) -> None:
    (found,) = log.transactions()
    assert (found.transaction, found.revision) == ("one", 7)
    assert torch.equal(log.content("one", "one", REF), torch.ones(2))


def test_a_cut_last_line_is_dropped_and_written_over(log: EditLog, tmp_path: Path) -> None:
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "prep')
    assert len(log.transactions()) == 1
    log.prepare(transaction("two"), {})
    assert [t.transaction for t in log.transactions()] == ["one", "two"]


def test_an_abandoned_transaction_is_none(log: EditLog) -> None:
    log.prepare(transaction("two"), {("", REF): torch.ones(2)})
    assert len(EditHistory(log, "bank").pending) == 1
    log.abandon("two")
    history = EditHistory(log, "bank")
    assert (len(history.transactions), history.pending) == (1, ())


def test_a_log_is_of_one_bank(log: EditLog) -> None:
    assert EditHistory(log, "another").transactions == ()


def test_damage_is_named(log: EditLog, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    file.write_text("{}\n" + file.read_text())
    with pytest.raises(CorruptionError, match=r"log\.jsonl, line 1"):
        log.transactions()


def test_two_cannot_edit_at_once(log: EditLog, tmp_path: Path) -> None:
    with (
        log.exclusive(),
        pytest.raises(FailedPreconditionError, match="another edit"),
        EditLog(tmp_path).exclusive(),
    ):
        pass


def test_a_log_from_before_neighbours_had_edits_is_read(log: EditLog, tmp_path: Path) -> None:
    file = next(tmp_path.rglob("log.jsonl"))
    file.write_text(file.read_text().replace('"neighbours": []', '"neighbours": ["The"]'))
    (block,) = log.transactions()[0].blocks
    assert [(n.edit_id, n.prompt) for n in block.neighbours] == [("", "The")]
