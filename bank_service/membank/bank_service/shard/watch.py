"""Subscriptions to changes of blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from threading import Condition, Lock

from membank.wire.records import BlockEvent
from membank.wire.spec import BlockRef


class QueuedSubscription:
    """A bounded queue of events; the oldest are dropped and counted when it is full."""

    def __init__(
        self, hub: WatchHub, refs: frozenset[BlockRef], *, admin_only: bool, max_events: int
    ) -> None:
        self._hub = hub
        self._refs = refs
        self._admin_only = admin_only
        self._events: deque[BlockEvent] = deque(maxlen=max_events)
        self._num_dropped = 0
        self._closed = False
        self._changed = Condition()

    def next_events(self, timeout_s: float) -> tuple[tuple[BlockEvent, ...], int]:
        """Return the events since the last call and the number of those that were dropped.

        Parameters
        ----------
        timeout_s
            Seconds to wait for the first event; 0 = do not wait.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._events or self._closed, timeout_s)
            events, dropped = tuple(self._events), self._num_dropped
            self._events.clear()
            self._num_dropped = 0
        return events, dropped

    def close(self) -> None:
        """End the subscription; a waiting `next_events` returns at once."""
        self._hub.remove(self)
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def offer(self, events: Iterable[BlockEvent]) -> None:
        """Add those events that were subscribed to."""
        with self._changed:
            for event in events:
                if (self._refs and event.ref not in self._refs) or (
                    self._admin_only and event.is_update
                ):
                    continue
                if len(self._events) == self._events.maxlen:
                    self._num_dropped += 1
                self._events.append(event)
            if self._events:
                self._changed.notify_all()


class WatchHub:
    """Passes events on to every subscription, without ever waiting for a subscriber."""

    # Threads: `_lock` guards the list only and is never held while a subscription's lock is taken.

    def __init__(self, max_events: int) -> None:
        self._max_events = max_events
        self._lock = Lock()
        self._subscriptions: tuple[QueuedSubscription, ...] = ()

    def subscribe(self, refs: Sequence[BlockRef], *, admin_only: bool) -> QueuedSubscription:
        """Return a new subscription to `refs`; empty = all."""
        subscription = QueuedSubscription(
            self, frozenset(refs), admin_only=admin_only, max_events=self._max_events
        )
        with self._lock:
            self._subscriptions = (*self._subscriptions, subscription)
        return subscription

    def remove(self, subscription: QueuedSubscription) -> None:
        """Pass nothing on to `subscription` from now on."""
        with self._lock:
            self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)

    def publish(self, events: Sequence[BlockEvent]) -> None:
        """Pass `events` on, in their order."""
        if events:
            for subscription in self._subscriptions:
                subscription.offer(events)

    def close(self) -> None:
        """End every subscription."""
        for subscription in self._subscriptions:
            subscription.close()
