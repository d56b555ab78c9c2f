"""The clients of a campaign: they push, read and operate, however often the service dies."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Mapping
from threading import Event, Lock
from typing import Any

from campaign_bank import (
    DOOMED,
    DOOMED_TOPIC,
    HIDDEN_TOPIC,
    MARKED,
    TRAINED,
    AdminOperation,
    Collect,
    Delete,
    DropSnapshot,
    Push,
    Recreate,
    Replace,
    Restore,
    RollBack,
    Swap,
    TakeSnapshot,
    Withhold,
    by_shard,
)
from campaign_calls import PATIENCE_S, Caller, ServiceGone
from campaign_model import History, Wrong
from campaign_past import Asked
from campaign_setting import SHARDS, Seat, Setting
from membank.bank_service.shard.contract import PushResult
from membank.wire.errors import (
    ConflictError,
    MembankError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from membank.wire.records import GarbageReport, TransactionReport, UpdateResult
from membank.wire.spec import BlockRef, BlockState

_REASKED = 3
_LOOKS = 20
_MAX_SNAPSHOTS = 4
_KEPT_REVISIONS = 3
_PAUSE_S = 0.001


TRANSIENT = (UnavailableError, ResourceExhaustedError, ConflictError)
"""What a call may be answered with that must be repeated; of conflicts, those between operators."""


class Line:
    """One client's line to the processes of a service, however often they die.

    Parameters
    ----------
    setting
        Where they listen.
    up
        Set for each process that is open, as far as is known.
    """

    def __init__(self, setting: Setting, up: Mapping[Seat, Event]) -> None:
        self._callers = {seat: Caller(setting.address(seat)) for seat in Seat}
        self._up = up
        self._ended = Event()
        self.num_unanswered = 0
        """Calls that may have taken effect, and were not answered."""

    def end(self) -> None:
        """Let whoever waits for a process go."""
        self._ended.set()

    def insist(self, seat: Seat, method: str, *args: Any) -> Any:
        """Call until there is an answer other than that it must be repeated.

        Raises
        ------
        ServiceGone
            If the line was ended, or the process stays away.
        ServiceHangs
            If the process does not answer.
        MembankError
            What the call was answered with.
        """
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                return self._callers[seat](method, *args)
            except ServiceGone as err:
                self.num_unanswered += err.was_asked
                left_s = give_up - time.monotonic()
                if self._ended.is_set() or left_s <= 0 or not self._up[seat].wait(left_s):
                    raise
                # It may have died while it is still taken for open.
                self._ended.wait(_PAUSE_S)
            except TRANSIENT as err:
                is_overtaken = err.reason is Reason.TRANSACTION_CONFLICT
                if isinstance(err, ConflictError) and not is_overtaken:
                    raise
                if self._ended.is_set() or time.monotonic() >= give_up:
                    raise


class Numbers:
    """Numbers of gradients and contents; none is given twice."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._last = 0

    def take(self) -> int:
        """Return the next one."""
        with self._lock:
            self._last += 1
            return self._last


class Client(ABC):
    """Somebody who asks one thing after the other.

    Parameters
    ----------
    name
        Prefix of the ids of requests.
    line
        To the service.
    history
        What clients were told.
    rng
        Decides what is asked.
    """

    def __init__(self, name: str, line: Line, history: History, rng: random.Random) -> None:
        self.name = name
        self.line = line
        self.history = history
        self.rng = rng
        self.counts: Counter[str] = Counter()
        """What became of the requests, by name."""
        self._num_requests = 0

    def live(self, stop: Event) -> None:
        """Ask until `stop` is set; what was asked is answered then."""
        while not stop.is_set():
            self._turn()

    @abstractmethod
    def _turn(self) -> None:
        """Ask one thing, and take note of the answer."""

    def ask_again(self) -> None:
        """Repeat what was answered, as if the answer had been lost: it must be the same."""
        return

    def _ask(self, kind: str, seat: Seat, method: str, *args: Any) -> Any:
        """Insist on an answer; None where there is a wrong one, which the history is told of."""
        before = self.line.num_unanswered
        try:
            return self.line.insist(seat, method, *args)
        except MembankError as err:
            self.history.blame(Wrong.FAILED, f"{method} {args} of {seat} is refused: {err!r}")
            return None
        finally:
            # Once, however often the service dies before it is answered.
            self.counts[f"{kind} unknown"] += self.line.num_unanswered > before

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"{self.name}-{self._num_requests}"


class Pusher(Client):
    """Pushes gradients, on the newest versions that anybody was told of.

    Parameters
    ----------
    name, line, history, rng
        As for every client.
    numbers
        Numbers of gradients.
    """

    def __init__(
        self, name: str, line: Line, history: History, rng: random.Random, numbers: Numbers
    ) -> None:
        super().__init__(name, line, history, rng)
        self._numbers = numbers
        self._answered: deque[tuple[Push, Asked, list[UpdateResult]]] = deque(maxlen=_REASKED)

    def ask_again(self) -> None:
        # docstring inherited
        for push, asked, first in list(self._answered):
            again, _ = self._push(push)
            self.counts["update asked again"] += 1
            self._compare(push, first, again)
            # What was refused is not remembered, and may be accepted now.
            self.history.pushed(push, asked, again)
        self._answered.clear()

    def _turn(self) -> None:
        refs = self.rng.sample(TRAINED, self.rng.randint(1, 4))
        if self.rng.random() < 0.3:
            refs.append(self.rng.choice(DOOMED))
        push = Push(
            request_id=self._next_id(),
            number=self._numbers.take(),
            bases=self.history.newest(refs),
        )
        asked = self.history.ask()
        results, is_repeat = self._push(push)
        self.history.pushed(push, asked, results)
        accepted = sum(result.accepted for result in results)
        self.counts["update acknowledged" if accepted else "update refused"] += 1
        self.counts["gradient acknowledged"] += accepted
        self.counts["update found done"] += is_repeat
        if accepted:
            self._answered.append((push, asked, results))

    def _push(self, push: Push) -> tuple[list[UpdateResult], bool]:
        results: list[UpdateResult] = []
        is_repeat = False
        for shard, refs in sorted(by_shard(push.bases).items()):
            found = self._ask("update", SHARDS[shard], "push", push.update(refs))
            if isinstance(found, PushResult):
                results += found.results
                is_repeat |= found.duplicate
        return results, is_repeat

    def _compare(self, push: Push, first: list[UpdateResult], again: list[UpdateResult]) -> None:
        now = {result.ref: result for result in again}
        for result in first:
            if result.accepted and now.get(result.ref) != result:
                self.history.blame(
                    Wrong.DOUBLED,
                    f"{push.request_id}, asked again, is answered {now.get(result.ref)}, "
                    f"and was answered {result}",
                )


class Reader(Client):
    """Reads blocks."""

    def _turn(self) -> None:
        is_marked = self.rng.random() < 0.7
        refs = MARKED if is_marked else self.rng.choice((TRAINED, DOOMED))
        asked = self.history.ask()
        for shard, mine in sorted(by_shard(refs).items()):
            looks = self._ask("fetch", SHARDS[shard], "fetch", mine, _LOOKS if is_marked else 1)
            for fetched in looks or ():
                self.history.fetched(asked, mine, fetched)
                self.counts["fetch answered"] += 1


class Operator(Client):
    """Swaps, withholds, deletes, makes snapshots and returns to them.

    Parameters
    ----------
    name, line, history, rng
        As for every client.
    numbers
        Numbers of contents.
    """

    def __init__(
        self, name: str, line: Line, history: History, rng: random.Random, numbers: Numbers
    ) -> None:
        super().__init__(name, line, history, rng)
        self._numbers = numbers
        self._last: tuple[AdminOperation, TransactionReport] | None = None
        # Newest last; only of those that nothing may have come between.
        self._revisions: deque[int] = deque(maxlen=_KEPT_REVISIONS)

    def ask_again(self) -> None:
        # docstring inherited
        if self._last is None:
            return
        operation, first = self._last
        again = self._ask("transaction", Seat.COORDINATOR, "change", operation)
        self.counts["transaction asked again"] += 1
        if again != first:
            self.history.blame(
                Wrong.DOUBLED,
                f"{operation.request_id}, asked again, is answered {again}, and was {first}",
            )
        self._last = None

    def _turn(self) -> None:
        operation = self._next()
        kind = operation.phase.name.lower()
        asked = self.history.ask()
        answer = self._ask(kind, Seat.COORDINATOR, "change", operation)
        self.counts[f"{kind} acknowledged"] += 1
        if isinstance(answer, GarbageReport):
            # It may have given revisions up, and made one to say so.
            self._revisions.clear()
        elif isinstance(answer, TransactionReport) and not isinstance(operation, Collect):
            self.history.changed(operation, asked, answer)
            self._revisions.append(answer.revision)
            self._last = (operation, answer)

    def _next(self) -> AdminOperation:
        if not self._num_requests:
            # The marked blocks hold one number from the beginning.
            return self._swap()
        names = self.history.snapshots()
        weights = {
            self._swap: 5,
            self._replace: 2,
            self._hide: 4,
            self._snapshot: 4 if len(names) < _MAX_SNAPSHOTS else 0,
            self._drop: 3 if names else 0,
            self._roll_back: 4 if names or len(self._revisions) > 1 else 0,
            self._doom: 6,
            self._collect: 4,
        }
        return self.rng.choices(list(weights), list(weights.values()))[0]()

    def _swap(self) -> AdminOperation:
        return Swap(request_id=self._next_id(), value=self._numbers.take())

    def _replace(self) -> AdminOperation:
        refs = tuple(self.rng.sample(TRAINED, 3))
        return Replace(request_id=self._next_id(), refs=refs, number=self._numbers.take())

    def _hide(self) -> AdminOperation:
        is_hidden = self.history.state(HIDDEN_TOPIC) is BlockState.WITHHELD
        return (Restore if is_hidden else Withhold)(request_id=self._next_id())

    def _snapshot(self) -> AdminOperation:
        request_id = self._next_id()
        return TakeSnapshot(request_id=request_id, name=f"s-{request_id}")

    def _drop(self) -> AdminOperation:
        name = self.rng.choice(self.history.snapshots())
        return DropSnapshot(request_id=self._next_id(), name=name)

    def _roll_back(self) -> AdminOperation:
        targets: list[str | int] = [*self.history.snapshots(), *list(self._revisions)[:-1]]
        topic = self.rng.choice((None, BlockRef(1, 0), HIDDEN_TOPIC, DOOMED_TOPIC))
        return RollBack(
            request_id=self._next_id(),
            target=self.rng.choice(targets),
            topic=topic,
            only_block=topic is not None and self.rng.random() < 0.3,
        )

    def _doom(self) -> AdminOperation:
        if self.history.state(DOOMED_TOPIC) is not BlockState.DELETED:
            return Delete(request_id=self._next_id())
        return Recreate(
            request_id=self._next_id(),
            number=self._numbers.take(),
            packed=self.rng.random() < 0.5,
        )

    def _collect(self) -> AdminOperation:
        keep = self.rng.choice((None, None, 1, 2))
        return Collect(request_id=self._next_id(), keep_revisions=keep)


AnyClient = Operator | Reader | Pusher
"""Whoever asks."""
