"""The clients of a campaign: they push, read and operate until the service dies, and then again."""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from multiprocessing.connection import Connection
from threading import Lock
from typing import Generic, TypeVar

from campaign_bank import (
    DOOMED,
    DOOMED_TOPIC,
    HIDDEN_TOPIC,
    MARKED,
    TRAINED,
    AdminOperation,
    Answer,
    Collect,
    Delete,
    DropSnapshot,
    Fetch,
    Push,
    Pushed,
    Recreate,
    Replace,
    Request,
    Restore,
    RollBack,
    Swap,
    TakeSnapshot,
    Withhold,
)
from campaign_model import History, Wrong
from campaign_past import Asked
from membank.wire.errors import MembankError, ResourceExhaustedError, UnavailableError
from membank.wire.records import GarbageReport, TransactionReport
from membank.wire.spec import BlockRef, BlockState

PATIENCE_S = 60.0
"""Longest wait for an answer; a service that is alive and takes longer hangs."""

_REASKED = 3
_LOOKS = 20
_MAX_SNAPSHOTS = 4
_KEPT_REVISIONS = 3

R = TypeVar("R", bound=Request)


class ServiceGone(Exception):
    """The service died before it answered."""


class ServiceHangs(Exception):
    """The service lives and does not answer."""


def ask(connection: Connection, request: Request) -> Answer:
    """Send a request and return its answer, or raise the error that it was answered with.

    Raises
    ------
    ServiceGone
        If nobody will answer.
    ServiceHangs
        If somebody should have.
    """
    try:
        connection.send(request)
        if not connection.poll(PATIENCE_S):
            raise ServiceHangs(f"no answer to {request} within {PATIENCE_S:.0f} s")
        answer = connection.recv()
    except (EOFError, ConnectionError) as err:
        raise ServiceGone from err
    except OSError as err:
        # What multiprocessing makes of an answer that was cut off in its middle.
        if err.errno is not None:
            raise
        raise ServiceGone from err
    if isinstance(answer, Exception):
        raise answer
    return answer  # type: ignore[no-any-return]  # whatever the service pickled


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


class Client(ABC, Generic[R]):
    """Somebody who asks one thing after the other, and keeps asking until it is answered.

    Parameters
    ----------
    name
        Prefix of the ids of requests.
    history
        What clients were told.
    rng
        Decides what is asked.
    """

    def __init__(self, name: str, history: History, rng: random.Random) -> None:
        self.name = name
        self.history = history
        self.rng = rng
        self.counts: Counter[str] = Counter()
        """What became of the requests, by name."""
        self._pending: tuple[R, Asked] | None = None
        self._is_unknown = False
        self._num_requests = 0

    def settle(self, connection: Connection) -> None:
        """Ask again what was not answered before the service died."""
        if self._pending is not None:
            self._finish(connection)

    def live(self, connection: Connection) -> None:
        """Ask until the service dies."""
        while True:
            self._pending = self._next(), self.history.ask()
            self._finish(connection)

    def _finish(self, connection: Connection) -> None:
        assert self._pending is not None
        request, asked = self._pending
        try:
            answer = self._insist(connection, request)
        except ServiceGone:
            # Once, however often the service dies before it is answered.
            self.counts[f"{self._kind(request)} unknown"] += not self._is_unknown
            self._is_unknown = True
            raise
        except MembankError as err:
            self.history.blame(Wrong.FAILED, f"{request} is refused: {err!r}")
        else:
            self._take(request, asked, answer)
        self._pending, self._is_unknown = None, False

    def _insist(self, connection: Connection, request: R) -> Answer:
        """Ask until there is an answer other than that it must be asked again."""
        give_up = time.monotonic() + PATIENCE_S
        while True:
            try:
                return ask(connection, request)
            except (UnavailableError, ResourceExhaustedError):
                if time.monotonic() >= give_up:
                    raise

    def _kind(self, request: R) -> str:
        return request.phase.name.lower()

    def _next_id(self) -> str:
        self._num_requests += 1
        return f"{self.name}-{self._num_requests}"

    @abstractmethod
    def _next(self) -> R:
        """Return what to ask next."""

    @abstractmethod
    def _take(self, request: R, asked: Asked, answer: Answer) -> None:
        """Take note of an answer."""


class Pusher(Client[Push]):
    """Pushes gradients, on the newest versions that anybody was told of.

    Parameters
    ----------
    name, history, rng
        As for every client.
    numbers
        Numbers of gradients.
    """

    def __init__(self, name: str, history: History, rng: random.Random, numbers: Numbers) -> None:
        super().__init__(name, history, rng)
        self._numbers = numbers
        self._answered: deque[tuple[Push, Asked, Pushed]] = deque(maxlen=_REASKED)

    def settle(self, connection: Connection) -> None:
        # docstring inherited
        super().settle(connection)
        # As if these answers had been lost too: they must be the same, and change nothing.
        for push, asked, first in list(self._answered):
            again = self._insist(connection, push)
            assert isinstance(again, Pushed)
            self.counts["update asked again"] += 1
            self._compare(push, first, again)
            # What was refused is not remembered, and may be accepted now.
            self.history.pushed(push, asked, again.results)
        self._answered.clear()

    def _next(self) -> Push:
        refs = self.rng.sample(TRAINED, self.rng.randint(1, 4))
        if self.rng.random() < 0.3:
            refs.append(self.rng.choice(DOOMED))
        return Push(
            request_id=self._next_id(),
            number=self._numbers.take(),
            bases=self.history.newest(refs),
        )

    def _take(self, request: Push, asked: Asked, answer: Answer) -> None:
        assert isinstance(answer, Pushed)
        self.history.pushed(request, asked, answer.results)
        accepted = sum(result.accepted for result in answer.results)
        self.counts["update acknowledged" if accepted else "update refused"] += 1
        self.counts["gradient acknowledged"] += accepted
        self.counts["update found done"] += answer.duplicate
        if accepted:
            self._answered.append((request, asked, answer))

    def _compare(self, push: Push, first: Pushed, again: Pushed) -> None:
        now = {result.ref: result for result in again.results}
        for result in first.results:
            if result.accepted and now[result.ref] != result:
                self.history.blame(
                    Wrong.DOUBLED,
                    f"{push.request_id}, asked again, is answered {now[result.ref]}, "
                    f"and was answered {result}",
                )


class Reader(Client[Fetch]):
    """Reads blocks, as of one revision."""

    def _next(self) -> Fetch:
        if self.rng.random() < 0.3:
            return Fetch(refs=self.rng.choice((TRAINED, DOOMED)))
        return Fetch(refs=MARKED, times=_LOOKS)

    def _take(self, request: Fetch, asked: Asked, answer: Answer) -> None:
        assert isinstance(answer, tuple)
        for fetched in answer:
            self.history.fetched(asked, fetched)
        self.counts["fetch answered"] += len(answer)


class Operator(Client[AdminOperation]):
    """Swaps, withholds, deletes, makes snapshots and returns to them.

    Parameters
    ----------
    name, history, rng
        As for every client.
    numbers
        Numbers of contents.
    """

    def __init__(self, name: str, history: History, rng: random.Random, numbers: Numbers) -> None:
        super().__init__(name, history, rng)
        self._numbers = numbers
        self._last: tuple[AdminOperation, TransactionReport] | None = None
        # Newest last; only of those that nothing may have come between.
        self._revisions: deque[int] = deque(maxlen=_KEPT_REVISIONS)
        # The marked blocks hold one number from the beginning.
        first = Swap(request_id=self._next_id(), value=numbers.take())
        self._pending = (first, history.ask())

    def settle(self, connection: Connection) -> None:
        # docstring inherited
        super().settle(connection)
        if self._last is not None:
            operation, first = self._last
            again = self._insist(connection, operation)
            self.counts["transaction asked again"] += 1
            if again != first:
                self.history.blame(
                    Wrong.DOUBLED,
                    f"{operation.request_id}, asked again, is answered {again}, and was {first}",
                )
            self._last = None

    def _next(self) -> AdminOperation:
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

    def _take(self, request: AdminOperation, asked: Asked, answer: Answer) -> None:
        self.counts[f"{self._kind(request)} acknowledged"] += 1
        if isinstance(request, Collect):
            assert isinstance(answer, GarbageReport)
            # It may have given revisions up, and made one to say so.
            self._revisions.clear()
            return
        assert isinstance(answer, TransactionReport)
        self.history.changed(request, asked, answer)
        self._revisions.append(answer.revision)
        self._last = (request, answer)

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
