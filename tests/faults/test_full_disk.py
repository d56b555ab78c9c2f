"""A disk that is full, by the kernel's own refusal: a limit on the size of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from full_disk import files_up_to
from membank.bank_service.shard import Shard
from membank.bank_service.shard.contract import SetContent
from membank.bank_service.store import Bank, LocalObjects
from membank.wire.errors import Reason, ResourceExhaustedError
from membank.wire.spec import BlockRef
from tiny_bank import create_bank, full_state, make_update, tiny_spec, transact

A, B = BlockRef(1, 0), BlockRef(1, 1)


def _journal_size(root: Path) -> int:
    (path,) = (root / "partitions/0000/journal").glob("*.log")
    return path.stat().st_size


@pytest.mark.parametrize("room", [0, 1, 100, 500])
def test_an_update_that_does_not_fit_changes_nothing(tmp_path: Path, room: int) -> None:
    bank = create_bank(tmp_path)
    shard = Shard.open(bank)
    shard.push(make_update(shard, [A], "u0"))
    state, size = full_state(shard), _journal_size(tmp_path)
    update = make_update(shard, [A], "u1")
    with files_up_to(size + room), pytest.raises(ResourceExhaustedError) as caught:
        shard.push(update)
    assert caught.value.reason is Reason.NO_SPACE
    assert full_state(shard) == state
    assert _journal_size(tmp_path) == size
    # With space again, the same update goes through, and was not half there.
    assert not shard.push(update).duplicate
    after = full_state(shard)
    shard.close(consolidate=False)
    again = Shard.open(bank)
    assert full_state(again) == after
    again.close()


def test_a_transaction_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    shard = Shard.open(bank)
    shard.push(make_update(shard, [A, B], "u0"))
    shard.consolidate()
    state = full_state(shard)
    files = set(tmp_path.rglob("c.*"))
    weight = np.ones(bank.spec.block_shape(1), np.float32)
    operations = [SetContent(ref=A, weight=weight), SetContent(ref=B, weight=weight)]
    with files_up_to(300), pytest.raises(ResourceExhaustedError):
        shard.prepare(1, operations)
    assert full_state(shard) == state
    assert set(tmp_path.rglob("c.*")) == files
    shard.push(make_update(shard, [A, B], "u1"))
    transact(shard, bank, operations)
    shard.close()


def test_a_bank_that_does_not_fit_is_not_created(tmp_path: Path) -> None:
    with files_up_to(100), pytest.raises(ResourceExhaustedError):
        Bank.create(LocalObjects(tmp_path / "bank"), tiny_spec())
    Bank.create(LocalObjects(tmp_path / "bank"), tiny_spec())
