"""What a bank knows of topics and blocks."""

from __future__ import annotations

from collections.abc import Sequence

from membank.client.admin.calls import GatewayCalls
from membank.client.transport.contract import Transport
from membank.wire.records import BlockDescription, Topic
from membank.wire.spec import BlockRef


class TopicCalls(GatewayCalls):
    """The part of `AsyncBankClient` that lists topics; see `AdminCalls`."""

    async def topics(
        self,
        parent: BlockRef | None = None,
        *,
        depth: int = 0,
        timeout_s: float | None = None,
    ) -> tuple[Topic, ...]:
        """Return topics with labels, states, versions and sizes, by level and cluster.

        Parameters
        ----------
        parent
            Only this topic and those under it; None = all.
        depth
            Levels to descend below the parent; 0 = all.
        timeout_s
            Deadline; None = ``config.timeout_s``.
        """

        async def call(gateway: Transport, timeout_s: float) -> tuple[Topic, ...]:
            return await gateway.list_topics(parent, depth=depth, timeout_s=timeout_s)

        return await self._session.ask_gateway(
            call, what="topics", deadline=self._session.deadline(timeout_s)
        )

    async def describe(
        self, refs: Sequence[BlockRef], *, timeout_s: float | None = None
    ) -> tuple[BlockDescription, ...]:
        """Return blocks in full, in the order of `refs`.

        Parameters
        ----------
        refs
            The blocks.
        timeout_s
            Deadline; None = ``config.timeout_s``.

        Raises
        ------
        NotFoundError
            If one is no block of the bank.
        """

        async def call(gateway: Transport, timeout_s: float) -> tuple[BlockDescription, ...]:
            return await gateway.describe(refs, timeout_s=timeout_s)

        return await self._session.ask_gateway(
            call, what="describe", deadline=self._session.deadline(timeout_s)
        )
