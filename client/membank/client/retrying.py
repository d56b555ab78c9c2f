"""Retries within a deadline: only where no service answered, with jittered exponential waits."""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)
from tenacity.stop import stop_base

from membank.client.config import RetryConfig
from membank.client.deadline import Deadline
from membank.client.inline import require_loop
from membank.wire.errors import MembankError, ResourceExhaustedError, UnavailableError

T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)
_RETRY_AFTER = "retry_after_ms"


class _StopAtDeadline(stop_base):
    def __init__(self, deadline: Deadline) -> None:
        self._deadline = deadline

    def __call__(self, retry_state: RetryCallState) -> bool:
        return retry_state.upcoming_sleep >= self._deadline.left_s()


def is_retryable(error: BaseException) -> bool:
    """Return whether the same call may be made again: it found no service, or an overloaded one.

    A service that is overloaded has done nothing, and says when to come again.
    """
    if isinstance(error, ResourceExhaustedError):
        return _RETRY_AFTER in error.metadata
    return isinstance(error, UnavailableError)


def hinted_wait_s(error: BaseException | None) -> float:
    """Return the seconds that the service asked to wait; 0 where it did not."""
    hint = error.metadata.get(_RETRY_AFTER, "") if isinstance(error, MembankError) else ""
    return int(hint) / 1000 if hint.isdecimal() else 0.0


def backoff_s(config: RetryConfig, num_failures: int) -> float:
    """Return a random wait in seconds after `num_failures` (>= 1) failures in a row."""
    bound = config.initial_backoff_s * 2.0 ** min(num_failures - 1, 60)
    return random.uniform(0, min(config.max_backoff_s, bound))


async def call_with_retries(
    attempt: Callable[[float], Awaitable[T]],
    *,
    what: str,
    deadline: Deadline,
    config: RetryConfig,
    recover: Callable[[MembankError], Awaitable[None]] | None = None,
) -> T:
    """Call `attempt` until it answers, fails for good, or the budget is spent.

    Parameters
    ----------
    attempt
        Gets the seconds that are left. Only what `is_retryable` says makes it run again.
    what
        The call, for errors and logs.
    deadline
        Bounds attempts and waits together.
    config
        Budget and waits.
    recover
        Runs after the wait and before the next attempt, such as to learn where shards are now.

    Returns
    -------
    T
        What `attempt` returned.

    Raises
    ------
    UnavailableError, ResourceExhaustedError
        The last one, if the attempts are spent or the next wait would pass the deadline.
    DeadlineError
        If the deadline passed during an attempt.
    """
    # The usual call is answered at once: what retries need takes longer to make than a small fetch.
    try:
        return await attempt(deadline.remaining_s(what))
    except MembankError as err:
        if not is_retryable(err):
            raise
        failure = err
    require_loop()  # to wait on
    is_first = True

    async def again() -> T:
        nonlocal failure, is_first
        if is_first:
            is_first = False
            raise failure  # counts as the first attempt
        if deadline.left_s() <= 0:
            # Why nothing came of it says more than that time ran out.
            raise failure
        if recover is not None:
            await recover(failure)
        try:
            return await attempt(deadline.remaining_s(what))
        except MembankError as err:
            failure = err
            raise

    return await _retrying(what, deadline, config)(again)


def _retrying(what: str, deadline: Deadline, config: RetryConfig) -> AsyncRetrying:
    jittered = wait_random_exponential(
        multiplier=config.initial_backoff_s, max=config.max_backoff_s
    )

    def wait_s(state: RetryCallState) -> float:
        return max(jittered(state), hinted_wait_s(_failure(state)))

    return AsyncRetrying(
        retry=retry_if_exception(is_retryable),
        wait=wait_s,
        stop=stop_after_attempt(config.max_attempts) | _StopAtDeadline(deadline),
        before_sleep=lambda state: _LOGGER.debug(
            "%s: attempt %d found no service; again in %.3f s: %s",
            what,
            state.attempt_number,
            state.upcoming_sleep,
            _failure(state),
        ),
        reraise=True,
    )


def _failure(state: RetryCallState) -> BaseException | None:
    return None if state.outcome is None else state.outcome.exception()
