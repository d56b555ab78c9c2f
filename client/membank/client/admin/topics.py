"""Operations on topics and blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from membank.client.admin.calls import GatewayCalls
from membank.client.checks import check_arrays
from membank.client.session import new_request_id
from membank.client.transport.contract import Transport
from membank.wire.errors import InvalidArgumentError
from membank.wire.records import BlockDescription, Topic, TransactionReport
from membank.wire.spec import Array, BlockRef


class TopicCalls(GatewayCalls):
    """The part of `AsyncBankClient` that lists, changes and removes topics; see `AdminCalls`."""

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

    async def swap(
        self,
        weights: Mapping[BlockRef, Array],
        *,
        expected: Mapping[BlockRef, int] | None = None,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        """Replace the content of blocks, all or none; no reader sees a mixture.

        Optimizer states start afresh. A deleted block is created anew.

        Parameters
        ----------
        weights
            New content, (L, P, R, D) float32, bfloat16 or float16; not retained.
        expected
            Versions that blocks must have; a block that is missing here may have any.
        dry_run
            True only reports what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        ConflictError
            If a block has another version than expected; fetch again, decide again.
        InvalidArgumentError
            If a shape or dtype is wrong, or nothing is to be swapped.
        NotFoundError
            If one is no block of the bank.
        """
        deadline = self._session.admin_deadline(timeout_s)
        if not weights:
            raise InvalidArgumentError("a swap of no blocks; give at least one")
        spec = await self._session.spec(deadline)
        check_arrays(spec, weights, what="weights", max_bytes=self._session.config.max_push_bytes)
        request_id = request_id or new_request_id()

        async def call(gateway: Transport, timeout_s: float) -> TransactionReport:
            return await gateway.swap(
                weights,
                expected=expected or {},
                request_id=request_id,
                dry_run=dry_run,
                timeout_s=timeout_s,
            )

        report = await self._session.ask_gateway(call, what="swap", deadline=deadline)
        return self._session.noted(report)

    async def withhold(
        self,
        topic: BlockRef,
        *,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        """Hide a topic and everything under it from fetches and updates, reversibly.

        Parameters
        ----------
        topic
            The topic.
        dry_run
            True only reports what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If the bank has no such topic.
        """
        request_id = request_id or new_request_id()
        return await self._change(
            "withhold",
            lambda gateway, timeout_s: gateway.withhold(
                topic, request_id=request_id, dry_run=dry_run, timeout_s=timeout_s
            ),
            timeout_s,
        )

    async def restore(
        self,
        topic: BlockRef,
        *,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        """End the withholding of a topic and everything under it.

        Parameters
        ----------
        topic
            The topic.
        dry_run
            True only reports what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If the bank has no such topic.
        """
        request_id = request_id or new_request_id()
        return await self._change(
            "restore",
            lambda gateway, timeout_s: gateway.restore(
                topic, request_id=request_id, dry_run=dry_run, timeout_s=timeout_s
            ),
            timeout_s,
        )

    async def delete(
        self,
        topic: BlockRef,
        *,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        """Delete a topic and everything under it, in every retained version.

        Parameters
        ----------
        topic
            The topic.
        dry_run
            True only reports what would be destroyed.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If the bank has no such topic.
        """
        request_id = request_id or new_request_id()
        return await self._change(
            "delete",
            lambda gateway, timeout_s: gateway.delete(
                topic, request_id=request_id, dry_run=dry_run, timeout_s=timeout_s
            ),
            timeout_s,
        )
