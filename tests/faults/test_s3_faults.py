"""Requests to S3 that fail on the way: the right answer or a clear error, in time, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest

from fault_proxy import Dice, Fault, FaultProxy, Plan, Rule, Script
from membank.bank_service.fsck import check_bank
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.store import (
    Bank,
    FsspecObjects,
    LocalObjects,
    ObjectStore,
    S3Config,
    S3Objects,
    publish,
)
from membank.bank_service.store.objects import Viewable
from membank.wire.errors import AlreadyExistsError, NotFoundError, Reason, UnavailableError
from membank.wire.records import Gradient, Update
from membank.wire.spec import BankSpec, BlockRef
from s3_server import S3Place, S3Server
from tiny_bank import full_state, gradient_for, tiny_spec

pytestmark = pytest.mark.s3

T = TypeVar("T")

# Short enough that a stall is found soon, long enough for a busy machine to answer at all.
PATIENT = S3Config(
    connect_timeout_s=2, stall_timeout_s=0.5, transfer_timeout_s=1.5, retry_s=20, max_backoff_s=0.2
)
BOUNDED = S3Config(
    connect_timeout_s=1, stall_timeout_s=0.3, transfer_timeout_s=0.6, retry_s=1, max_backoff_s=0.2
)
# A busy machine must not look like a fault where nothing is tried again.
IMPATIENT = S3Config(retry_s=0)
# What a call may take on top of its bound where other tests keep the machine busy.
SLACK_S = 5.0

STALLS = {Fault.STALL_BEFORE, Fault.STALL_AFTER, Fault.STALL_BODY}
QUICK = tuple(fault for fault in Fault if fault not in STALLS)
UNDONE = {Fault.ANSWER, Fault.RESET_BEFORE, Fault.STALL_BEFORE}
"""Faults of which the server has not heard."""
FAULTS = [
    pytest.param(fault, id=fault.name, marks=[pytest.mark.slow] if fault in STALLS else [])
    for fault in Fault
]

SMALL = b"0123456789"
LARGE = bytes(range(251)) * 4000


@dataclass
class World:
    """A proxy before the server, and stores whose way leads through it."""

    place: S3Place
    proxy: FaultProxy
    stores: dict[str, ObjectStore]
    bounded: dict[str, ObjectStore]


@pytest.fixture(scope="module")
def world(s3_server: S3Server) -> Iterator[World]:
    # For the module: an s3fs makes a client of its own, which takes longer than most tests.
    with FaultProxy(s3_server.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_server.owner.environment.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        place = S3Place(s3_server.make_place(), s3_server, lambda _: None)
        yield World(
            place,
            proxy,
            _stores(f"{place.url}/bank", PATIENT),
            _stores(f"{place.url}/bank", BOUNDED),
        )
        s3_server.clear(place.url)


def _stores(url: str, config: S3Config) -> dict[str, ObjectStore]:
    return {"obstore": S3Objects(url, config), "s3fs": FsspecObjects(f"fsspec+{url}", config)}


@pytest.fixture(params=["obstore", pytest.param("s3fs", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def _once(fault: Fault, **details: str) -> Plan:
    return Script(Rule(fault=fault, **details))  # type: ignore[arg-type]


def _always(fault: Fault) -> Plan:
    return Script(Rule(fault=fault, times=None))


# ---- one request of a call fails


@pytest.mark.parametrize("fault", FAULTS)
def test_reads_are_right(world: World, kind: str, fault: Fault) -> None:
    store, folder = world.stores[kind], f"reads/{kind}/{fault.name}"
    world.place.write(f"bank/{folder}/small", SMALL)
    world.place.write(f"bank/{folder}/large", LARGE)
    reads: list[tuple[Callable[[], object], object]] = [
        (lambda: store.get(f"{folder}/small"), SMALL),
        (lambda: store.get(f"{folder}/large"), LARGE),
        (lambda: store.get_range(f"{folder}/small", 3, 7), SMALL[3:7]),
        (lambda: store.get_range(f"{folder}/small", 0, 0), b""),
        (lambda: store.list(folder), [f"{folder}/large", f"{folder}/small"]),
    ]
    if isinstance(store, Viewable):
        reads.append((lambda: store.get_view(f"{folder}/large"), LARGE))
    for read, expected in reads:
        before = world.proxy.num_faults
        with world.proxy.following(_once(fault)):
            assert read() == expected
        assert world.proxy.num_faults == before + 1


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_stays_missing(world: World, kind: str, fault: Fault) -> None:
    store = world.stores[kind]
    with world.proxy.following(_once(fault)), pytest.raises(NotFoundError):
        store.get("no/such")
    with world.proxy.following(_once(fault)):
        store.delete("no/such")


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("fault", FAULTS)
def test_puts_and_deletes_are_done(world: World, kind: str, fault: Fault, content: bytes) -> None:
    store, key = world.stores[kind], f"writes/{kind}/{fault.name}/{len(content)}"
    world.place.write(f"bank/{key}", b"before")
    with world.proxy.following(_once(fault, method="PUT")):
        store.put(key, content)
    assert world.place.read(f"bank/{key}") == content
    with world.proxy.following(_once(fault, method="DELETE")):
        store.delete(key)
    assert store.list(f"writes/{kind}/{fault.name}") == []


@pytest.mark.parametrize("content", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_create_is_done_or_seems_a_conflict_with_itself(
    world: World, kind: str, fault: Fault, content: bytes
) -> None:
    store, key = world.stores[kind], f"creates/{kind}/{fault.name}/{len(content)}"
    with world.proxy.following(_once(fault)):
        if fault in UNDONE:
            store.put_if_absent(key, content)
        else:
            # The contract says so: who must know calls `publish`, who does not takes another key.
            with pytest.raises(AlreadyExistsError):
                store.put_if_absent(key, content)
    assert world.place.read(f"bank/{key}") == content


@pytest.mark.parametrize("fault", FAULTS)
def test_a_publication_is_no_conflict_with_itself(world: World, kind: str, fault: Fault) -> None:
    store, key = world.stores[kind], f"publish/{kind}/{fault.name}"
    before = world.proxy.num_faults
    with world.proxy.following(_once(fault)):
        publish(store, key, b"nonce of ours")
    assert world.proxy.num_faults == before + 1
    assert world.place.read(f"bank/{key}") == b"nonce of ours"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_publication_does_not_take_anothers_object_for_its_own(
    world: World, kind: str, fault: Fault
) -> None:
    store, key = world.stores[kind], f"taken/{kind}/{fault.name}"
    world.place.write(f"bank/{key}", b"nonce of another")
    with world.proxy.following(_once(fault)), pytest.raises(AlreadyExistsError):
        publish(store, key, b"nonce of ours")
    assert world.place.read(f"bank/{key}") == b"nonce of another"


# ---- every request fails


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(Fault))
def test_endless_faults_end_within_the_bound(world: World, kind: str, fault: Fault) -> None:
    store, key = world.bounded[kind], f"endless/{kind}/{fault.name}"
    world.place.write(f"bank/{key}/there", SMALL)
    verbs: list[Callable[[], object]] = [
        lambda: store.get(f"{key}/there"),
        lambda: store.get_range(f"{key}/there", 0, 4),
        lambda: store.put(f"{key}/put", SMALL),
        lambda: store.put(f"{key}/put-large", LARGE),
        lambda: store.list(key),
        lambda: store.delete(f"{key}/there"),
    ]

    def time_of(verb: Callable[[], object]) -> float:
        begun = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            verb()
        assert caught.value.reason is Reason.STORE_FAILED
        return time.monotonic() - begun

    with world.proxy.following(_always(fault)), ThreadPoolExecutor(len(verbs)) as pool:
        times = list(pool.map(time_of, verbs))
    bound = BOUNDED.retry_s + BOUNDED.max_backoff_s + BOUNDED.transfer_timeout_s
    assert max(times) < bound + SLACK_S
    # It did go on as long as it was told to.
    assert min(times) > BOUNDED.retry_s / 2


@pytest.mark.slow
def test_a_publication_that_nobody_answers_ends_within_twice_the_bound(
    world: World, kind: str
) -> None:
    begun = time.monotonic()
    with world.proxy.following(_always(Fault.STALL_AFTER)), pytest.raises(UnavailableError):
        publish(world.bounded[kind], f"endless/{kind}/publish", b"nonce")
    bound = BOUNDED.retry_s + BOUNDED.max_backoff_s + BOUNDED.transfer_timeout_s
    assert time.monotonic() - begun < 2 * bound + SLACK_S


@pytest.mark.slow
def test_one_who_comes_to_publish_after_an_outage_learns_the_truth(world: World, kind: str) -> None:
    # The put was done, and nobody learnt of it before the bound: then the object is asked.
    store, key = world.bounded[kind], f"outage/{kind}"
    with world.proxy.following(_always(Fault.RESET_AFTER)), pytest.raises(UnavailableError):
        publish(store, key, b"nonce")
    publish(store, key, b"nonce")
    with pytest.raises(AlreadyExistsError):
        publish(store, key, b"nonce of another")


# ---- many requests fail at random


@pytest.mark.slow
def test_of_many_publishers_one_wins_and_knows_it(world: World, kind: str) -> None:
    store = world.stores[kind]

    def race(turn: int, number: int, barrier: threading.Barrier) -> int | None:
        barrier.wait()
        try:
            publish(store, f"race/{kind}/{turn}", f"nonce {number}".encode())
        except AlreadyExistsError:
            return None
        return number

    plan = Dice(seed=5, share=0.4, faults=QUICK)
    with world.proxy.following(plan), ThreadPoolExecutor(4) as pool:
        for turn in range(12):
            barrier = threading.Barrier(4)
            found = pool.map(race, [turn] * 4, range(4), [barrier] * 4)
            (winner,) = [number for number in found if number is not None]
            assert world.place.read(f"bank/race/{kind}/{turn}") == f"nonce {winner}".encode()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_readers_of_an_object_that_is_replaced_see_one_whole_state(world: World, kind: str) -> None:
    store, key = world.stores[kind], f"replaced/{kind}"
    states = [bytes([number]) * 300_000 for number in range(2)]
    world.place.write(f"bank/{key}", states[0])
    stop = threading.Event()

    def write() -> int:
        turns = 0
        while not stop.is_set():
            turns += 1
            store.put(key, states[turns % 2])
        return turns

    def read(_: int) -> set[bool]:
        return {store.get(key) in states for _ in range(15)}

    plan = Dice(seed=6, share=0.2, faults=QUICK)
    with world.proxy.following(plan), ThreadPoolExecutor(5) as pool:
        writer = pool.submit(write)
        whole = list(pool.map(read, range(4)))
        stop.set()
        assert writer.result() > 1
    assert whole == [{True}] * 4


# ---- a whole shard


NUM_UPDATES = 25
REFS = (BlockRef(1, 0), BlockRef(1, 1), BlockRef(2, 5))
"""What every update touches; blocks of both partitions."""


def _numbered_update(spec: BankSpec, number: int) -> Update:
    """Return the update that moves every block from version `number` on."""
    return Update(
        request_id=f"u{number}",
        step=number,
        gradients=tuple(
            Gradient(ref=ref, base_version=number, values=gradient_for(spec, ref, number))
            for ref in REFS
        ),
    )


def _insist(action: Callable[[], T]) -> T:
    """Repeat what a client repeats until it succeeds."""
    end = time.monotonic() + 120
    while True:
        try:
            return action()
        except UnavailableError:
            if time.monotonic() > end:
                raise


def _push_all(shard: Shard) -> None:
    for number in range(NUM_UPDATES):
        update = _numbered_update(shard.spec, number)
        result = _insist(partial(shard.push, update))
        assert all(found.accepted for found in result.results), result


@pytest.mark.slow
def test_a_slot_whose_answer_was_lost_is_left_for_another(
    world: World, kind: str, tmp_path: Path
) -> None:
    # The writer cannot tell its own object from a stranger's, and takes the next slot.
    store = _stores(f"{world.place.url}/slots-{kind}", PATIENT)[kind]
    Bank.create(store, tiny_spec())
    config = ShardConfig(journal_dir=str(tmp_path), lease_s=0)
    shard = Shard.open(store, config=config)
    shard.push(_numbered_update(shard.spec, 0))
    state = full_state(shard)
    rule = Rule(fault=Fault.RESET_AFTER, method="PUT", path=r"/level-\d/weight/c\.", times=3)
    before = world.proxy.num_faults
    with world.proxy.following(Script(rule)):
        shard.consolidate()
    assert world.proxy.num_faults == before + 3
    shard.close()
    again = Shard.open(store, config=config)
    assert full_state(again) == state
    again.close()
    assert check_bank(store, journal_dir=tmp_path).is_clean


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("durability", [Durability.PROCESS, Durability.STORE])
@pytest.mark.parametrize("patient", [True, False], ids=["patient", "impatient"])
def test_a_shard_keeps_every_acknowledged_update_once(
    world: World, kind: str, tmp_path: Path, durability: Durability, patient: bool
) -> None:
    def open_shard(store: ObjectStore, machine: str) -> Shard:
        config = ShardConfig(
            journal_dir=str(tmp_path / machine),
            durability=durability,
            consolidate_bytes=3000,
            segment_bytes=1500,
            lease_s=0.5,
        )
        return Shard.open(store, config=config)

    url = f"{world.place.url}/shard-{kind}-{durability}-{patient}"
    # Without patience every fault reaches the shard, which must bear it too.
    plan = Dice(1, 0.1) if patient else Dice(1, 0.03, faults=QUICK)
    config = PATIENT if patient else IMPATIENT
    disturbed = _stores(url, config)[kind]
    Bank.create(disturbed, tiny_spec())
    before = world.proxy.num_faults
    with world.proxy.following(plan):
        shard = _insist(lambda: open_shard(disturbed, "one"))
        _push_all(shard)
        # A kill, then the same machine again.
        shard.close(consolidate=False)
        again = _insist(lambda: open_shard(disturbed, "one"))
    assert world.proxy.num_faults > before + 5
    found = full_state(again)
    again.close()

    undisturbed = LocalObjects(tmp_path / "twin")
    Bank.create(undisturbed, tiny_spec())
    twin = open_shard(undisturbed, "two")
    _push_all(twin)
    assert {status.version for status in twin.describe(REFS)} == {NUM_UPDATES}
    assert found == full_state(twin)
    twin.close()
