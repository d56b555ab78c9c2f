"""A service's claim on a bank: who is refused, who takes over, and who ceases."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from claim_reader import read_claim
from membank.bank_service.cluster.claim import (
    BankClaim,
    Claim,
    replaced,
    require_claim,
)
from membank.bank_service.fsck import check_bank
from membank.bank_service.store import Data, LocalObjects
from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.format.layout import CLAIMS, claim_key
from storage_faults import FaultPlan, FaultyObjects, Outage, StorageFault
from tiny_bank import create_bank

# The thread of a claim never gets to beat; tests do.
NEVER_S = 60.0


class Time:
    """Time that passes when somebody sleeps, and what happens meanwhile."""

    def __init__(self, *meanwhile: Callable[[], None]) -> None:
        self.slept = 0.0
        self._meanwhile = list(meanwhile)

    def __call__(self, seconds: float) -> None:
        self.slept += seconds
        if self._meanwhile:
            self._meanwhile.pop(0)()


class Slow(LocalObjects):
    """Storage whose next write to a claim arrives only after what happens `meanwhile`."""

    meanwhile: Callable[[], None] | None = None

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._wait()
        super().put(key, data, durable=durable)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._wait()
        super().put_if_absent(key, data, durable=durable)

    def _wait(self) -> None:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path)


def take(objects: LocalObjects, service: str, time: Time | None = None) -> BankClaim:
    return BankClaim.take(
        objects,
        service=service,
        host=f"host-{service}",
        endpoint=f"{service}:7600",
        beat_every_s=NEVER_S,
        sleep=time or Time(),
    )


def resume(objects: LocalObjects, service: str) -> BankClaim:
    return BankClaim.resume(
        objects, service=service, host="elsewhere", endpoint="new:1", beat_every_s=NEVER_S
    )


def leave_dead(objects: LocalObjects, service: str) -> Claim:
    """Write the claim of a service that will never change it."""
    claim = Claim(service=service, host="h", endpoint="e:1", beat=3, beat_every_s=3.0)
    objects.put(claim_key(1), json.dumps(asdict(claim)).encode())
    return claim


def all_claims(objects: LocalObjects) -> dict[str, bytes]:
    return {key: objects.get(key) for key in objects.list(CLAIMS)}


def test_a_free_bank_is_claimed_at_once_and_given_back(objects: LocalObjects) -> None:
    time = Time()
    claim = take(objects, "a", time)
    assert time.slept == 0
    found = read_claim(objects)
    assert found is not None
    assert (found.service, found.host, found.endpoint) == ("a", "host-a", "a:7600")
    require_claim(objects, "a")
    claim.release()
    assert read_claim(objects) is None
    again = take(objects, "b", time)
    assert time.slept == 0
    again.release()


def test_a_beat_changes_the_claim(objects: LocalObjects) -> None:
    claim = take(objects, "a")
    before = read_claim(objects)
    claim.beat()
    assert before is not None
    assert read_claim(objects) not in (before, None)
    claim.release()
    claim.beat()
    assert read_claim(objects) is None


def test_the_thread_of_a_claim_beats_by_itself(objects: LocalObjects) -> None:
    changed = threading.Event()

    class Watched(LocalObjects):
        def put(self, key: str, data: Data, *, durable: bool = False) -> None:
            super().put(key, data, durable=durable)
            changed.set()

    claim = BankClaim.take(
        Watched(objects.root), service="a", host="h", endpoint="e", beat_every_s=0.001
    )
    assert changed.wait(10)
    claim.release()
    assert read_claim(objects) is None


def test_who_finds_a_living_service_is_told_which_as_soon_as_it_stirs(
    objects: LocalObjects,
) -> None:
    living = take(objects, "a")
    living.beat()
    before = all_claims(objects)
    time = Time(lambda: None, living.beat)
    with pytest.raises(FailedPreconditionError) as caught:
        take(objects, "b", time)
    assert caught.value.reason is Reason.BANK_IN_USE
    assert caught.value.metadata == {"bank": objects.url, "endpoint": "a:7600", "host": "host-a"}
    assert "a:7600 on host-a" in str(caught.value)
    assert time.slept == 2 * NEVER_S
    assert all_claims(objects).keys() == before.keys()
    assert all_claims(objects) != before  # by the living one
    assert living.lost_to is None
    require_claim(objects, "a")
    living.release()


def test_a_dead_claim_is_taken_over_after_five_of_its_beats(objects: LocalObjects) -> None:
    dead = leave_dead(objects, "a")
    time = Time()
    claim = take(objects, "b", time)
    assert time.slept == 5 * dead.beat_every_s
    require_claim(objects, "b")
    claim.release()


def test_a_claim_that_is_given_back_meanwhile_is_not_waited_for(objects: LocalObjects) -> None:
    other = take(objects, "a")
    time = Time(other.release)
    claim = take(objects, "b", time)
    assert time.slept <= 2 * NEVER_S
    require_claim(objects, "b")
    claim.release()


def test_of_two_that_find_the_same_dead_claim_one_is_refused(tmp_path: Path) -> None:
    slow = Slow(tmp_path)
    leave_dead(slow, "a")
    others: list[BankClaim] = []
    # The other one saw the same dead claim, and is the first to say so.
    slow.meanwhile = lambda: others.append(take(LocalObjects(tmp_path), "c"))
    nothing = [lambda: None] * 5
    with pytest.raises(FailedPreconditionError) as caught:
        take(slow, "b", Time(*nothing, lambda: others[0].beat()))
    assert caught.value.reason is Reason.BANK_IN_USE
    assert caught.value.metadata["endpoint"] == "c:7600"
    require_claim(slow, "c")
    others[0].release()


def test_a_bank_that_is_given_back_goes_to_one_of_those_that_waited(tmp_path: Path) -> None:
    slow = Slow(tmp_path)
    first = take(slow, "a")
    others: list[BankClaim] = []

    def give_back() -> None:
        first.release()
        slow.meanwhile = lambda: others.append(take(LocalObjects(tmp_path), "c"))

    with pytest.raises(FailedPreconditionError) as caught:
        take(slow, "b", Time(give_back, lambda: others[0].beat()))
    assert caught.value.metadata["endpoint"] == "c:7600"
    assert others[0].lost_to is None
    require_claim(slow, "c")
    others[0].release()


def test_a_change_that_arrives_late_takes_nothing_back(tmp_path: Path) -> None:
    slow, objects = Slow(tmp_path), LocalObjects(tmp_path)
    first = take(slow, "a")
    others: list[BankClaim] = []
    slow.meanwhile = lambda: others.append(take(objects, "b"))
    first.beat()
    (second,) = others
    require_claim(objects, "b")
    second.beat()
    assert second.lost_to is None
    first.beat()
    assert first.lost_to is not None
    assert first.lost_to.service == "b"
    second.release()


def test_a_service_that_ends_late_ends_no_other_one(tmp_path: Path) -> None:
    slow, objects = Slow(tmp_path), LocalObjects(tmp_path)
    first = take(slow, "a")
    others: list[BankClaim] = []
    slow.meanwhile = lambda: others.append(take(objects, "b"))
    first.release()
    require_claim(objects, "b")
    others[0].release()


def test_a_number_that_was_given_up_meanwhile_is_no_claim(tmp_path: Path) -> None:
    slow, objects = Slow(tmp_path), LocalObjects(tmp_path)
    leave_dead(slow, "a")
    others: list[BankClaim] = []

    def overtake() -> None:
        others.append(take(objects, "c"))
        others.append(take(objects, "d"))
        others[-1].beat()
        assert objects.list(CLAIMS) == [claim_key(3)], "what does not count any more is removed"

    slow.meanwhile = overtake
    nothing = [lambda: None] * 5
    with pytest.raises(FailedPreconditionError) as caught:
        take(slow, "b", Time(*nothing, lambda: others[-1].beat()))
    assert caught.value.metadata["endpoint"] == "d:7600"
    require_claim(objects, "d")
    for other in others:
        other.release()


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"{",
        b"[1]",
        b"\xff\xfe",
        b'{"service": "a"}',
        b'{"service": "a", "host": "h", "endpoint": "e", "beat": "x", "beat_every_s": 3}',
        b'{"service": "a", "host": "h", "endpoint": "e", "beat": 1, "beat_every_s": NaN}',
        b'{"service": "a", "host": "h", "endpoint": "e", "beat": 1, "beat_every_s": 1e9}',
        b'{"service": "a", "host": "h", "endpoint": "e", "beat": 1, "beat_every_s": -1}',
    ],
)
def test_a_damaged_claim_keeps_no_bank_shut(objects: LocalObjects, damaged: bytes) -> None:
    objects.put(claim_key(7), damaged)
    with pytest.raises(UnavailableError, match="not claimed"):
        require_claim(objects, "a")
    claim = take(objects, "b")
    require_claim(objects, "b")
    claim.release()


def test_a_damaged_claim_neither_replaces_a_living_one_nor_keeps_a_dead_one(
    objects: LocalObjects,
) -> None:
    living = take(objects, "a")
    objects.put(claim_key(2), b"{")
    objects.put("claims/copy of 0000000001.json", objects.get(claim_key(1)))
    living.beat()
    require_claim(objects, "a")
    with pytest.raises(FailedPreconditionError):
        take(objects, "b", Time(living.beat))
    claim = take(objects, "b")
    living.beat()
    assert living.lost_to is not None
    claim.release()


def test_a_claim_of_a_later_version_counts(objects: LocalObjects) -> None:
    def stir(beat: int) -> None:
        claim = Claim(service="z", host="h", endpoint="e:1", beat=beat, beat_every_s=1.0)
        objects.put(claim_key(1), json.dumps({**asdict(claim), "zone": "b"}).encode())

    stir(1)
    with pytest.raises(FailedPreconditionError, match="e:1"):
        take(objects, "b", Time(lambda: stir(2)))


def test_an_answer_that_was_lost_is_no_other_service(tmp_path: Path) -> None:
    class LosesTheFirst(LocalObjects):
        """Repeats a create whose answer was lost, as stores behind a network do."""

        def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
            super().put(key, data)
            super().put_if_absent(key, data, durable=durable)

    time = Time()
    claim = take(LosesTheFirst(tmp_path), "a", time)
    assert time.slept == 0
    claim.release()


def test_what_cannot_be_written_leaves_no_claim(objects: LocalObjects) -> None:
    class LosesEveryAnswer(LocalObjects):
        def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
            with suppress(AlreadyExistsError):
                super().put_if_absent(key, data, durable=durable)
            raise UnavailableError("no answer", reason=Reason.STORE_FAILED)

    with pytest.raises(UnavailableError):
        take(LosesEveryAnswer(objects.root), "a")
    assert read_claim(objects) is None
    time = Time()
    claim = take(objects, "b", time)
    assert time.slept == 0
    claim.release()


@pytest.mark.parametrize("fault", [StorageFault.LOST_RESPONSE, StorageFault.NO_SPACE])
def test_a_claim_that_fails_once_is_made_or_refused(
    objects: LocalObjects, fault: StorageFault
) -> None:
    faulty = FaultyObjects(objects, FaultPlan(fault, at=1))
    try:
        claim = BankClaim.take(
            faulty, service="a", host="h", endpoint="e", beat_every_s=NEVER_S, sleep=Time()
        )
    except ResourceExhaustedError:
        assert read_claim(objects) is None
    else:
        require_claim(objects, "a")
        claim.release()


def test_a_controller_that_comes_back_goes_on_with_its_claim(objects: LocalObjects) -> None:
    take(objects, "a").beat()  # and dies: nobody releases it
    before = read_claim(objects)
    again = resume(objects, "a")
    now = read_claim(objects)
    assert before is not None
    assert now is not None
    assert again.lost_to is None
    assert now.beat > before.beat, "who watches must see that it lives"
    assert now.endpoint == "new:1"
    again.release()
    assert read_claim(objects) is None


def test_a_controller_that_comes_back_to_no_claim_writes_one(objects: LocalObjects) -> None:
    claim = resume(objects, "a")
    assert claim.lost_to is None
    require_claim(objects, "a")
    claim.release()


def test_a_controller_that_comes_back_to_another_s_claim_leaves_it(objects: LocalObjects) -> None:
    other = take(objects, "b")
    before = all_claims(objects)
    again = resume(objects, "a")
    assert again.lost_to is not None
    assert again.lost_to.service == "b"
    again.beat()
    again.release()
    assert all_claims(objects) == before
    other.release()


def test_a_controller_that_comes_back_after_its_successor_has_ended_stays_replaced(
    objects: LocalObjects,
) -> None:
    take(objects, "a")  # and dies
    take(objects, "b").release()
    before = all_claims(objects)
    again = resume(objects, "a")
    assert again.lost_to is not None
    assert again.lost_to.service == "b"
    with pytest.raises(FailedPreconditionError):
        require_claim(objects, "a")
    again.release()
    assert all_claims(objects) == before


def test_a_service_that_lost_its_claim_neither_takes_it_back_nor_removes_it(
    objects: LocalObjects,
) -> None:
    first = take(objects, "a")
    second = take(objects, "b")  # the first one was silent all the time
    before = all_claims(objects)
    first.beat()
    assert first.lost_to is not None
    assert first.lost_to.endpoint == "b:7600"
    first.beat()
    assert all_claims(objects) == before
    first.release()
    assert all_claims(objects) == before
    with pytest.raises(FailedPreconditionError) as caught:
        require_claim(objects, "a")
    assert caught.value.reason is Reason.BANK_IN_USE
    assert caught.value.metadata == replaced(objects.url, first.lost_to).metadata
    second.release()
    # It has ended, and yet the bank is nobody's who ceased to serve.
    with pytest.raises(FailedPreconditionError):
        require_claim(objects, "a")


def test_a_service_has_no_claim_once_it_gave_it_back(objects: LocalObjects) -> None:
    claim = take(objects, "a")
    claim.release()
    with pytest.raises(UnavailableError):
        require_claim(objects, "a")
    again = resume(objects, "a")
    require_claim(objects, "a")
    again.release()


def test_storage_that_does_not_answer_delays_a_beat_and_keeps_nobody_from_stopping(
    objects: LocalObjects,
) -> None:
    outage = Outage(objects)
    claim = BankClaim.take(
        outage, service="a", host="h", endpoint="e", beat_every_s=NEVER_S, sleep=Time()
    )
    outage.is_down = True
    with pytest.raises(UnavailableError):
        claim.beat()
    outage.is_down = False
    claim.beat()
    found = read_claim(objects)
    assert found is not None
    assert found.beat >= 1
    outage.is_down = True
    claim.release()
    assert read_claim(objects) is not None


def test_storage_that_hangs_keeps_nobody_from_stopping(objects: LocalObjects) -> None:
    mended = threading.Event()

    class Hangs(LocalObjects):
        def put(self, key: str, data: Data, *, durable: bool = False) -> None:
            mended.wait()

    claim = take(Hangs(objects.root), "a")
    claim.release(timeout_s=0.01)
    assert read_claim(objects) is not None, "it is found dead"
    mended.set()


def test_a_bank_is_sound_with_a_claim_and_after_it(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    claim = take(LocalObjects(tmp_path), "a")
    assert check_bank(bank.objects).findings == ()
    claim.release()
    assert check_bank(bank.objects).findings == ()
