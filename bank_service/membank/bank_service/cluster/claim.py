"""Keeping a second service off a bank behind a URL, where no file lock reaches.

A service that serves such a bank writes a *claim* into the bank's storage and changes it every few
seconds. Who wants to serve the bank and finds a claim watches it: if it changes, somebody is
alive. This is a courtesy to people, who get a clear error; what keeps two owners apart whatever
happens is the fencing of partitions.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from membank.bank_service.store.objects import ObjectStore
from membank.wire.errors import FailedPreconditionError, MembankError, NotFoundError, Reason
from membank.wire.format.layout import CLAIM_KEY

_LOG = logging.getLogger(__name__)

BEAT_EVERY_S = 3.0
"""Seconds between two changes of a claim."""
_WATCH_BEATS = 2.5
"""How long a claim is watched before it is taken for that of a dead service, in beats."""


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
        What to write.
    """

    # Only the beating thread writes after `take`.

    def __init__(self, objects: ObjectStore, claim: Claim) -> None:
        self._objects = objects
        self._claim = claim
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="membank-claim", daemon=True)

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
        found = _read(objects)
        if found is not None and found.service != service:
            sleep(found.beat_every_s * _WATCH_BEATS)
            now = _read(objects)
            if now is not None and now != found:
                raise FailedPreconditionError(
                    f"{objects.url} is served already, by {now.endpoint} on {now.host}; stop that "
                    "service first (`membank down` on its machine)",
                    reason=Reason.BANK_IN_USE,
                    metadata={"bank": objects.url, "endpoint": now.endpoint, "host": now.host},
                )
        claim = Claim(
            service=service, host=host, endpoint=endpoint, beat=0, beat_every_s=beat_every_s
        )
        _write(objects, claim)
        taken = cls(objects, claim)
        taken._thread.start()
        return taken

    def release(self) -> None:
        """Give the bank up; another service need not watch then."""
        self._ended.set()
        self._thread.join()
        try:
            self._objects.delete(CLAIM_KEY)
        except MembankError as err:
            _LOG.warning("the claim on %s stays, and is found dead: %s", self._objects.url, err)

    def _beat(self) -> None:
        claim = self._claim
        while not self._ended.wait(claim.beat_every_s):
            try:
                found = _read(self._objects)
                if found is not None and found.service != claim.service:
                    _LOG.error(
                        "%s was claimed by %s on %s; stop one of the two services",
                        self._objects.url,
                        found.endpoint,
                        found.host,
                    )
                    return
                claim = Claim(**{**asdict(claim), "beat": claim.beat + 1})
                _write(self._objects, claim)
            except MembankError as err:
                _LOG.warning("the claim on %s was not renewed: %s", self._objects.url, err)


def _read(objects: ObjectStore) -> Claim | None:
    try:
        return Claim(**json.loads(objects.get(CLAIM_KEY)))
    except NotFoundError:
        return None
    except (ValueError, TypeError):
        # A claim protects nothing that fencing does not; a damaged one must not keep a bank shut.
        return None


def _write(objects: ObjectStore, claim: Claim) -> None:
    objects.put(CLAIM_KEY, json.dumps(asdict(claim)).encode())
