"""What every call of a client shares: configuration, deadlines, the gateway, the shards."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from membank.client.config import ClientConfig, RetryConfig
from membank.client.deadline import Deadline
from membank.client.retrying import call_with_retries
from membank.client.shards import ShardMap
from membank.client.transport.contract import Connector, Transport
from membank.wire.records import TransactionReport
from membank.wire.spec import BankSpec

T = TypeVar("T")


class Session:
    """The state behind a client; belongs to one event loop, but for what `run_inline` runs.

    Parameters
    ----------
    endpoint
        Address of the gateway, or of any shard.
    config
        Configuration.
    connector
        Connects to endpoints.
    """

    def __init__(self, endpoint: str, config: ClientConfig, connector: Connector) -> None:
        self.endpoint = endpoint
        self.config = config
        self.shards = ShardMap(endpoint, connector, grace_s=config.timeout_s)
        self._revision_lock = threading.Lock()
        self.revision = 0
        """Newest revision that this client has seen; it never reads an older one again."""
        self.report_listeners: list[Callable[[TransactionReport], None]] = []
        """Called with what each transaction of this client did."""

    def deadline(self, timeout_s: float | None) -> Deadline:
        """Return the deadline of a fetch, push or question."""
        return Deadline.after(self.config.timeout_s if timeout_s is None else timeout_s)

    def admin_deadline(self, timeout_s: float | None) -> Deadline:
        """Return the deadline of a change, an export or an import."""
        return Deadline.after(self.config.admin_timeout_s if timeout_s is None else timeout_s)

    async def ask_gateway(
        self,
        call: Callable[[Transport, float], Awaitable[T]],
        *,
        what: str,
        deadline: Deadline,
        retry: RetryConfig | None = None,
    ) -> T:
        """Make a call to the gateway, with retries; `call` gets it and the seconds left."""

        async def attempt(timeout_s: float) -> T:
            return await call(self.shards.gateway(), timeout_s)

        return await call_with_retries(
            attempt, what=what, deadline=deadline, config=retry or self.config.retry
        )

    async def spec(self, deadline: Deadline) -> BankSpec:
        """Return the bank's spec, asking for it once."""

        async def attempt(timeout_s: float) -> BankSpec:
            return (await self.shards.info(timeout_s=timeout_s)).spec

        return await call_with_retries(
            attempt, what="description of the bank", deadline=deadline, config=self.config.retry
        )

    def note_revision(self, revision: int) -> None:
        """Remember that the bank is at `revision` or later."""
        with self._revision_lock:
            self.revision = max(self.revision, revision)

    def noted(self, report: TransactionReport) -> TransactionReport:
        """Remember what a transaction did, and pass it on; return its report."""
        self.note_revision(report.revision)
        if not report.dry_run:
            for listen in self.report_listeners:
                listen(report)
        return report


def new_request_id() -> str:
    """Return a request id that no other request has."""
    return str(uuid.uuid4())
