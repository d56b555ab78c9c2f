"""The right to answer: it lasts from a question that nobody answered, and no longer."""

from __future__ import annotations

import math

import pytest

from membank.bank_service.shard.lease import Lease, boot_clock
from membank.wire.errors import UnavailableError


class _Storage:
    """Answers, or does not, and lets time pass while it is asked."""

    def __init__(self) -> None:
        self.now = 100.0
        self.num_questions = 0
        self.takes_s = 0.0
        self.error: UnavailableError | None = None

    def clock(self) -> float:
        return self.now

    def ask(self) -> None:
        self.num_questions += 1
        self.now += self.takes_s
        if self.error is not None:
            raise self.error


@pytest.fixture
def storage() -> _Storage:
    return _Storage()


def test_an_owner_asks_before_its_first_word_and_then_once_a_lease(storage: _Storage) -> None:
    lease = Lease(10, storage.ask, storage.clock)
    for _ in range(5):
        lease.require()
    assert storage.num_questions == 1
    storage.now += 9.9
    lease.require()
    assert storage.num_questions == 1
    storage.now += 0.1
    lease.require()
    assert storage.num_questions == 2


def test_a_lease_counts_from_the_question_and_not_from_the_answer(storage: _Storage) -> None:
    lease = Lease(10, storage.ask, storage.clock)
    storage.takes_s = 8
    lease.renew()
    storage.now += 2
    storage.takes_s = 0
    lease.require()
    assert storage.num_questions == 2


def test_without_an_answer_an_owner_stays_silent(storage: _Storage) -> None:
    lease = Lease(10, storage.ask, storage.clock)
    lease.renew()
    storage.error = UnavailableError("down")
    storage.now += 10
    with pytest.raises(UnavailableError):
        lease.require()
    storage.error = None
    lease.require()


def test_a_failed_renewal_does_not_end_a_lease_that_still_runs(storage: _Storage) -> None:
    lease = Lease(10, storage.ask, storage.clock)
    lease.renew()
    storage.error = UnavailableError("down")
    storage.now += 5
    with pytest.raises(UnavailableError):
        lease.renew()
    lease.require()


def test_an_owner_with_a_lock_never_asks(storage: _Storage) -> None:
    lease = Lease(math.inf, storage.ask, storage.clock)
    lease.renew()
    storage.now += 1e9
    lease.require()
    assert storage.num_questions == 0


def test_the_clock_runs() -> None:
    first = boot_clock()
    assert boot_clock() >= first > 0
