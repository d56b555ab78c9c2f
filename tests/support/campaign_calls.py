"""Calls between the processes of a campaign: a method's name, its arguments, its answer."""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

from membank.wire.errors import InternalError, MembankError

PATIENCE_S = 60.0
"""Longest wait for an answer; a process that is alive and takes longer hangs."""


class ServiceGone(Exception):
    """The process died before it answered, or was not there.

    Parameters
    ----------
    address
        Where it listened.
    was_asked
        Whether the call may have taken effect.
    """

    def __init__(self, address: str, *, was_asked: bool) -> None:
        super().__init__(f"nobody answers at {address.strip(chr(0))}")
        self.was_asked = was_asked


class ServiceHangs(Exception):
    """The process lives and does not answer."""


class Caller:
    """Calls the methods of an object in another process, one after the other.

    Parameters
    ----------
    address
        Where the process listens.
    """

    # `_lock` is held for a whole call: a connection carries one at a time.

    def __init__(self, address: str) -> None:
        self._address = address
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Return what the method returns, or raise what it raises.

        Raises
        ------
        ServiceGone
            If nobody answers; whether the call took effect is not known.
        ServiceHangs
            If somebody should have answered.
        """
        with self._lock:
            answer = self._ask((method, args, kwargs))
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ask(self, call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> Any:
        connection = self._connected()
        try:
            connection.send(call)
            if not connection.poll(PATIENCE_S):
                raise ServiceHangs(f"{self._address.strip(chr(0))} does not answer {call}")
            return connection.recv()
        except (EOFError, OSError) as err:
            self._connection = None
            connection.close()
            raise ServiceGone(self._address, was_asked=True) from err

    def _connected(self) -> Connection:
        if self._connection is None:
            try:
                # The name goes when its process does, so that nobody talks to a dead one.
                self._connection = Client(self._address, "AF_UNIX")
            except OSError as err:
                raise ServiceGone(self._address, was_asked=False) from err
        return self._connection


def listen(address: str, answer: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]) -> None:
    """Answer calls until the process ends, each caller's in a thread of its own.

    Parameters
    ----------
    address
        Where to listen.
    answer
        Does a call and returns its answer; what it raises is the answer, too.
    """
    listener = Listener(address, "AF_UNIX", backlog=64)

    def accept() -> None:
        while True:
            threading.Thread(target=_serve, args=(listener.accept(), answer), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def _serve(
    connection: Connection, answer: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]
) -> None:
    while True:
        try:
            method, args, kwargs = connection.recv()
        except (EOFError, OSError):
            return
        try:
            connection.send(answer(method, args, kwargs))
        except MembankError as err:
            connection.send(err)
        except ConnectionError:
            return
        except Exception as err:
            connection.send(InternalError(f"{method}: {err!r}"))
