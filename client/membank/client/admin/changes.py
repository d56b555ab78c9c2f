"""Changes of blocks, topics and the tree; each call is one transaction."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from membank.client.admin.calls import GatewayCalls
from membank.client.checks import check_arrays
from membank.client.session import new_request_id
from membank.client.transaction import Transaction
from membank.client.transport.contract import Transport
from membank.wire.errors import InvalidArgumentError
from membank.wire.records import Applied, TransactionReport
from membank.wire.spec import Array, BlockRef
from membank.wire.steps import Delete, Restore, Step, Swap, Withhold


class ChangeCalls(GatewayCalls):
    """The part of `AsyncBankClient` that changes what a bank knows; see `AdminCalls`."""

    @asynccontextmanager
    async def transaction(
        self,
        *,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> AsyncIterator[Transaction]:
        """Collect steps and apply them as one when the context ends without an error.

        Parameters
        ----------
        dry_run
            True only finds out what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline of applying them.

        Yields
        ------
        Transaction
            Takes the steps; its `report` says afterwards what was done.

        Raises
        ------
        MembankError
            At the end, what `apply` raises; nothing was changed then.
        """
        transaction = Transaction(dry_run=dry_run)
        yield transaction
        if transaction.steps:
            transaction.applied = await self.apply(
                transaction.steps, dry_run=dry_run, request_id=request_id, timeout_s=timeout_s
            )

    async def apply(
        self,
        steps: Sequence[Step],
        *,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> Applied:
        """Apply steps as one transaction, all or none; no reader sees a mixture.

        Parameters
        ----------
        steps
            At least one; `Transaction` makes them. Weights are not retained.
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
        FailedPreconditionError
            If all of a topic is deleted, or content is asked of a block that is deleted or
            withheld, or the bank has no tree to change.
        InvalidArgumentError
            If there is no step, two are at odds, or content does not fit or is not finite.
        NotFoundError
            If the bank has no such block or topic.
        """
        deadline = self._session.admin_deadline(timeout_s)
        if not steps:
            raise InvalidArgumentError("a transaction of no steps; give at least one")
        weights = {step.ref: step.weight for step in steps if isinstance(step, Swap)}
        if weights:
            spec = await self._session.spec(deadline)
            max_bytes = self._session.config.max_push_bytes
            check_arrays(spec, weights, what="weights", max_bytes=max_bytes)
        request_id = request_id or new_request_id()

        async def call(gateway: Transport, timeout_s: float) -> Applied:
            return await gateway.apply(
                steps, request_id=request_id, dry_run=dry_run, timeout_s=timeout_s
            )

        applied = await self._session.ask_gateway(call, what="apply", deadline=deadline)
        self._session.noted(applied.report)
        return applied

    async def swap(
        self,
        weights: Mapping[BlockRef, Array],
        *,
        expected: Mapping[BlockRef, int] | None = None,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        """Replace the content of blocks, all or none.

        Optimizer states start afresh. A deleted block is created anew.

        Parameters
        ----------
        weights
            New content, (L, P, R, D) in the bank's dtype; not retained.
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
        versions = expected or {}
        steps = [
            Swap(ref=ref, weight=weight, expected_version=versions.get(ref))
            for ref, weight in weights.items()
        ]
        return await self._applied(steps, dry_run, request_id, timeout_s)

    async def withhold(
        self,
        topic: BlockRef,
        *,
        only_block: bool = False,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        """Hide a topic and everything under it from fetches and updates, reversibly.

        Parameters
        ----------
        topic
            The topic.
        only_block
            True leaves what lies under it as it is.
        dry_run
            True only reports what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        FailedPreconditionError
            If all of it is deleted.
        NotFoundError
            If the bank has no such topic.
        """
        steps = [Withhold(topic=topic, only_block=only_block)]
        return await self._applied(steps, dry_run, request_id, timeout_s)

    async def restore(
        self,
        topic: BlockRef,
        *,
        only_block: bool = False,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        """End the withholding of a topic and everything under it.

        Parameters
        ----------
        topic
            The topic.
        only_block
            True leaves what lies under it as it is.
        dry_run
            True only reports what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        FailedPreconditionError
            If all of it is deleted.
        NotFoundError
            If the bank has no such topic.
        """
        steps = [Restore(topic=topic, only_block=only_block)]
        return await self._applied(steps, dry_run, request_id, timeout_s)

    async def delete(
        self,
        topic: BlockRef,
        *,
        only_block: bool = False,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        """Delete a topic and everything under it, in every retained version.

        Parameters
        ----------
        topic
            The topic.
        only_block
            True leaves what lies under it as it is.
        dry_run
            True only reports what would be destroyed.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        FailedPreconditionError
            If all of it is deleted already.
        NotFoundError
            If the bank has no such topic.
        """
        steps = [Delete(topic=topic, only_block=only_block)]
        return await self._applied(steps, dry_run, request_id, timeout_s)

    async def _applied(
        self,
        steps: Sequence[Step],
        dry_run: bool,
        request_id: str | None,
        timeout_s: float | None,
    ) -> TransactionReport:
        applied = await self.apply(
            steps, dry_run=dry_run, request_id=request_id, timeout_s=timeout_s
        )
        return applied.report
