"""The shards of a service: opened, looked after side by side, made anew, closed."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from local_actors import LocalActor, LocalActors, away
from membank.bank_service.cluster.actors import (
    close_shards,
    end_service,
    end_shards,
    shard_names,
)
from membank.bank_service.cluster.config import UpConfig
from membank.bank_service.cluster.fleet import ShardFleet
from membank.bank_service.cluster.identity import ShardSettings
from membank.bank_service.store import Bank
from membank.wire.errors import MembankError, Reason, UnavailableError
from membank.wire.spec import BlockRef
from tiny_bank import create_bank, make_update

SHARDS = ["shard-0", "shard-1"]
START_S = 5.0


class Time:
    """A clock that stands still but for who sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Storage:
    """Keeps the shards named in `broken` from opening."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.num_starts = 0

    def __call__(self, settings: ShardSettings) -> None:
        self.num_starts += 1
        if settings.shard_id in self.broken:
            raise UnavailableError("the storage failed", reason=Reason.STORE_FAILED)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return create_bank(tmp_path / "bank")


@pytest.fixture
def storage() -> Storage:
    return Storage()


@pytest.fixture
def actors(storage: Storage) -> Iterator[LocalActors]:
    actors = LocalActors(before_start=storage)
    yield actors
    actors.end()


def fleet_of(bank: Bank, actors: LocalActors, time: Time | None = None) -> ShardFleet:
    time = time or Time()
    return ShardFleet(UpConfig(bank_url=bank.url), bank.spec, actors, clock=time, sleep=time.sleep)


def served(fleet: ShardFleet) -> list[bool]:
    return [status.alive for status in fleet.statuses()]


def test_a_start_that_failed_is_repeated_on_the_same_actors(
    bank: Bank, actors: LocalActors, storage: Storage
) -> None:
    storage.broken = {"shard-1"}
    for _ in range(2):
        with pytest.raises(UnavailableError, match="the storage failed"):
            fleet_of(bank, actors).start(START_S)
    assert storage.num_starts == 3, "one that is open is left alone"
    storage.broken = set()
    fleet = fleet_of(bank, actors)
    fleet.start(START_S)
    assert served(fleet) == [True, True]
    assert {owner.partition for owner in fleet.placement().owners} == {0, 1}


def test_a_shard_that_is_closed_keeps_no_other_one_from_being_served_again(
    bank: Bank, actors: LocalActors, storage: Storage
) -> None:
    fleet_of(bank, actors).start(START_S)
    actors.kill(actors.find("shard-1"))
    storage.broken = {"shard-1"}
    time = Time()
    again = fleet_of(bank, actors, time)
    again.start(START_S, insist=False)
    assert served(again) == [True, False]
    assert "the storage failed" in again.statuses()[1].problem
    assert {owner.partition for owner in again.placement().owners} == {0}
    storage.broken = set()
    time.now += 60
    for _ in range(2):
        again.supervise()
    assert served(again) == [True, True]
    assert {owner.partition for owner in again.placement().owners} == {0, 1}


def test_shards_are_looked_after_side_by_side(bank: Bank, actors: LocalActors) -> None:
    fleet = fleet_of(bank, actors)
    fleet.start(START_S)
    meet = threading.Barrier(len(SHARDS), timeout=20)

    def before_call(shard_id: str, method: str) -> None:
        if method == "identity":
            meet.wait()
            raise away(shard_id)

    actors.before_call = before_call
    fleet.supervise()
    assert served(fleet) == [False, False]
    assert not meet.broken


def test_a_shard_that_is_gone_is_made_anew_once_there_is_a_node(
    bank: Bank, actors: LocalActors
) -> None:
    fleet = fleet_of(bank, actors)
    fleet.start(START_S)
    actors.kill(actors.find("shard-0"))
    nodes, actors.node_list = actors.node_list, []
    fleet.supervise()
    assert served(fleet) == [False, True]
    actors.node_list = [("node-2", nodes[0][1])]
    for _ in range(2):
        fleet.supervise()
    assert served(fleet) == [True, True]


def test_a_fleet_that_has_ended_makes_and_opens_nothing_any_more(
    bank: Bank, actors: LocalActors, storage: Storage
) -> None:
    fleet = fleet_of(bank, actors)
    fleet.start(START_S)
    fleet.end()
    end_shards(actors, ["shard-0"], 1.0)
    assert close_shards(actors, ["shard-1"], 1.0) == ()
    fleet.supervise()
    assert actors.find("shard-0") is None
    assert storage.num_starts == len(SHARDS), "the other one stays closed"
    with pytest.raises(UnavailableError, match="being stopped"):
        fleet.start(START_S)
    assert actors.find("shard-0") is None


def test_what_an_earlier_service_left_is_folded_and_replaced(
    bank: Bank, actors: LocalActors
) -> None:
    fleet_of(bank, actors).start(START_S)
    left = actors.find("shard-0")
    shard = actors.servers["shard-0"].shard
    shard.push(make_update(shard, [BlockRef(1, 0)], "u0"))
    fleet = fleet_of(bank, actors)
    fleet.start(START_S, adopt=False)
    assert shard.is_folded
    assert actors.find("shard-0") is not left
    assert served(fleet) == [True, True]


def test_shards_are_told_a_placement_once(bank: Bank, actors: LocalActors) -> None:
    told = []

    def before_call(shard_id: str, method: str) -> None:
        if method == "set_placement":
            told.append(shard_id)

    actors.before_call = before_call
    fleet = fleet_of(bank, actors)
    fleet.start(START_S)
    fleet.supervise()
    assert sorted(told) == SHARDS


def test_a_service_of_too_few_nodes_says_so(bank: Bank, actors: LocalActors) -> None:
    actors.node_list = []
    with pytest.raises(UnavailableError, match="Ray has 0 nodes"):
        fleet_of(bank, actors).start(START_S)


def test_shards_that_are_let_go_fold_and_stay_closed(bank: Bank, actors: LocalActors) -> None:
    fleet = fleet_of(bank, actors)
    fleet.start(START_S)
    shard = actors.servers["shard-0"].shard
    shard.push(make_update(shard, [BlockRef(1, 0)], "u0"))
    fleet.let_go(UnavailableError("another one has the bank"), 1.0)
    assert [status.problem for status in fleet.statuses()] == ["another one has the bank"] * 2
    assert shard.is_folded
    for shard_id in SHARDS:
        with pytest.raises(MembankError):
            actors.call(actors.find(shard_id), "identity", timeout_s=1.0, who=shard_id)


def test_only_shards_that_say_so_have_left_nothing(
    bank: Bank, actors: LocalActors, storage: Storage
) -> None:
    storage.broken = {"shard-1"}
    fleet_of(bank, actors).start(START_S, insist=False)
    shards = [*SHARDS, "shard-2"]
    assert close_shards(actors, shards, 1.0) == ("shard-1", "shard-2")
    assert end_shards(actors, shards, 1.0) == ("shard-1", "shard-2")
    assert [actors.find(shard_id) for shard_id in shards] == [None] * 3


class Many:
    """Actors of shards of which each answers only while all the others are asked."""

    node_ip = "127.0.0.1"

    def __init__(self, num_shards: int) -> None:
        self._meet = threading.Barrier(num_shards, timeout=20)

    def nodes(self) -> list[tuple[str, str]]:
        return []

    def make(self, settings: ShardSettings, node_id: str) -> object:
        raise AssertionError(settings)

    def find(self, shard_id: str) -> object | None:
        return shard_id

    def kill(self, actor: object) -> None: ...

    def restart(self, actor: object) -> None: ...

    def tell(self, actor: object, method: str) -> None: ...

    def call(
        self,
        actor: object,
        method: str,
        *arguments: object,
        options: Mapping[str, object] | None = None,
        timeout_s: float,
        who: str,
    ) -> object:
        with suppress(threading.BrokenBarrierError):
            self._meet.wait()
        return not self._meet.broken


def test_many_shards_are_closed_in_the_time_of_one() -> None:
    assert close_shards(Many(100), shard_names(100), 1.0) == ()


def test_a_shard_that_does_not_answer_is_ended_all_the_same(
    bank: Bank, actors: LocalActors
) -> None:
    fleet_of(bank, actors).start(START_S)

    def before_call(shard_id: str, method: str) -> None:
        if shard_id == "shard-0":
            raise away(shard_id)

    actors.before_call = before_call
    assert end_shards(actors, SHARDS, 1.0) == ("shard-0",)
    assert actors.find("shard-0") is None


def test_shards_whose_controller_does_not_answer_fold_all_the_same(
    bank: Bank, actors: LocalActors
) -> None:
    fleet_of(bank, actors).start(START_S)
    shard = actors.servers["shard-0"].shard
    shard.push(make_update(shard, [BlockRef(1, 0)], "u0"))
    settings = replace(actors.servers["shard-0"]._settings, shard_id="controller")
    dead = LocalActor(settings, object())
    assert end_service(actors, dead, SHARDS, 1.0) == ()
    assert shard.is_folded
    assert [actors.find(shard_id) for shard_id in SHARDS] == [None, None]


def test_a_recycled_shard_is_another_one_and_serves(bank: Bank, actors: LocalActors) -> None:
    fleet = fleet_of(bank, actors)
    fleet.start(START_S)
    before = {shard_id: actors.servers[shard_id].identity for shard_id in SHARDS}
    shard = actors.servers["shard-0"].shard
    shard.push(make_update(shard, [BlockRef(1, 0)], "u0"))
    lives = [member.handle.process for member in fleet.members()]
    fleet.recycle(["shard-0"])
    after = [member.handle.process for member in fleet.members()]
    assert (after[0] != lives[0], after[1] == lives[1]) == (True, True)
    assert actors.servers["shard-0"].identity.incarnation != before["shard-0"].incarnation
    assert actors.servers["shard-1"].identity == before["shard-1"]
    assert actors.servers["shard-0"].shard.describe([BlockRef(1, 0)])[0].version == 1
    assert fleet.all_serve()
    endpoints = {owner.shard_id: owner.endpoint for owner in fleet.placement().owners}
    assert endpoints["shard-0"] == actors.servers["shard-0"].identity.endpoint
    assert fleet.statuses()[0].num_restarts == 1


def test_a_shard_that_does_not_come_back_is_said_so_and_looked_after(
    bank: Bank, actors: LocalActors
) -> None:
    fleet = fleet_of(bank, actors)
    fleet.start(START_S)
    asked: list[str] = []

    def before_call(shard_id: str, method: str) -> None:
        asked.append(method)
        if method == "identity" and "stop" in asked:
            raise away(shard_id)

    actors.before_call = before_call
    with pytest.raises(UnavailableError):
        fleet.recycle(["shard-0"], 1.0)
    assert not fleet.all_serve()
    actors.before_call = lambda shard_id, method: None
    fleet.supervise()
    assert fleet.all_serve()


def test_a_shard_that_a_controller_stopped_and_did_not_end_is_opened_again(
    bank: Bank, actors: LocalActors
) -> None:
    fleet_of(bank, actors).start(START_S)
    # As a controller that is killed in the midst of recycling, or moving, leaves it.
    assert close_shards(actors, ["shard-0"], 1.0) == ()
    again = fleet_of(bank, actors)
    again.start(START_S, insist=False)
    again.supervise()
    assert served(again) == [True, True]


def test_what_a_shard_said_before_it_was_recycled_does_not_count(
    bank: Bank, actors: LocalActors
) -> None:
    fleet = fleet_of(bank, actors)
    fleet.start(START_S)
    is_recycled, is_looked_after = threading.Event(), threading.Event()
    recycling = threading.Thread(target=lambda: fleet.recycle(["shard-0"], 60.0))

    def before_call(shard_id: str, method: str) -> None:
        if threading.current_thread() is recycling or shard_id != "shard-0":
            return
        if method == "consolidate":
            is_recycled.set()
            assert is_looked_after.wait(30)
        elif method == "identity" and not recycling.is_alive() and not is_recycled.is_set():
            recycling.start()
            assert is_recycled.wait(30)
            raise UnavailableError("the shard is stopped; retry", reason=Reason.NOT_RUNNING)

    actors.before_call = before_call
    fleet.supervise()
    assert fleet.statuses()[0].problem == "shard-0 is started anew; retry"
    is_looked_after.set()
    recycling.join()
    assert fleet.all_serve()
