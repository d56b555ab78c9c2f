"""One shard of a process over time: opened, given up when it was replaced, opened again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from membank.bank_service.cluster.identity import ShardIdentity
from membank.wire.errors import InternalError, MembankError, Reason, UnavailableError

if TYPE_CHECKING:
    # Only for the annotations: it imports torch, for which the controller has no use.
    from membank.bank_service.cluster.shard_server import ShardServer

_LOG = logging.getLogger(__name__)


class ShardKeeper:
    """Keeps a shard open as far as it may be; nothing raises but what says so.

    Parameters
    ----------
    shard_id
        Identity of the shard, for the log.
    start
        Opens and serves it; asks first whether this service still has the bank, where storage
        tells that.
    returns
        Whether a shard that was replaced may be opened again; True where `start` asks.
    """

    # `_lock` guards everything, so that a shard is opened and closed once.

    def __init__(self, shard_id: str, start: Callable[[], ShardServer], *, returns: bool) -> None:
        self._shard_id = shard_id
        self._start = start
        self._returns = returns
        self._lock = threading.Lock()
        self._server: ShardServer | None = None
        self._error: MembankError | None = None
        self._is_ended = False
        # Of an earlier life nothing is known: its journal may hold what is in no slot.
        self._is_folded = False

    def open(self) -> None:
        """Open the shard unless it is open; what keeps it from that is told by `server`."""
        with self._lock:
            if self._server is not None or self._is_ended:
                return
            try:
                self._server, self._error = self._start(), None
            except MembankError as err:
                self._error = err
            except Exception as err:
                _LOG.exception("%s did not open", self._shard_id)
                self._error = InternalError(f"{type(err).__name__}: {err}")

    def server(self) -> ShardServer:
        """Return the open shard.

        Raises
        ------
        MembankError
            What kept it from being opened, or why it was closed.
        """
        with self._lock:
            if self._server is None:
                raise self._error or UnavailableError("the shard is starting; retry")
            return self._server

    def identity(self) -> ShardIdentity:
        """Return where the shard is found.

        A shard that finds itself replaced is closed here: it can acknowledge and serve nothing any
        more, and those who ask it should learn at once that it is gone.

        Raises
        ------
        MembankError
            As for `server`.
        """
        server = self.server()
        replaced = server.shard.fenced
        if replaced is not None:
            self._give_up(server, replaced)
            raise replaced
        return server.identity

    def stop(self) -> bool:
        """Drain and close; return whether all that was acknowledged is in slots.

        A shard that did not open has not looked into its journal, and says no.

        Raises
        ------
        MembankError
            What could not be brought into slots; it is in the journal, and `open` finds it there.
        """
        with self._lock:
            server, self._server = self._server, None
            if server is not None:
                # Not as if nobody answered: whoever looks after it must know to open it again.
                self._error = UnavailableError(
                    "the shard is stopped; retry", reason=Reason.NOT_RUNNING
                )
                self._close(server)
            return self._is_folded

    def _close(self, server: ShardServer) -> None:
        self._is_folded = False
        self._is_folded = server.stop()

    def _give_up(self, server: ShardServer, replaced: MembankError) -> None:
        with self._lock:
            if self._server is not server:
                return
            _LOG.error("%s is closed: %s", self._shard_id, replaced)
            self._server, self._error = None, replaced
            self._is_ended = not self._returns
            try:
                self._close(server)
            except MembankError as err:
                _LOG.info("%s was not closed in order: %s", self._shard_id, err)
