"""Operations on what a bank knows."""

from __future__ import annotations

import io
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import BinaryIO

from membank.client.checks import check_arrays
from membank.client.session import Session, new_request_id
from membank.client.transport import ImportAnswer, PackInfo, Transport
from membank.wire.errors import InvalidArgumentError
from membank.wire.format import TreeDocument, encode_tree
from membank.wire.records import (
    AuditRecord,
    BankStats,
    BlockDescription,
    Snapshot,
    Topic,
    TransactionReport,
)
from membank.wire.spec import Array, BankSpec, BlockRef


class AdminCalls:
    """The admin half of `AsyncBankClient`.

    Every change is one transaction: it takes effect on all shards at one revision or not at all.
    Each takes a `request_id` (None = a new one): a retry with the same id returns the first answer.
    Each takes a `timeout_s` in seconds (None = ``config.admin_timeout_s``), retries included. Beside
    what its docstring names, each raises `UnavailableError` where the gateway does not answer,
    `DeadlineError` where time ran out (a change may or may not have happened; repeat it with the
    same request id), `UnauthenticatedError`, and `AccessDeniedError` where the caller's role is too
    low.

    Parameters
    ----------
    session
        What the calls share.
    """

    def __init__(self, session: Session) -> None:
        self._session = session

    async def create_bank(
        self,
        spec: BankSpec,
        tree: TreeDocument | None = None,
        *,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> BankSpec:
        """Create the bank of a service that was started on an empty location.

        Parameters
        ----------
        spec
            What is fixed at creation.
        tree
            Labels and retriever; None = none.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Returns
        -------
        BankSpec
            The spec with the bank_id that the service gave.

        Raises
        ------
        AlreadyExistsError
            If the service has a bank.
        InvalidArgumentError
            If the tree is too large to travel.
        """
        document = b"" if tree is None else encode_tree(tree)
        request_id = request_id or new_request_id()

        async def call(gateway: Transport, timeout_s: float) -> BankSpec:
            return await gateway.create_bank(
                spec, document, request_id=request_id, timeout_s=timeout_s
            )

        created = await self._session.ask_gateway(
            call, what="create_bank", deadline=self._session.admin_deadline(timeout_s)
        )
        self._session.shards.forget()
        return created

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

    async def export(
        self, topic: BlockRef, *, weights_only: bool = False, timeout_s: float | None = None
    ) -> bytes:
        """Return a topic as a pack (safetensors), checked.

        Parameters
        ----------
        topic
            The topic.
        weights_only
            True leaves the optimizer state out.
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If the bank has no such topic.
        CorruptionError
            If bytes were damaged on the way.
        """
        target = io.BytesIO()
        await self.export_to(topic, target, weights_only=weights_only, timeout_s=timeout_s)
        return target.getvalue()

    async def export_to(
        self,
        topic: BlockRef,
        target: BinaryIO,
        *,
        weights_only: bool = False,
        timeout_s: float | None = None,
    ) -> PackInfo:
        """Write a topic as a pack to a file object, from its present position.

        Parameters
        ----------
        topic
            The topic.
        target
            Binary and writable. One that cannot seek gets a single attempt. After an error it holds
            a part of the pack.
        weights_only
            True leaves the optimizer state out.
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If the bank has no such topic.
        CorruptionError
            If bytes were damaged on the way; discard what was written.
        """
        retry = self._session.config.retry
        start = target.tell() if target.seekable() else None
        if start is None:
            retry = replace(retry, max_attempts=1)

        async def call(gateway: Transport, timeout_s: float) -> PackInfo:
            if start is not None:
                # An attempt that was cut off has left its part here.
                target.seek(start)
                target.truncate()
            return await gateway.export(
                topic, target, weights_only=weights_only, timeout_s=timeout_s
            )

        return await self._session.ask_gateway(
            call, what="export", deadline=self._session.admin_deadline(timeout_s), retry=retry
        )

    async def import_pack(
        self,
        pack: bytes | BinaryIO,
        *,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> ImportAnswer:
        """Install a pack under the topic that it was exported from.

        Parameters
        ----------
        pack
            The pack, or a binary file object that can seek, read from its present position.
        dry_run
            True only reports what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        InvalidArgumentError
            If it is no pack, or not one for this bank.
        FailedPreconditionError
            If the pack belongs to another anchor.
        """
        source = io.BytesIO(pack) if isinstance(pack, bytes) else pack
        if not source.seekable():
            raise InvalidArgumentError("the pack must be read twice; give a file that can seek")
        start = source.tell()
        request_id = request_id or new_request_id()

        async def call(gateway: Transport, timeout_s: float) -> ImportAnswer:
            source.seek(start)
            return await gateway.import_pack(
                source, request_id=request_id, dry_run=dry_run, timeout_s=timeout_s
            )

        answer = await self._session.ask_gateway(
            call, what="import_pack", deadline=self._session.admin_deadline(timeout_s)
        )
        self._session.noted(answer.report)
        return answer

    async def snapshot(
        self, name: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> Snapshot:
        """Pin the present state of the bank under a name.

        Parameters
        ----------
        name
            Lower case letters, digits and hyphens, at most 63 characters.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        AlreadyExistsError
            If there is a snapshot of this name.
        InvalidArgumentError
            If the name is malformed.
        """
        request_id = request_id or new_request_id()

        async def call(gateway: Transport, timeout_s: float) -> Snapshot:
            return await gateway.create_snapshot(name, request_id=request_id, timeout_s=timeout_s)

        return await self._session.ask_gateway(
            call, what="snapshot", deadline=self._session.admin_deadline(timeout_s)
        )

    async def snapshots(self, *, timeout_s: float | None = None) -> tuple[Snapshot, ...]:
        """Return the snapshots, oldest first; `timeout_s` None = ``config.timeout_s``."""

        async def call(gateway: Transport, timeout_s: float) -> tuple[Snapshot, ...]:
            return await gateway.list_snapshots(timeout_s=timeout_s)

        return await self._session.ask_gateway(
            call, what="snapshots", deadline=self._session.deadline(timeout_s)
        )

    async def rollback(
        self,
        snapshot: str,
        *,
        topic: BlockRef | None = None,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        """Bring the bank, or one topic, back to a snapshot.

        Versions go on growing, and deleted blocks stay deleted.

        Parameters
        ----------
        snapshot
            Name of the snapshot.
        topic
            Only this topic and everything under it; None = the whole bank.
        dry_run
            True only reports what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If there is no such snapshot or topic.
        """
        request_id = request_id or new_request_id()
        return await self._change(
            "rollback",
            lambda gateway, timeout_s: gateway.rollback(
                snapshot, topic, request_id=request_id, dry_run=dry_run, timeout_s=timeout_s
            ),
            timeout_s,
        )

    async def stats(self, *, timeout_s: float | None = None) -> BankStats:
        """Return counters and sizes of the service; `timeout_s` None = ``config.timeout_s``."""

        async def call(gateway: Transport, timeout_s: float) -> BankStats:
            return await gateway.get_stats(timeout_s=timeout_s)

        return await self._session.ask_gateway(
            call, what="stats", deadline=self._session.deadline(timeout_s)
        )

    async def audit(
        self, *, limit: int = 100, timeout_s: float | None = None
    ) -> tuple[AuditRecord, ...]:
        """Return who did what to the bank, newest first.

        Parameters
        ----------
        limit
            Most records to return, >= 1.
        timeout_s
            Deadline; None = ``config.timeout_s``.
        """
        if limit < 1:
            raise InvalidArgumentError(f"limit is {limit}; accepted: >= 1")

        async def call(gateway: Transport, timeout_s: float) -> tuple[AuditRecord, ...]:
            return await gateway.list_audit_records(limit=limit, timeout_s=timeout_s)

        return await self._session.ask_gateway(
            call, what="audit", deadline=self._session.deadline(timeout_s)
        )

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
