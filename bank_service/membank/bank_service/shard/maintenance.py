"""Work of a shard that nobody waits for: consolidation, leases, shipping of journals."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Protocol

_LOG = logging.getLogger(__name__)


class Consolidates(Protocol):
    """A partition, as far as maintenance is concerned."""

    number: int
    """The partition."""

    def try_consolidate(self) -> None:
        """Fold the journal; what goes wrong is noted by the partition itself."""


class Maintenance(Protocol):
    """Runs what a shard has to do beside answering. Safe to use from threads."""

    def request(self, partition: Consolidates) -> None:
        """Consolidate `partition` soon. The caller holds no lock of it."""

    def every(self, interval_s: float, action: Callable[[], object]) -> None:
        """Call `action` again and again until `close`; what it raises is logged."""

    def close(self) -> None:
        """Finish what is under way and start nothing more."""


class InlineMaintenance:
    """A `Maintenance` without threads: consolidates in the call that asks for it.

    For tests and for programs that own a shard by themselves. Nothing is done periodically: a
    lease is renewed by the call that finds it expired, and journals are shipped by hand.
    """

    def request(self, partition: Consolidates) -> None:
        # docstring inherited
        partition.try_consolidate()

    def every(self, interval_s: float, action: Callable[[], object]) -> None:
        # docstring inherited
        return

    def close(self) -> None:
        # docstring inherited
        return


class ThreadMaintenance:
    """A `Maintenance` with one thread for consolidation and one for each periodic duty.

    One consolidation at a time bounds the memory that consolidations hold; duties have threads of
    their own because a lease must not wait for a consolidation.
    """

    # `_changed` guards `_wanted` and `_threads`.

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wanted: dict[int, Consolidates] = {}
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []
        self._start("membank-consolidator", self._consolidate)

    def request(self, partition: Consolidates) -> None:
        # docstring inherited
        with self._changed:
            self._wanted.setdefault(partition.number, partition)
            self._changed.notify_all()

    def every(self, interval_s: float, action: Callable[[], object]) -> None:
        # docstring inherited
        def run() -> None:
            while not self._ended.wait(interval_s):
                try:
                    action()
                except Exception:
                    # It is tried again; a duty must not end with its first failure.
                    _LOG.exception("maintenance failed")

        self._start("membank-duty", run)

    def close(self) -> None:
        # docstring inherited
        self._ended.set()
        with self._changed:
            self._changed.notify_all()
            threads, self._threads = self._threads, []
        for thread in threads:
            thread.join()

    def _start(self, name: str, run: Callable[[], None]) -> None:
        thread = threading.Thread(target=run, name=name, daemon=True)
        with self._changed:
            self._threads.append(thread)
        thread.start()

    def _consolidate(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted or self._ended.is_set())
                if self._ended.is_set():
                    return
                partition = self._wanted.pop(next(iter(self._wanted)))
            try:
                partition.try_consolidate()
            except Exception:
                # The partition refuses updates once it has no room; others must go on.
                _LOG.exception("partition %d was not consolidated", partition.number)
