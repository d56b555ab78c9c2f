"""Calls to storage behind a network: repeated while that may help, with errors of our tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import tenacity

from membank.bank_service.store.objects import storage_error
from membank.wire.errors import MembankError, UnavailableError

T = TypeVar("T")

_FIRST_BACKOFF_S = 0.1


class Attempts:
    """The one layer that repeats requests.

    The clients' own retries are switched off: two layers multiply, neither knows of the other's
    time, obstore repeats no create and no delete whose connection broke, and repeats a request with
    the credentials of its first attempt.

    Parameters
    ----------
    url
        Where the objects are, for errors.
    retry_s
        How long after the begin of a call a new attempt is still made, in seconds; 0 = one attempt.
    max_backoff_s
        Longest wait between two attempts, in seconds.
    """

    # Threads: tenacity keeps the state of a call in that call.

    def __init__(self, url: str, *, retry_s: float, max_backoff_s: float) -> None:
        self._url = url
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(UnavailableError),
            stop=tenacity.stop_after_delay(retry_s),
            # Drawn from the whole span, so that clients that failed together do not return together.
            wait=tenacity.wait_random_exponential(_FIRST_BACKOFF_S, max_backoff_s),
            reraise=True,
        )

    def run(self, key: str, action: Callable[[], T]) -> T:
        """Return what `action` returns at last.

        Parameters
        ----------
        key
            Key or prefix that it is about, for errors.
        action
            One request; may be repeated.

        Raises
        ------
        MembankError
            What `storage_error` makes of the last attempt's error.
        """
        found: T = self._retrying(self._attempt, key, action)
        return found

    def _attempt(self, key: str, action: Callable[[], T]) -> T:
        try:
            return action()
        except MembankError:
            raise
        except Exception as err:
            # Clients raise what their libraries raise (botocore, aiohttp, ...).
            raise storage_error(err, f"{self._url}/{key}".rstrip("/")) from err
