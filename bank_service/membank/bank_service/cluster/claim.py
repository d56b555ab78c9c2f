"""Keeping a second service off a bank behind a URL, where no file lock reaches.

A service that serves such a bank writes a *claim* into the bank's storage and changes it every few
seconds. Who wants to serve the bank and finds a claim watches it: if it changes, somebody is
alive. What keeps two owners apart whatever happens is the fencing of partitions; the claim says
which of two services the bank belongs to, so that the other one does not fight for it.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format.layout import CLAIM_KEY

_LOG = logging.getLogger(__name__)

BEAT_EVERY_S = 3.0
"""Seconds between two changes of a claim."""
_WATCHED_BEATS = 5
"""How long a claim is watched before it is taken for that of a dead service, in beats: longer than
a controller takes that was killed and comes back."""
_MAX_BEAT_EVERY_S = 60.0


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


class BankClaim:
    """The claim of one service on one bank; made by `take`, ended by `release`.

    Parameters
    ----------
    objects
        The bank's storage.
    claim
        What was written there.
    lost_to
        Who has claimed the bank since.
    """

    # `_lock` makes beats exclude each other; `_lost_to` is set once.

    def __init__(self, objects: ObjectStore, claim: Claim, *, lost_to: Claim | None = None) -> None:
        self._objects = objects
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
        if not _create(objects, claim):
            found = read_claim(objects)
            if found is None or found.service != service:
                if found is not None:
                    _watch(objects, found, sleep)
                objects.put(CLAIM_KEY, _encode(claim))
                # Whoever else found the same dead claim has written by then; the last one stands.
                sleep(beat_every_s / 2)
                require_claim(objects, service)
        return cls(objects, claim)

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
        found = read_claim(objects)
        if found is None and not _create(objects, claim):
            found = read_claim(objects)
        if found is None:
            return cls(objects, claim)
        if found.service != service:
            return cls(objects, claim, lost_to=found)
        # Who watches the claim must see that it lives.
        claim = replace(claim, beat=found.beat + 1)
        objects.put(CLAIM_KEY, _encode(claim))
        return cls(objects, claim)

    @property
    def lost_to(self) -> Claim | None:
        """Who has claimed the bank since; None = nobody. A claim that is lost stays lost."""
        return self._lost_to

    def beat(self) -> None:
        """Change the claim, unless another service has claimed the bank."""
        with self._lock:
            if self._ended.is_set() or self._lost_to is not None:
                return
            found = read_claim(self._objects)
            if found is not None and found.service != self._claim.service:
                self._lost_to = found
                _LOG.error("%s; stop one of the two services", _taken(self._objects.url, found))
                return
            self._claim = replace(self._claim, beat=self._claim.beat + 1)
            self._objects.put(CLAIM_KEY, _encode(self._claim))

    def release(self) -> None:
        """Give the bank up, so that the next service need not watch; never another one's claim."""
        self._ended.set()
        self._thread.join()
        try:
            found = read_claim(self._objects)
            if found is not None and found.service == self._claim.service:
                self._objects.delete(CLAIM_KEY)
        except MembankError as err:
            _LOG.warning("the claim on %s stays, and is found dead: %s", self._objects.url, err)

    def _run(self) -> None:
        while self._lost_to is None and not self._ended.wait(self._claim.beat_every_s):
            try:
                self.beat()
            except MembankError as err:
                _LOG.warning("the claim on %s was not renewed: %s", self._objects.url, err)
            except Exception:
                # A claim that stops changing looks like that of a dead service.
                _LOG.exception("the claim on %s was not renewed", self._objects.url)


def read_claim(objects: ObjectStore) -> Claim | None:
    """Return who claims a bank; None = nobody, or a claim that cannot be read."""
    try:
        return _decode(objects.get(CLAIM_KEY))
    except NotFoundError:
        return None


def require_claim(objects: ObjectStore, service: str) -> None:
    """Return if a bank is claimed by `service`.

    Raises
    ------
    FailedPreconditionError
        If another service has claimed it (BANK_IN_USE).
    UnavailableError
        If nobody has, or the storage does not answer (STORE_FAILED).
    """
    found = read_claim(objects)
    if found is None:
        raise UnavailableError(
            f"{objects.url} is not claimed by this service any more; its controller claims it anew, "
            "or must be started again",
            reason=Reason.STORE_FAILED,
            metadata={"bank": objects.url},
        )
    if found.service != service:
        raise replaced(objects.url, found)


def replaced(bank_url: str, by: Claim) -> FailedPreconditionError:
    """Return the error for a service whose bank another one has claimed."""
    return FailedPreconditionError(
        f"{_taken(bank_url, by)}, and this service has ceased to serve it; use that one, or stop it "
        "and start this one again",
        reason=Reason.BANK_IN_USE,
        metadata=_names(bank_url, by),
    )


def _watch(objects: ObjectStore, found: Claim, sleep: Callable[[float], None]) -> None:
    """Return once a claim has not changed for long, or is gone; raise as soon as it changes."""
    for _ in range(_WATCHED_BEATS):
        sleep(found.beat_every_s)
        now = read_claim(objects)
        if now is None:
            return
        if now != found:
            raise FailedPreconditionError(
                f"{objects.url} is served already, by {now.endpoint} on {now.host}; stop that "
                "service first (`membank down` on its machine)",
                reason=Reason.BANK_IN_USE,
                metadata=_names(objects.url, now),
            )
    _LOG.warning(
        "%s was claimed by %s on %s, which is silent: taking it over",
        objects.url,
        found.endpoint,
        found.host,
    )


def _create(objects: ObjectStore, claim: Claim) -> bool:
    try:
        objects.put_if_absent(CLAIM_KEY, _encode(claim))
    except AlreadyExistsError:
        return False
    return True


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
        )
    except (ValueError, TypeError, KeyError, OverflowError):
        return None
    is_sound = math.isfinite(claim.beat_every_s) and 0 < claim.beat_every_s <= _MAX_BEAT_EVERY_S
    return claim if is_sound else None


def _taken(bank_url: str, by: Claim) -> str:
    return f"{bank_url} has been taken over by the service at {by.endpoint} on {by.host}"


def _names(bank_url: str, claim: Claim) -> dict[str, str]:
    return {"bank": bank_url, "endpoint": claim.endpoint, "host": claim.host}
