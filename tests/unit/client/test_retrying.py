"""Retries with a clock and waits of our own."""

import pytest

from membank.client.config import RetryConfig
from membank.client.deadline import Deadline
from membank.client.retrying import backoff_s, call_with_retries, hinted_wait_s, is_retryable
from membank.wire.errors import (
    LEAVES,
    DeadlineError,
    MembankError,
    ResourceExhaustedError,
    UnavailableError,
)

CONFIG = RetryConfig(max_attempts=3, initial_backoff_s=1e-6, max_backoff_s=1e-6)


class Attempts:
    """Fails with one error after another, then answers; each attempt takes `duration_s`."""

    def __init__(self, *errors: MembankError, duration_s: float = 0.0) -> None:
        self._errors = list(errors)
        self._duration_s = duration_s
        self.now_s = 0.0
        self.timeouts_s: list[float] = []

    def clock(self) -> float:
        return self.now_s

    async def __call__(self, timeout_s: float) -> str:
        self.timeouts_s.append(timeout_s)
        self.now_s += self._duration_s
        if self._errors:
            raise self._errors.pop(0)
        return "answer"


async def call(attempts: Attempts, *, timeout_s: float = 10.0) -> str:
    deadline = Deadline.after(timeout_s, clock=attempts.clock)
    return await call_with_retries(attempts, what="call", deadline=deadline, config=CONFIG)


async def test_each_attempt_gets_what_is_left() -> None:
    attempts = Attempts(UnavailableError("1"), UnavailableError("2"), duration_s=3.0)
    assert await call(attempts) == "answer"
    assert attempts.timeouts_s == [10.0, 7.0, 4.0]


async def test_the_budget_of_attempts() -> None:
    attempts = Attempts(*[UnavailableError(str(number)) for number in range(5)])
    with pytest.raises(UnavailableError, match="2"):
        await call(attempts)
    assert len(attempts.timeouts_s) == CONFIG.max_attempts


async def test_a_deadline_that_passed_leaves_the_last_failure() -> None:
    attempts = Attempts(UnavailableError("away"), duration_s=11.0)
    with pytest.raises(UnavailableError, match="away"):
        await call(attempts)
    assert len(attempts.timeouts_s) == 1


async def test_waits_at_least_as_long_as_the_service_asks() -> None:
    # The wait that is asked for would pass the deadline, so there is none.
    attempts = Attempts(ResourceExhaustedError("full", metadata={"retry_after_ms": "11000"}))
    with pytest.raises(ResourceExhaustedError):
        await call(attempts)


async def test_recovers_before_the_next_attempt() -> None:
    events: list[str] = []

    async def attempt(timeout_s: float) -> None:
        events.append("attempt")
        if len(events) < 3:
            raise UnavailableError("moved")

    async def recover(error: MembankError) -> None:
        events.append(error.message)

    deadline = Deadline.after(10.0)
    await call_with_retries(attempt, what="call", deadline=deadline, config=CONFIG, recover=recover)
    assert events == ["attempt", "moved", "attempt"]


@pytest.mark.parametrize("leaf", LEAVES)
def test_only_silence_is_retried(leaf: type[MembankError]) -> None:
    assert is_retryable(leaf("error")) is (leaf is UnavailableError)


def test_overload_is_retried_where_the_service_says_when() -> None:
    full = ResourceExhaustedError("full", metadata={"retry_after_ms": "50"})
    assert is_retryable(full)
    assert hinted_wait_s(full) == 0.05
    assert hinted_wait_s(ResourceExhaustedError("no space")) == 0.0
    assert hinted_wait_s(DeadlineError("late")) == hinted_wait_s(None) == 0.0


def test_backoff_grows_to_its_bound() -> None:
    config = RetryConfig(initial_backoff_s=1.0, max_backoff_s=8.0)
    for num_failures, bound in ((1, 1.0), (2, 2.0), (4, 8.0), (5, 8.0), (10_000, 8.0)):
        waits = [backoff_s(config, num_failures) for _ in range(200)]
        assert min(waits) >= 0
        assert bound / 2 < max(waits) <= bound
