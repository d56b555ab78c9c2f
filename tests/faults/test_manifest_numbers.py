"""An owner that was replaced meets its successor at the next number, whatever it did before."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.shard.contract import Erase, SetState
from membank.bank_service.store import Bank, Data, ObjectStore
from membank.wire.errors import MembankError, Reason, ResourceExhaustedError, UnavailableError
from membank.wire.spec import BlockRef, BlockState
from storage_faults import FaultPlan, FaultyObjects, Interleaved, StorageFault
from tiny_bank import UnsyncedObjects, commit_record, create_bank, full_state, make_update

A, C = BlockRef(1, 0), BlockRef(1, 2)
"""Both lie in partition 0."""


class Machines:
    """Two machines with one bank; the lease of an owner runs out while another one waits."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._now = 0.0
        self.bank = create_bank(folder / "bank")

    def open(self, name: str, objects: ObjectStore | None = None, **settings: object) -> Shard:
        config = ShardConfig(
            journal_dir=str(self._folder / name),
            lease_s=10.0,
            **settings,  # type: ignore[arg-type]
        )
        return Shard.open(
            Bank.open(objects or self.objects),
            config=config,
            clock=lambda: self._now,
            sleep=self.wait,
        )

    def wait(self, seconds: float) -> None:
        self._now += seconds

    @property
    def objects(self) -> UnsyncedObjects:
        return UnsyncedObjects(self._folder / "bank")


@pytest.fixture
def machines(tmp_path: Path) -> Machines:
    return Machines(tmp_path)


def _meet(machines: Machines, old: Shard, **settings: object) -> None:
    """Replace `old`, which wakes up afterwards; nothing that the new owner said may be lost."""
    new = machines.open("two", None, **settings)
    assert new.push(make_update(new, [A], "v0")).results[0].accepted
    with pytest.raises(UnavailableError) as caught:
        old.consolidate()
    assert caught.value.reason is Reason.FENCED
    machines.wait(60.0)
    assert new.push(make_update(new, [A], "v1")).results[0].accepted
    before = full_state(new)
    new.close(consolidate=False)
    old.close(consolidate=False)
    again = machines.open("two", None, **settings)
    assert full_state(again) == before
    again.close()


@pytest.mark.parametrize("durability", list(Durability))
def test_after_a_transaction_was_given_up(machines: Machines, durability: Durability) -> None:
    old = machines.open("one", durability=durability)
    old.push(make_update(old, [A], "u0"))
    revision = machines.bank.latest_number() + 1
    old.prepare(revision, [SetState(ref=A, state=BlockState.WITHHELD)])
    old.abort(revision)
    old.push(make_update(old, [A], "u1"))
    _meet(machines, old, durability=durability)


@pytest.mark.parametrize("fault", [StorageFault.NO_SPACE, StorageFault.LOST_RESPONSE])
def test_after_a_publication_failed(machines: Machines, fault: StorageFault) -> None:
    plan = FaultPlan(fault)
    old = machines.open("one", FaultyObjects(machines.objects, plan))
    old.push(make_update(old, [A], "u0"))
    # The slots of a block are written, then the manifest.
    plan.at = plan.num_calls + len(old.spec.roles) + 2
    with pytest.raises(MembankError):
        old.consolidate()
    old.push(make_update(old, [A], "u1"))
    _meet(machines, old)


@pytest.mark.parametrize("fault", [StorageFault.NO_SPACE, StorageFault.LOST_RESPONSE])
@pytest.mark.parametrize("skipped", range(6))
def test_an_owner_goes_on_after_any_failed_call(
    machines: Machines, fault: StorageFault, skipped: int
) -> None:
    plan = FaultPlan(fault)
    shard = machines.open("one", FaultyObjects(machines.objects, plan))
    shard.push(make_update(shard, [A], "u0"))
    plan.at = plan.num_calls + 1 + skipped
    try:
        shard.consolidate()
    except MembankError:
        shard.consolidate()
    assert plan.happened
    shard.push(make_update(shard, [A], "u1"))
    before = full_state(shard)
    shard.close()
    again = machines.open("one")
    assert full_state(again) == before
    again.close()


class _HeardTwice(UnsyncedObjects):
    """Creates the next manifest, and then says that there is no room for it.

    So does a client that repeats its request: the first answer was lost, and meanwhile a quota is
    used up.
    """

    is_armed = False

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        super().put_if_absent(key, data, durable=durable)
        if self.is_armed and "/manifests/" in key:
            self.is_armed = False
            raise ResourceExhaustedError(f"{key}: no space", reason=Reason.NO_SPACE)


def test_slots_of_a_manifest_that_is_there_after_all_stay(tmp_path: Path) -> None:
    create_bank(tmp_path)
    objects = _HeardTwice(tmp_path)
    shard = Shard.open(objects)
    shard.push(make_update(shard, [A], "u0"))
    before = full_state(shard)
    objects.is_armed = True
    with pytest.raises(ResourceExhaustedError):
        shard.consolidate()
    shard.close(consolidate=False)
    again = Shard.open(UnsyncedObjects(tmp_path))
    assert full_state(again) == before
    again.close()


@pytest.mark.parametrize(
    ("call", "part"),
    [
        ("list", "level-1/weight"),
        ("list", "manifests"),
        ("delete", "level-1/weight"),
        ("put", "manifests"),
    ],
)
def test_a_removal_by_a_paused_owner_spares_what_its_successor_wrote(
    machines: Machines, call: str, part: str
) -> None:
    objects = Interleaved(machines.objects)
    old = machines.open("one", objects)
    old.push(make_update(old, [A], "u0"))
    old.push(make_update(old, [C], "u1"))
    old.consolidate()
    record = machines.bank.decide(commit_record(machines.bank, 1, old.prepare(1, [Erase(ref=A)])))
    states = []

    def take_over() -> None:
        new = machines.open("two")
        new.push(make_update(new, [C], "v0"))
        new.consolidate()
        states.append(full_state(new))
        new.close()

    objects.before(call, part, take_over)
    # Where all is destroyed by then, it may say so.
    with suppress(UnavailableError):
        old.commit(record)
    old.close(consolidate=False)
    again = machines.open("two")
    assert [full_state(again)] == states
    again.close()


def test_a_new_owner_bears_with_an_old_one_at_work(machines: Machines) -> None:
    old = machines.open("one")
    old.push(make_update(old, [A], "u0"))
    old.consolidate()
    objects = Interleaved(machines.objects)

    def work() -> None:
        old.push(make_update(old, [A], "u1"))
        old.consolidate()

    objects.before("get", "manifests", work)
    new = machines.open("two", objects)
    assert new.describe([A])[0].version == 2
    new.close()
    old.close(consolidate=False)


def _folds(objects: Interleaved) -> list[str]:
    return [key for call, key in objects.calls if call == "put_if_absent" and "/c." in key]


def test_an_opening_folds_nothing_where_nothing_was_deleted(machines: Machines) -> None:
    objects = Interleaved(machines.objects)
    shard = machines.open("one", objects)
    shard.push(make_update(shard, [A], "u0"))
    objects.before(
        "put_if_absent", "0000/manifests", lambda: shard.push(make_update(shard, [A], "u1"))
    )
    shard.consolidate()
    shard.close(consolidate=False)
    objects.calls.clear()
    again = machines.open("one", objects)
    assert again.describe([A])[0].version == 2
    assert _folds(objects) == []
    again.close()
