"""Pushes to one partition that wait for their turn."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import Event, Lock

from membank.bank_service.shard.content import Content
from membank.wire.format import Entry
from membank.wire.records import Gradient, Update, UpdateResult
from membank.wire.spec import BlockRef

_BATCH_BYTES = 64 << 20
"""Gradients that are journalled by one write, at most; one push alone may have more."""
_AHEAD_BYTES = 64 << 20
"""Gradients of waiting pushes up to which another one is computed before its turn."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """What a gradient makes of a block as it was when nobody had yet looked at the whole batch."""

    before: Entry
    """The block's entry then; what was computed holds for this version of the block only."""
    after: tuple[Entry, Content] | None
    """The block with the gradient; None where it would hold a number that is not finite."""


@dataclass(slots=True, eq=False)
class Call:
    """One push to a partition, on its way. Attempts of the same update are different calls."""

    update: Update
    """The update."""
    gradients: Sequence[Gradient]
    """Those of its gradients that belong to the partition."""
    results: tuple[UpdateResult, ...] | None = None
    """What is answered; None = not yet."""
    is_repeat: bool = False
    """Whether the update had been applied before."""
    error: Exception | None = None
    """Why it failed; None = it did not."""
    ahead: dict[BlockRef, Ahead] = field(default_factory=dict)
    """What was computed before its turn came; complete once it is `ready`."""
    ready: Event = field(default_factory=Event)
    """Set once its own thread computes nothing any more."""

    @property
    def is_done(self) -> bool:
        """Whether the answer is there."""
        return self.results is not None or self.error is not None

    @property
    def num_bytes(self) -> int:
        """Bytes of its gradients."""
        return sum(gradient.values.nbytes for gradient in self.gradients)


class PushQueue:
    """The calls that wait, in the order of their coming. Safe to use from threads."""

    # `_lock` is held for moments only: a push must be able to join while another one holds the
    # partition's `writer` and journals, or nothing would be left to journal together.

    def __init__(self) -> None:
        self._lock = Lock()
        self._calls: deque[Call] = deque()
        self._waiting_bytes = 0
        # Blocks of calls that wait, or were taken out and are not settled yet, and how many.
        self._busy: Counter[BlockRef] = Counter()

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call) -> bool:
        """Let `call` wait behind the others; say whether it should be computed before its turn.

        It should not where an earlier call changes one of its blocks, so that the result would be
        of no use, nor where what waits takes much memory already. Whoever adds a call must set
        its `ready`, computed or not.
        """
        num_bytes = call.num_bytes
        refs = [gradient.ref for gradient in call.gradients]
        with self._lock:
            is_alone = not any(ref in self._busy for ref in refs)
            has_room = not self._calls or self._waiting_bytes + num_bytes <= _AHEAD_BYTES
            self._calls.append(call)
            self._waiting_bytes += num_bytes
            self._busy.update(refs)
        return is_alone and has_room

    def remove(self, call: Call) -> None:
        """Take out a call that gives up; it must be waiting."""
        with self._lock:
            self._calls.remove(call)
            self._waiting_bytes -= call.num_bytes
            self._settle(call)

    def next_batch(self) -> list[Call]:
        """Take out the first call and as many after it as are journalled by one write.

        The first is waited for until it is `ready`; those after it join if they are. Each has to
        be handed to `settle` once it is installed or has failed.
        """
        with self._lock:
            calls = [self._calls.popleft()]
            num_bytes = calls[0].num_bytes
            while (
                self._calls
                and self._calls[0].ready.is_set()
                and num_bytes + self._calls[0].num_bytes <= _BATCH_BYTES
            ):
                calls.append(self._calls.popleft())
                num_bytes += calls[-1].num_bytes
            self._waiting_bytes -= num_bytes
        calls[0].ready.wait()
        return calls

    def settle(self, calls: Iterable[Call]) -> None:
        """Forget calls that `next_batch` returned."""
        with self._lock:
            for call in calls:
                self._settle(call)

    def _settle(self, call: Call) -> None:
        for gradient in call.gradients:
            self._busy[gradient.ref] -= 1
            if not self._busy[gradient.ref]:
                del self._busy[gradient.ref]
