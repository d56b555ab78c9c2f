"""Keeping a second service off a bank behind a URL, where no file lock reaches.

A service that serves such a bank creates a *claim* in the bank's storage, under the next number
that is free, and changes it every few seconds. Who wants to serve the bank and finds a claim
watches it: if it changes, somebody is alive; if not, a claim of the next number takes the bank. The
claim of the highest number counts, and nobody ever writes to another one's. So a change that
arrives late, however late, takes nothing back from a successor; and as a claim that ends stays, a
service that was replaced knows that for ever. What keeps two owners apart whatever happens is the
fencing of partitions; the claim says which of two services the bank belongs to, so that the other
one does not fight for it.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from membank.bank_service.store.objects import ObjectStore, publish
from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format.layout import CLAIMS, claim_key, numbers_in

_LOG = logging.getLogger(__name__)

BEAT_EVERY_S = 3.0
"""Seconds between two changes of a claim."""
_WATCHED_BEATS = 5
"""How long a claim is watched before it is taken for that of a dead service, in beats: longer than
a controller takes that was killed and comes back."""
_MAX_BEAT_EVERY_S = 60.0
_LOOKS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """Who serves a bank, as written in its storage."""

    service: str
    """Random; names the service, across restarts of its controller."""
    host: str
    """Machine of its controller."""
    endpoint: str
    """Address of its gateway."""
    beat: int
    """Changes so far."""
    beat_every_s: float
    """Seconds between two changes."""
    ended: bool = False
    """Whether the service has given the bank up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """The claims in a bank's storage."""

    number: int
    """Number of the claim that counts; 0 = there is none."""
    claim: Claim | None
    """The claim that counts."""
    free: int
    """The number that the next claim takes."""
    older: Sequence[int]
    """Numbers that do not count any more."""


class BankClaim:
    """The claim of one service on one bank; made by `take`, ended by `release`.

    Parameters
    ----------
    objects
        The bank's storage.
    number
        Number of the claim.
    claim
        What was written there.
    lost_to
        Who has claimed the bank since.
    """

    # `_lock` makes beats exclude each other; `_lost_to` is set once.

    def __init__(
        self, objects: ObjectStore, number: int, claim: Claim, *, lost_to: Claim | None = None
    ) -> None:
        self._objects = objects
        self._number = number
        self._claim = claim
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._lost_to = lost_to
        self._thread = threading.Thread(target=self._run, name="membank-claim", daemon=True)
        self._thread.start()

    @classmethod
    def take(
        cls,
        objects: ObjectStore,
        *,
        service: str,
        host: str,
        endpoint: str,
        beat_every_s: float = BEAT_EVERY_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> BankClaim:
        """Claim a bank, unless a living service has.

        Parameters
        ----------
        objects
            The bank's storage.
        service, host, endpoint
            Who claims it (see `Claim`).
        beat_every_s
            Seconds between two changes.
        sleep
            Waits for some seconds, to watch a claim that is there.

        Raises
        ------
        FailedPreconditionError
            If another service serves the bank (BANK_IN_USE); names it.
        """
        claim = Claim(
            service=service, host=host, endpoint=endpoint, beat=0, beat_every_s=beat_every_s
        )
        while True:
            found = _look(objects)
            if found.claim is not None and not found.claim.ended:
                found = _watch(objects, found, found.claim, sleep)
            # The number was free while the claim that counts was silent, had ended, or was none.
            # Whoever else saw the same takes the same number, and one of them gets it.
            if _create(objects, found.free, claim):
                return cls(objects, found.free, claim)

    @classmethod
    def resume(
        cls,
        objects: ObjectStore,
        *,
        service: str,
        host: str,
        endpoint: str,
        beat_every_s: float = BEAT_EVERY_S,
    ) -> BankClaim:
        """Go on with the claim of a service whose controller died; see `lost_to` of the result.

        Parameters
        ----------
        objects
            The bank's storage.
        service, host, endpoint
            Whose claim it is (see `Claim`).
        beat_every_s
            Seconds between two changes.
        """
        claim = Claim(
            service=service, host=host, endpoint=endpoint, beat=0, beat_every_s=beat_every_s
        )
        while True:
            found = _look(objects)
            if found.claim is not None and found.claim.service != service:
                # Also where that one has ended: nobody has asked for this service to serve again.
                return cls(objects, 0, claim, lost_to=found.claim)
            if found.claim is not None and not found.claim.ended:
                # Who watches the claim must see that it lives.
                claim = replace(claim, beat=found.claim.beat + 1)
                objects.put(claim_key(found.number), _encode(claim))
                return cls(objects, found.number, claim)
            if _create(objects, found.free, claim):
                return cls(objects, found.free, claim)

    @property
    def lost_to(self) -> Claim | None:
        """Who has claimed the bank since; None = nobody. A claim that is lost stays lost."""
        return self._lost_to

    def beat(self) -> None:
        """Change the claim, unless another service has claimed the bank."""
        with self._lock:
            if self._ended.is_set() or self._lost_to is not None:
                return
            found = _look(self._objects)
            if self._is_replaced(found):
                self._lost_to = found.claim
                return
            self._claim = replace(self._claim, beat=self._claim.beat + 1)
            self._objects.put(claim_key(self._number), _encode(self._claim))
            # Those of services that this one took the bank from. A change of theirs that arrives
            # late makes one anew, below this number, where it counts for nothing.
            for number in found.older:
                self._objects.delete(claim_key(number))

    def release(self, timeout_s: float = 30.0) -> None:
        """Give the bank up, so that the next service need not watch; never another one's claim.

        Parameters
        ----------
        timeout_s
            Longest wait for the storage; a claim that is not ended by then is found dead.
        """
        self._ended.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            _LOG.warning("the claim on %s stays, and is found dead", self._objects.url)

    def _is_replaced(self, found: _Found) -> bool:
        return (
            found.claim is not None
            and found.number >= self._number
            and found.claim.service != self._claim.service
        )

    def _run(self) -> None:
        while self._lost_to is None:
            if self._ended.wait(self._claim.beat_every_s):
                self._end()
                return
            try:
                self.beat()
            except MembankError as err:
                _LOG.warning("the claim on %s was not renewed: %s", self._objects.url, err)
            except Exception:
                # A claim that stops changing looks like that of a dead service.
                _LOG.exception("the claim on %s was not renewed", self._objects.url)
        _LOG.error("%s; stop one of the two services", _taken(self._objects.url, self._lost_to))

    def _end(self) -> None:
        # After all beats, in their thread: one that came later would make the claim look alive.
        try:
            with self._lock:
                if not self._is_replaced(_look(self._objects)):
                    ended = replace(self._claim, ended=True)
                    self._objects.put(claim_key(self._number), _encode(ended))
        except MembankError as err:
            _LOG.warning("the claim on %s stays, and is found dead: %s", self._objects.url, err)


def require_claim(objects: ObjectStore, service: str) -> None:
    """Return if a bank is claimed by `service`.

    Raises
    ------
    FailedPreconditionError
        If another service has claimed it (BANK_IN_USE), though it may have ended since.
    UnavailableError
        If nobody has, or the storage does not answer (STORE_FAILED).
    """
    found = _look(objects).claim
    if found is not None and found.service != service:
        raise replaced(objects.url, found)
    if found is None or found.ended:
        raise UnavailableError(
            f"{objects.url} is not claimed by this service any more; its controller claims it anew, "
            "or must be started again",
            reason=Reason.STORE_FAILED,
            metadata={"bank": objects.url},
        )


def replaced(bank_url: str, by: Claim) -> FailedPreconditionError:
    """Return the error for a service whose bank another one has claimed."""
    return FailedPreconditionError(
        f"{_taken(bank_url, by)}, and this service has ceased to serve it; use that one, or stop it "
        "and start this one again",
        reason=Reason.BANK_IN_USE,
        metadata=_names(bank_url, by),
    )


def _look(objects: ObjectStore) -> _Found:
    """Return the claims that are there; the highest that can be read counts."""
    for _ in range(_LOOKS):
        numbers = numbers_in(objects.list(CLAIMS), claim_key)
        # One that is gone was removed by a newer service: its claim was not listed yet.
        with suppress(NotFoundError):
            return _highest(objects, numbers)
    raise UnavailableError(
        f"the claims on {objects.url} change while they are read; retry",
        reason=Reason.STORE_FAILED,
        metadata={"bank": objects.url},
    )


def _highest(objects: ObjectStore, numbers: Sequence[int]) -> _Found:
    free = max(numbers, default=0) + 1
    for index in reversed(range(len(numbers))):
        claim = _decode(objects.get(claim_key(numbers[index])))
        if claim is not None:
            return _Found(number=numbers[index], claim=claim, free=free, older=numbers[:index])
    return _Found(number=0, claim=None, free=free, older=())


def _watch(
    objects: ObjectStore, found: _Found, claim: Claim, sleep: Callable[[float], None]
) -> _Found:
    """Return what is there once a claim has been silent for long, or ended.

    Raises
    ------
    FailedPreconditionError
        As soon as it changes, or another service has claimed the bank (BANK_IN_USE).
    """
    for _ in range(_WATCHED_BEATS):
        sleep(claim.beat_every_s)
        found, before = _look(objects), found
        now = found.claim
        if now is None or now.ended:
            return found
        if (found.number, now) != (before.number, before.claim):
            raise FailedPreconditionError(
                f"{objects.url} is served already, by {now.endpoint} on {now.host}; stop that "
                "service first (`membank down` on its machine)",
                reason=Reason.BANK_IN_USE,
                metadata=_names(objects.url, now),
            )
    _LOG.warning(
        "%s was claimed by %s on %s, which is silent: taking it over",
        objects.url,
        claim.endpoint,
        claim.host,
    )
    return found


def _create(objects: ObjectStore, number: int, claim: Claim) -> bool:
    """Create a claim; return False where another service has, of this number or a higher one."""
    key = claim_key(number)
    try:
        publish(objects, key, _encode(claim))
        # This number may be free because a later service removed the one that had it.
        return _look(objects).number == number
    except AlreadyExistsError:
        return False
    except MembankError:
        # It may be there although no answer said so, and nobody will ever change it.
        with suppress(MembankError):
            if _decode(objects.get(key)) == claim:
                objects.put(key, _encode(replace(claim, ended=True)))
        raise


def _encode(claim: Claim) -> bytes:
    return json.dumps(asdict(claim)).encode()


def _decode(data: bytes) -> Claim | None:
    # A claim protects nothing that fencing does not; a damaged one must not keep a bank shut. One of
    # a later version, with more in it, counts.
    try:
        body = json.loads(data)
        claim = Claim(
            service=str(body["service"]),
            host=str(body["host"]),
            endpoint=str(body["endpoint"]),
            beat=int(body["beat"]),
            beat_every_s=float(body["beat_every_s"]),
            ended=body["ended"] is True,
        )
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    is_sound = math.isfinite(claim.beat_every_s) and 0 < claim.beat_every_s <= _MAX_BEAT_EVERY_S
    return claim if is_sound else None


def _taken(bank_url: str, by: Claim) -> str:
    return f"{bank_url} has been taken over by the service at {by.endpoint} on {by.host}"


def _names(bank_url: str, claim: Claim) -> dict[str, str]:
    return {"bank": bank_url, "endpoint": claim.endpoint, "host": claim.host}
