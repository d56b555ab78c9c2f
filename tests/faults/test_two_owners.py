"""Two machines that own the same partition: the one that was replaced finds out, and harms nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.store import Bank
from membank.wire.errors import Reason, UnavailableError
from membank.wire.spec import BlockRef
from tiny_bank import create_bank, full_state, make_update

A, B = BlockRef(1, 0), BlockRef(1, 1)


def _open(bank: Bank, machine: Path, **settings: int) -> Shard:
    return Shard.open(bank, config=ShardConfig(journal_dir=str(machine), **settings))  # type: ignore[arg-type]


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path / "bank")


def test_a_replaced_owner_cannot_publish(bank: Bank, tmp_path: Path) -> None:
    old = _open(bank, tmp_path / "one")
    old.push(make_update(old, [A], "u0"))
    old.consolidate()
    new = _open(bank, tmp_path / "two")
    old.push(make_update(old, [A], "late"))
    with pytest.raises(UnavailableError) as caught:
        old.consolidate()
    assert caught.value.reason is Reason.FENCED
    with pytest.raises(UnavailableError) as refused:
        old.push(make_update(old, [A], "later"))
    assert refused.value.reason is Reason.FENCED
    # The slots that the old owner wrote in vain are in nobody's way.
    new.push(make_update(new, [A], "u1"))
    new.consolidate()
    state = full_state(new)
    old.close()
    assert full_state(new) == state
    new.close()
    again = _open(bank, tmp_path / "two")
    assert full_state(again) == state
    again.close()


def test_an_update_that_meets_the_fence_is_not_acknowledged(bank: Bank, tmp_path: Path) -> None:
    old = _open(bank, tmp_path / "one", consolidate_bytes=1)
    new = _open(bank, tmp_path / "two")
    update = make_update(old, [A], "u0")
    with pytest.raises(UnavailableError) as caught:
        old.push(update)
    assert caught.value.reason is Reason.FENCED
    assert not new.push(update).duplicate
    assert new.describe([A])[0].version == 1
    old.close()
    new.close()


def test_an_owner_that_returns_does_not_replay_its_old_journal(bank: Bank, tmp_path: Path) -> None:
    one = _open(bank, tmp_path / "one")
    one.push(make_update(one, [A, B], "u0"))
    one.close(consolidate=False)
    two = _open(bank, tmp_path / "two")
    two.push(make_update(two, [A], "u1"))
    state = full_state(two)
    two.close()
    back = _open(bank, tmp_path / "one")
    assert full_state(back) == state
    assert back.describe([B])[0].version == 0
    back.close()
