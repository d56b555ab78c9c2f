"""What an owner says when it lets go, or when something is deleted, is so."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.contract import Erase
from membank.bank_service.store import Bank
from membank.wire.errors import MembankError, Reason, UnavailableError
from membank.wire.records import Update
from membank.wire.spec import BlockRef, Role
from storage_faults import Interleaved
from tiny_bank import UnsyncedObjects, commit_record, create_bank, full_state, make_update

A = BlockRef(1, 0)


@pytest.fixture
def objects(tmp_path: Path) -> Interleaved:
    create_bank(tmp_path / "bank")
    return Interleaved(UnsyncedObjects(tmp_path / "bank"))


def test_a_push_while_an_owner_closes_is_kept_or_refused(
    objects: Interleaved, tmp_path: Path
) -> None:
    config = ShardConfig(journal_dir=str(tmp_path / "journals"))
    shard = Shard.open(Bank.open(objects), config=config)
    shard.push(make_update(shard, [A], "u0"))
    late = make_update(shard, [A], "u1")
    partition = shard._partitions[0]
    # By then it has passed the shard's door, and is on its way to the partition.
    objects.before("put_if_absent", "0000/manifests", lambda: partition.push(late, late.gradients))
    shard.close()
    again = Shard.open(Bank.open(objects), config=config)
    assert again.push(late).duplicate
    assert again.describe([A])[0].version == 2
    again.close()


def _sealed(shard: Shard, update: Update) -> Reason:
    with pytest.raises(UnavailableError) as caught:
        shard._partitions[0].push(update, update.gradients)
    return caught.value.reason


def test_nothing_is_acknowledged_after_an_owner_said_that_all_is_folded(
    objects: Interleaved, tmp_path: Path
) -> None:
    config = ShardConfig(journal_dir=str(tmp_path / "journals"))
    shard = Shard.open(Bank.open(objects), config=config)
    shard.push(make_update(shard, [A], "u0"))
    late = make_update(shard, [A], "u1")
    manifests = threading.Event()
    told: list[Reason] = []

    def publishes_for_the_second_time() -> None:
        if manifests.is_set():
            told.append(_sealed(shard, late))
            return
        manifests.set()
        objects.before("put_if_absent", "0000/manifests", publishes_for_the_second_time)

    objects.before("put_if_absent", "0000/manifests", publishes_for_the_second_time)
    shard.close()
    assert told == [Reason.STORE_FAILED]
    assert shard.is_folded


class _Undeletable(UnsyncedObjects):
    """Refuses to remove what has some part in its key, a number of times."""

    part = "/log/"
    left = 0

    def delete(self, key: str) -> None:
        if self.left and self.part in key:
            self.left -= 1
            raise UnavailableError(f"{key}: no answer", reason=Reason.STORE_FAILED)
        super().delete(key)


@pytest.mark.parametrize("failures", range(8))
def test_deleted_content_leaves_the_shipped_log_before_it_is_called_destroyed(
    tmp_path: Path, failures: int
) -> None:
    create_bank(tmp_path)
    objects = _Undeletable(tmp_path)
    bank = Bank.open(objects)
    shard = Shard.open(bank, config=ShardConfig(ship_every_s=3600, lease_s=0))
    shard.push(make_update(shard, [A], "u0"))
    shard._partitions[0].ship()
    weight = full_state(shard)[A][3][Role.WEIGHT]
    objects.left = failures
    record = bank.decide(commit_record(bank, 1, shard.prepare(1, [Erase(ref=A)])))
    while True:
        try:
            shard.commit(record)
        except MembankError:
            continue
        break
    assert [key for key in objects.list("") if weight in objects.get(key)] == []
    shard.close()


def test_a_shard_goes_on_by_itself_with_a_removal_that_failed(tmp_path: Path) -> None:
    create_bank(tmp_path)
    objects = _Undeletable(tmp_path)
    bank = Bank.open(objects)
    shard = Shard.open(bank, config=ShardConfig(lease_s=0))
    shard.push(make_update(shard, [A], "u0"))
    shard.consolidate()
    weight = full_state(shard)[A][3][Role.WEIGHT]
    # The coordinator dies after its record; the shard finds that out by itself.
    bank.decide(commit_record(bank, 1, shard.prepare(1, [Erase(ref=A)])))
    objects.part, objects.left = "/level-", 1
    with pytest.raises(MembankError):
        shard.settle(0.0)
    assert [key for key in objects.list("") if weight in objects.get(key)]
    shard.settle(0.0)
    assert [key for key in objects.list("") if weight in objects.get(key)] == []
    shard.close()
