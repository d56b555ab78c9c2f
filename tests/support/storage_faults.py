"""Storage that fails at a chosen moment: wrappers around object stores and journal files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum, auto
from pathlib import Path
from typing import TypeVar

from membank.bank_service.store import Data, ObjectStore
from membank.bank_service.store.journal import LogFile, PosixLogFile
from membank.wire.errors import MembankError, Reason, ResourceExhaustedError, UnavailableError

T = TypeVar("T")


class StorageFault(Enum):
    """What happens at the chosen mutating call."""

    CRASH_BEFORE = auto()
    """The process dies before it; of a write to the journal, half is done."""
    CRASH_AFTER = auto()
    """The process dies after it."""
    NO_SPACE = auto()
    """It fails, once, for lack of space; of a write to the journal, half was done."""
    LOST_RESPONSE = auto()
    """It is done, but reported as failed, once; journal files on a local disk are spared."""


class Crash(BaseException):  # not an error that anybody may handle
    """The process is dead; nothing in it may catch this and go on."""


class FaultPlan:
    """Counts mutating calls of all wrappers that share it, and fails one of them.

    Parameters
    ----------
    fault
        What happens.
    at
        Number of the call at which it happens, from 1; 0 = never.
    """

    def __init__(self, fault: StorageFault = StorageFault.CRASH_BEFORE, at: int = 0) -> None:
        self.fault = fault
        self.at = at
        self.num_calls = 0
        self.happened = False
        self.is_dead = False

    def run(
        self, call: Callable[[], None], *, half: Callable[[], None] | None = None, what: str
    ) -> None:
        """Do `call`, unless it is the one that fails; `half` does a part of it."""
        if self.is_dead:
            raise Crash(what)
        self.num_calls += 1
        if self.num_calls != self.at:
            call()
            return
        is_journal = half is not None
        self.happened = True
        match self.fault:
            case StorageFault.CRASH_BEFORE:
                if half is not None:
                    half()
                self.is_dead = True
                raise Crash(what)
            case StorageFault.CRASH_AFTER:
                call()
                self.is_dead = True
                raise Crash(what)
            case StorageFault.NO_SPACE if half is not None:
                half()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case StorageFault.NO_SPACE:
                raise ResourceExhaustedError(f"{what}: no space", reason=Reason.NO_SPACE)
            case StorageFault.LOST_RESPONSE:
                call()
                if not is_journal:
                    raise UnavailableError(f"{what}: no answer", reason=Reason.STORE_FAILED)


class FaultyObjects:
    """An object store whose mutating calls follow a `FaultPlan`."""

    def __init__(self, inner: ObjectStore, plan: FaultPlan) -> None:
        self._inner = inner
        self._plan = plan

    @property
    def url(self) -> str:
        return self._inner.url

    def get(self, key: str) -> bytes:
        return self._inner.get(key)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return self._inner.get_range(key, start, end)

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._plan.run(lambda: self._inner.put(key, data, durable=durable), what=f"put {key}")

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._plan.run(
            lambda: self._inner.put_if_absent(key, data, durable=durable), what=f"create {key}"
        )

    def sync(self, keys: Sequence[str]) -> None:
        self._plan.run(lambda: self._inner.sync(keys), what=f"sync {len(keys)}")

    def list(self, prefix: str) -> list[str]:
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        self._plan.run(lambda: self._inner.delete(key), what=f"delete {key}")


class Outage:
    """An object store that cannot be reached while `is_down`.

    Parameters
    ----------
    inner
        The store.
    """

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self.is_down = False
        self.delivers = False
        """Whether requests arrive while it is down, and only their answers are lost."""

    @property
    def url(self) -> str:
        return self._inner.url

    def get(self, key: str) -> bytes:
        return self._reach(lambda: self._inner.get(key))

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return self._reach(lambda: self._inner.get_range(key, start, end))

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._reach(lambda: self._inner.put(key, data, durable=durable))

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._reach(lambda: self._inner.put_if_absent(key, data, durable=durable))

    def sync(self, keys: Sequence[str]) -> None:
        self._reach(lambda: self._inner.sync(keys))

    def list(self, prefix: str) -> list[str]:
        return self._reach(lambda: self._inner.list(prefix))

    def delete(self, key: str) -> None:
        self._reach(lambda: self._inner.delete(key))

    def _reach(self, call: Callable[[], T]) -> T:
        if not self.is_down:
            return call()
        if self.delivers:
            with suppress(MembankError):
                call()
        raise UnavailableError(f"{self.url}: no answer", reason=Reason.STORE_FAILED)


class Interleaved:
    """An object store in front of which something else happens once, before a chosen call.

    Parameters
    ----------
    inner
        The store.
    """

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self._chosen: tuple[str, str] = ("", "")
        self._action: Callable[[], object] | None = None
        self.calls: list[tuple[str, str]] = []
        """Name and key (or prefix) of each mutating call."""

    def before(self, call: str, part: str, action: Callable[[], object]) -> None:
        """Let `action` happen before the next `call` whose key or prefix contains `part`."""
        self._chosen, self._action = (call, part), action

    @property
    def url(self) -> str:
        return self._inner.url

    def get(self, key: str) -> bytes:
        self._come("get", key)
        return self._inner.get(key)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        self._come("get", key)
        return self._inner.get_range(key, start, end)

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._change("put", key)
        self._inner.put(key, data, durable=durable)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._change("put_if_absent", key)
        self._inner.put_if_absent(key, data, durable=durable)

    def sync(self, keys: Sequence[str]) -> None:
        self._inner.sync(keys)

    def list(self, prefix: str) -> list[str]:
        self._come("list", prefix)
        return self._inner.list(prefix)

    def delete(self, key: str) -> None:
        self._change("delete", key)
        self._inner.delete(key)

    def _change(self, call: str, key: str) -> None:
        self.calls.append((call, key))
        self._come(call, key)

    def _come(self, call: str, key: str) -> None:
        chosen, part = self._chosen
        action = self._action
        if action is not None and call == chosen and part in key:
            self._action = None
            action()


class FaultyLogFile:
    """A journal file whose mutating calls follow a `FaultPlan`."""

    def __init__(self, path: Path, plan: FaultPlan) -> None:
        self._plan = plan
        opened: list[LogFile] = []
        plan.run(lambda: opened.append(PosixLogFile(path)), half=lambda: None, what=f"open {path}")
        self._inner = opened[0]

    def append(self, buffers: Sequence[bytes | memoryview]) -> None:
        data = b"".join(buffers)
        self._plan.run(
            lambda: self._inner.append([data]),
            half=lambda: self._inner.append([data[: len(data) // 2]]),
            what="append",
        )

    def truncate(self, num_bytes: int) -> None:
        self._plan.run(lambda: self._inner.truncate(num_bytes), half=lambda: None, what="truncate")

    def sync(self) -> None:
        self._plan.run(self._inner.sync, half=lambda: None, what="sync")

    def close(self) -> None:
        self._inner.close()


def faulty_remove(plan: FaultPlan) -> Callable[[Path], None]:
    """Return what removes the files of a journal as `plan` says."""
    return lambda path: plan.run(path.unlink, half=lambda: None, what=f"remove {path}")
