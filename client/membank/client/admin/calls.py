"""What all admin calls share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from membank.client.session import Session
from membank.client.transport.contract import Transport
from membank.wire.records import TransactionReport


class GatewayCalls:
    """Calls that the gateway answers.

    Parameters
    ----------
    session
        What the calls share.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    async def _change(
        self,
        what: str,
        call: Callable[[Transport, float], Awaitable[TransactionReport]],
        timeout_s: float | None,
    ) -> TransactionReport:
        deadline = self._session.admin_deadline(timeout_s)
        return self._session.noted(
            await self._session.ask_gateway(call, what=what, deadline=deadline)
        )
