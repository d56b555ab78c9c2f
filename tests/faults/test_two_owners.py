"""Two machines that own the same partition: the one that was replaced finds out, and harms nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.store import Bank
from membank.wire.errors import CorruptionError, Reason, UnavailableError
from membank.wire.spec import BlockRef
from tiny_bank import create_bank, full_state, make_update

A, B = BlockRef(1, 0), BlockRef(1, 1)
LEASE_S = 10.0


class Clock:
    """Time of two machines; whoever sleeps lets it pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def _open(bank: Bank, machine: Path, clock: Clock, **settings: object) -> Shard:
    config = ShardConfig(journal_dir=str(machine), **{"lease_s": LEASE_S, **settings})  # type: ignore[arg-type]
    return Shard.open(bank, config=config, clock=clock, sleep=clock.sleep)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path / "bank")


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_new_owner_waits_out_the_lease_of_one_that_may_live(
    bank: Bank, tmp_path: Path, clock: Clock
) -> None:
    old = _open(bank, tmp_path / "one", clock)
    assert clock.slept == []
    new = _open(bank, tmp_path / "two", clock)
    (waited,) = clock.slept
    assert waited > LEASE_S
    old.close()
    new.close()


def test_an_owner_that_let_go_or_held_the_same_lock_is_not_waited_for(
    bank: Bank, tmp_path: Path, clock: Clock
) -> None:
    _open(bank, tmp_path / "one", clock).close()
    two = _open(bank, tmp_path / "two", clock)
    two.push(make_update(two, [A], "u0"))
    two.close(consolidate=False)  # as if killed: it lets nobody know
    again = _open(bank, tmp_path / "two", clock)
    assert again.describe([A])[0].version == 1
    assert clock.slept == []
    again.close()


def test_a_paused_owner_that_wakes_up_neither_acknowledges_nor_serves(
    bank: Bank, tmp_path: Path, clock: Clock
) -> None:
    old = _open(bank, tmp_path / "one", clock)
    update = make_update(old, [A], "late")
    new = _open(bank, tmp_path / "two", clock)
    with pytest.raises(UnavailableError) as pushed:
        old.push(update)
    with pytest.raises(UnavailableError) as fetched:
        old.fetch([A])
    assert pushed.value.reason is fetched.value.reason is Reason.FENCED
    assert not new.push(update).duplicate
    assert new.describe([A])[0].version == 1
    old.close()
    new.close()


def test_an_owner_that_nobody_replaced_asks_and_goes_on(
    bank: Bank, tmp_path: Path, clock: Clock
) -> None:
    shard = _open(bank, tmp_path / "one", clock)
    clock.sleep(100 * LEASE_S)
    assert shard.push(make_update(shard, [A], "u0")).results[0].accepted
    assert shard.fetch([A]).blocks[0].header.version == 1
    shard.close()


@pytest.mark.parametrize("durability", list(Durability))
def test_a_replaced_owner_cannot_publish(
    bank: Bank, tmp_path: Path, clock: Clock, durability: Durability
) -> None:
    old = _open(bank, tmp_path / "one", clock, durability=durability, lease_s=0)
    old.push(make_update(old, [A], "u0"))
    old.consolidate()
    late = make_update(old, [A], "late")
    new = _open(bank, tmp_path / "two", clock, durability=durability, lease_s=0)
    if durability is Durability.STORE:
        # The journal itself is fenced.
        with pytest.raises(UnavailableError) as caught:
            old.push(late)
    else:
        old.push(late)
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
    again = _open(bank, tmp_path / "two", clock)
    assert full_state(again) == state
    again.close()


def test_an_update_that_meets_the_fence_is_not_acknowledged(
    bank: Bank, tmp_path: Path, clock: Clock
) -> None:
    old = _open(bank, tmp_path / "one", clock, consolidate_bytes=1, lease_s=0)
    new = _open(bank, tmp_path / "two", clock, lease_s=0)
    update = make_update(old, [A], "u0")
    with pytest.raises(UnavailableError) as caught:
        old.push(update)
    assert caught.value.reason is Reason.FENCED
    assert not new.push(update).duplicate
    assert new.describe([A])[0].version == 1
    old.close()
    new.close()


def test_an_owner_that_returns_does_not_replay_its_old_journal(
    bank: Bank, tmp_path: Path, clock: Clock
) -> None:
    one = _open(bank, tmp_path / "one", clock)
    one.push(make_update(one, [A, B], "u0"))
    one.close(consolidate=False)
    two = _open(bank, tmp_path / "two", clock)
    two.push(make_update(two, [A], "u1"))
    state = full_state(two)
    two.close()
    back = _open(bank, tmp_path / "one", clock)
    assert full_state(back) == state
    assert back.describe([B])[0].version == 0
    back.close()


def test_interrupted_openings_do_not_make_an_old_journal_look_new(
    bank: Bank, tmp_path: Path, clock: Clock
) -> None:
    one = _open(bank, tmp_path / "one", clock)
    one.push(make_update(one, [A], "u0"))
    one.close(consolidate=False)
    # Machine one comes back twice, and dies each time: its journal counts more owners than the
    # manifests that machine two has made by then.
    for _ in range(3):
        _open(bank, tmp_path / "one", clock).close(consolidate=False)
    two = _open(bank, tmp_path / "two", clock)
    two.push(make_update(two, [B], "u1"))
    state = full_state(two)
    two.close(consolidate=False)
    back = _open(bank, tmp_path / "two", clock)
    assert full_state(back) == state
    back.close()


def test_with_the_journal_in_the_store_another_machine_loses_nothing(
    bank: Bank, tmp_path: Path, clock: Clock
) -> None:
    one = _open(bank, tmp_path / "one", clock, durability=Durability.STORE)
    for number in range(5):
        one.push(make_update(one, [A, B], f"u{number}"))
    state = full_state(one)
    one.close(consolidate=False)
    two = _open(bank, tmp_path / "two", clock, durability=Durability.STORE)
    assert full_state(two) == state
    assert two.push(make_update(two, [A, B], "u4", bases={A: 4, B: 4})).duplicate
    two.close()


@pytest.mark.parametrize(
    ("before", "after"),
    [(Durability.PROCESS, Durability.STORE), (Durability.STORE, Durability.PROCESS)],
)
def test_another_durability_inherits_the_journal(
    bank: Bank, tmp_path: Path, clock: Clock, before: Durability, after: Durability
) -> None:
    shard = _open(bank, tmp_path, clock, durability=before)
    shard.push(make_update(shard, [A, B], "u0"))
    state = full_state(shard)
    shard.close(consolidate=False)
    for durability in (after, after, before):
        shard = _open(bank, tmp_path, clock, durability=durability)
        assert full_state(shard) == state
        shard.close(consolidate=False)
    shard = _open(bank, tmp_path, clock, durability=after)
    shard.push(make_update(shard, [A], "u1"))
    state = full_state(shard)
    shard.close(consolidate=False)
    shard = _open(bank, tmp_path, clock, durability=before)
    assert full_state(shard) == state
    shard.close()


def test_a_journal_in_the_store_that_is_gone_is_noticed(
    bank: Bank, tmp_path: Path, clock: Clock
) -> None:
    shard = _open(bank, tmp_path / "one", clock, durability=Durability.STORE)
    shard.push(make_update(shard, [A], "u0"))
    shard.close(consolidate=False)
    for key in bank.objects.list("partitions/0001/log"):
        bank.objects.delete(key)
    with pytest.raises(CorruptionError) as caught:
        _open(bank, tmp_path / "two", clock, durability=Durability.STORE)
    assert caught.value.metadata["key"] == "partitions/0001/log"


def test_who_goes_on_without_the_last_owner_s_journal_says_so(
    bank: Bank, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    one = _open(bank, tmp_path / "one", clock)
    one.push(make_update(one, [A], "u0"))
    one.close(consolidate=False)  # as if killed
    _open(bank, tmp_path / "two", clock).close()
    assert (
        f"without the journal of its last owner, which is not in {tmp_path / 'two'}" in caplog.text
    )
    caplog.clear()
    # The second one left in order, and the journal of the third is where it was.
    three = _open(bank, tmp_path / "three", clock)
    three.close(consolidate=False)
    _open(bank, tmp_path / "three", clock).close()
    assert "without the journal" not in caplog.text
