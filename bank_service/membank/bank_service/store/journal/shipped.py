"""A journal on the owner's disk whose frames are copied to the bank's own storage now and then.

An append costs what the local journal costs. What was shipped outlives the machine; what was not
(`ShippedJournal.lag`) is lost with it.

**Which of the two rules at the next opening.** A journal is *current* if the newest manifest's
owner wrote it, or if it was begun onto that manifest (`Ownership.is_current`). Of two current
journals the one that reaches further rules, the local one if both reach as far; a journal that is
not current belongs to an owner that others have replaced, and is given up.

============================================== =================================================
the owner X dies, or loses its machine,        and the next opening finds
============================================== =================================================
before the local `begin`                       both as they were
after the local `begin`, before the remote one local of X and remote of the owner before, both
                                               current (X's is begun onto the manifest): the local
                                               one reaches at least as far, and rules
after the remote `begin`, before the manifest  both of X, current for the same reason
after an append, before it is shipped          both of X; local reaches further, and rules
in a ship                                      the same; a batch is in the remote log whole or not
while the local log is being trimmed           segments that hold nothing that is needed
after the local trim, before the remote one    objects that hold nothing that is needed; the next
                                               trim removes them
with the machine                               no local journal: the remote one rules
with the power, local journal without sync     local may have lost its end; where the remote one
                                               reaches further, it rules
============================================== =================================================

============================================== =================================================
another owner Y, on another machine,           and X, opening again, finds
============================================== =================================================
dies after its remote `begin`                  remote of Y (begun onto the manifest), local of X
                                               (which wrote the manifest): both current, and Y
                                               added nothing, so X's unshipped frames count
publishes a manifest                           only the remote one is current; local is given up
goes on without a remote journal               neither is current; the caller gives up both
============================================== =================================================

Where the remote journal rules, the local one starts after its end, so that frames up to there are
only in the remote one until they are trimmed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

from membank.bank_service.store.journal.backlog import Backlog
from membank.bank_service.store.journal.contract import Frame, FrameKind, Ownership, Payload
from membank.bank_service.store.journal.frames import corrupt
from membank.bank_service.store.journal.local import LocalJournal
from membank.bank_service.store.journal.objects import ObjectJournal
from membank.wire.errors import InternalError, MembankError, NotFoundError, Reason, UnavailableError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShipLag:
    """What would be lost with the machine now."""

    seconds: float
    """Age of the oldest frame that was not shipped; 0 = there is none."""


class ShippedJournal:
    """A `Journal` on the owner's disk, with a copy in the bank's storage.

    Parameters
    ----------
    local
        The journal that is appended to, opened and not begun.
    remote
        Its copy, opened and not begun.
    is_current
        Says whether an owner is that of the newest manifest, or began onto it.
    batch_bytes
        Bytes of payloads that are shipped in one object, as far as one frame is not longer.
    clock
        Seconds, monotonic.
    """

    # Threads: one appends; `ship` and `trim` may run beside it and beside each other.
    # `_remote_lock` is held while the remote journal changes, for one batch at a time. Changes of
    # the local one are guarded by its own lock.

    def __init__(
        self,
        local: LocalJournal,
        remote: ObjectJournal,
        is_current: Callable[[Ownership], bool],
        *,
        batch_bytes: int = 8 << 20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._local = local
        self._remote = remote
        self._batch_bytes = batch_bytes
        self._clock = clock
        self._remote_lock = Lock()
        self._backlog = Backlog()
        self._trim_to = 0
        self._remote_trimmed_to = 0
        self._is_begun = False
        self._fenced: UnavailableError | None = None
        rule = _Rule.of(local, remote, is_current)
        self._remote_rules = rule.remote_rules
        self._drops_remote = rule.drops_remote

    @property
    def last_lsn(self) -> int:
        # docstring inherited
        return self._remote.last_lsn if self._remote_rules else self._local.last_lsn

    @property
    def base(self) -> int:
        # docstring inherited
        remote, local = self._remote, self._local
        if self._remote_rules:
            return remote.base
        # Also where they are only still to be trimmed: who trims to forget must learn of them.
        if not self._drops_remote and remote.base < remote.last_lsn:
            return min(remote.base, local.base)
        return local.base

    @property
    def num_bytes(self) -> int:
        # docstring inherited
        return max(self._local.num_bytes, self._remote.num_bytes)

    @property
    def ownership(self) -> Ownership | None:
        # docstring inherited
        return self._remote.ownership if self._remote_rules else self._local.ownership

    def replay(self, after_lsn: int) -> Iterator[Frame]:
        # docstring inherited
        if self._remote_rules:
            yield from self._remote.replay(after_lsn)
            return
        joint = self._local.base
        if self.base <= after_lsn < joint:
            yield from self._replay_remote(after_lsn, joint)
        yield from self._local.replay(after_lsn)

    def begin(self, ownership: Ownership, after_lsn: int) -> None:
        # docstring inherited
        remote_ruled, base = self._remote_rules, after_lsn
        if remote_ruled:
            self._give_local_up()
            base = max(after_lsn, self._remote.last_lsn)
        if self._drops_remote:
            self._remote.discard()
        self._local.begin(ownership, base)
        self._remote.begin(ownership, after_lsn)
        if self._remote.last_lsn > self._local.last_lsn:
            # The owner before was alive, and shipped once more.
            if not remote_ruled:
                raise self._seal(self._in_use())
            self._local.discard()
            self._local.begin(ownership, self._remote.last_lsn)
        self._remote_rules = self._drops_remote = False
        self._is_begun = True
        if self._local.last_lsn > self._remote.last_lsn:
            self._backlog.add(self._local.last_lsn, self._clock())

    def append(self, kind: FrameKind, payloads: Sequence[Payload]) -> int:
        # docstring inherited
        self.require_usable()
        since = self._clock()
        lsn = self._local.append(kind, payloads)
        self._backlog.add(lsn, since)
        return lsn

    def ship(self) -> None:
        """Copy what was appended before this call to the remote journal.

        Raises
        ------
        UnavailableError
            If the storage failed; nothing is lost, ship again later. If another owner took the
            partition over (FENCED); this journal accepts nothing from then on.
        ResourceExhaustedError
            If the storage is full.
        """
        target = self._local.last_lsn
        try:
            while self._ship_batch(target):
                pass
        except UnavailableError as err:
            if err.reason is Reason.FENCED:
                self._seal(err)
            raise

    def lag(self) -> ShipLag:
        """Return what would be lost with the machine now."""
        since = self._backlog.since
        return ShipLag(seconds=0.0 if since is None else max(self._clock() - since, 0.0))

    def trim(self, lsn: int) -> None:
        """Remove every frame up to `lsn` (see `Journal.trim`), first the local ones.

        A failure of the remote journal is only logged; `base` tells, and the next `ship` or
        `trim` tries again.
        """
        self._local.trim(lsn)
        self._backlog.forget(lsn)
        self._trim_to = max(self._trim_to, lsn)
        if not self._is_begun:
            return
        try:
            with self._remote_lock:
                self._trim_remote()
        except MembankError as err:
            if isinstance(err, UnavailableError) and err.reason is Reason.FENCED:
                self._seal(err)
            _LOG.warning("the shipped journal was not trimmed: %s", err)

    def erase(self) -> None:
        # docstring inherited
        self._local.erase()
        self._remote.erase()

    def discard(self) -> None:
        # docstring inherited
        self._local.discard()
        self._remote.discard()
        self._remote_rules = self._drops_remote = self._is_begun = False

    def close(self) -> None:
        # docstring inherited
        self._local.close()
        self._remote.close()

    def require_usable(self) -> None:
        # docstring inherited
        if self._fenced is not None:
            raise self._fenced
        self._local.require_usable()
        if not self._is_begun:
            # The local one alone would take what the remote one can never get.
            self._remote.require_usable()

    # ---- the remote journal

    def _ship_batch(self, target: int) -> bool:
        """Ship one batch of the frames up to `target`; False = there is none."""
        with self._remote_lock:
            # A batch whose outcome was unknown holds copies, so it is welcome if it is there.
            self._remote.settle()
            self._trim_remote()
            done = self._remote.last_lsn
            self._backlog.forget(done)
            if done >= target:
                return False
            if batch := self._next_batch(done, target):
                self._remote.copy(batch)
                self._backlog.forget(batch[-1].lsn)
            return True

    def _next_batch(self, done: int, target: int) -> list[Frame]:
        """Return frames that continue `done`; none if they were trimmed meanwhile."""
        batch: list[Frame] = []
        size = 0
        try:
            for frame in self._local.replay(done):
                size += len(frame.payload)
                if frame.lsn > target or (batch and size > self._batch_bytes):
                    break
                batch.append(frame)
        except NotFoundError:
            if self._local.base <= done:
                raise
        if batch and batch[0].lsn == done + 1:
            return batch
        if self._local.base <= done:
            raise InternalError(f"frame {done + 1} is neither in the local journal nor trimmed")
        return []

    def _trim_remote(self) -> None:
        # What the local journal has trimmed is not needed, and can no longer be shipped.
        to = max(self._trim_to, self._local.base)
        if self._remote.last_lsn < to:
            self._remote.settle()
        if self._remote.last_lsn < to:
            self._remote.skip(to)
        elif self._remote_trimmed_to < self._trim_to:
            self._remote.settle()
            self._remote.trim(self._trim_to)
        self._remote_trimmed_to = self._trim_to

    def _replay_remote(self, after_lsn: int, up_to: int) -> Iterator[Frame]:
        if self._remote.last_lsn < up_to:
            raise corrupt(
                "in the bank's storage",
                0,
                f"it ends with frame {self._remote.last_lsn}, and the local one continues after "
                f"frame {up_to}: frames are missing",
            )
        for frame in self._remote.replay(after_lsn):
            if frame.lsn > up_to:
                return
            yield frame

    def _give_local_up(self) -> None:
        if self._local.last_lsn > self._local.base:
            _LOG.warning(
                "giving up frames %d to %d of the local journal: the one in the bank's storage, up "
                "to frame %d, is that of the newest owner, or reaches further",
                self._local.base + 1,
                self._local.last_lsn,
                self._remote.last_lsn,
            )
        self._local.discard()

    def _seal(self, err: UnavailableError) -> UnavailableError:
        self._fenced = self._fenced or err
        return err

    def _in_use(self) -> UnavailableError:
        return UnavailableError(
            "another owner of the partition is at work and has shipped updates that this one does "
            "not know; stop one of them",
            reason=Reason.FENCED,
        )


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which of the two journals rules at an opening."""

    remote_rules: bool
    drops_remote: bool
    """The remote journal is not current while the local one is."""

    @classmethod
    def of(
        cls, local: LocalJournal, remote: ObjectJournal, is_current: Callable[[Ownership], bool]
    ) -> _Rule:
        """Decide (see the top of the module)."""
        if local.ownership is None or remote.ownership is None:
            return cls(remote_rules=local.ownership is None, drops_remote=False)
        is_local, is_remote = is_current(local.ownership), is_current(remote.ownership)
        if is_local and is_remote:
            return cls(remote_rules=remote.last_lsn > local.last_lsn, drops_remote=False)
        return cls(remote_rules=is_remote, drops_remote=is_local)
