"""A transport in this process that tells in which threads it was called."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import Any

from fake_bank import FakeBank
from in_process import InProcessTransport
from membank.client import FetchAnswer, PushAnswer
from membank.wire.records import Update


class Witness:
    """A transport that notes where it is called, and may do what only a loop can.

    Parameters
    ----------
    inner
        Does the calls.
    """

    def __init__(self, inner: InProcessTransport) -> None:
        self._inner = inner
        self.before: Callable[[], Awaitable[None]] = _nothing
        """Awaited before each fetch."""
        self.after: Callable[[], object] = lambda: None
        """Called after each push, which is done."""
        self.threads: list[threading.Thread] = []
        """Where each fetch and push came from."""
        self.request_ids: list[str] = []
        """Id of each push."""
        self.timeouts: list[float] = []
        """Seconds that each fetch was given."""

    async def fetch(self, *args: Any, timeout_s: float, **kwargs: Any) -> FetchAnswer:
        """Return blocks."""
        self.threads.append(threading.current_thread())
        self.timeouts.append(timeout_s)
        await self.before()
        return await self._inner.fetch(*args, timeout_s=timeout_s, **kwargs)

    async def push(self, update: Update, **kwargs: Any) -> PushAnswer:
        """Apply gradients."""
        self.threads.append(threading.current_thread())
        self.request_ids.append(update.request_id)
        answer = await self._inner.push(update, **kwargs)
        self.after()
        return answer

    def __getattr__(self, method: str) -> Any:
        return getattr(self._inner, method)


class WitnessedNetwork:
    """Connects to a bank, a `Witness` before each of its shards.

    Parameters
    ----------
    bank
        The bank; its shards get addresses here.
    """

    def __init__(self, bank: FakeBank) -> None:
        self._bank = bank
        self._shards = dict(zip(("shard:1", "shard:2"), bank.shards, strict=True))
        for endpoint, shard in self._shards.items():
            bank.endpoints[shard.shard_id] = endpoint
        self.shards: dict[str, Witness] = {}
        """What stands before the shards, and the gateway."""

    def __call__(self, endpoint: str) -> Any:
        transport = Witness(InProcessTransport(self._bank, self._shards.get(endpoint)))
        self.shards[endpoint] = transport
        return transport


async def _nothing() -> None:
    """Do nothing, at once."""
