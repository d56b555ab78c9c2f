"""The past of a bank: snapshots, rollback, the audit log, and what may go."""

from __future__ import annotations

from membank.client.admin.calls import GatewayCalls
from membank.client.session import new_request_id
from membank.client.transport.contract import Transport
from membank.wire.errors import InvalidArgumentError
from membank.wire.records import AuditRecord, GarbageReport, Snapshot, TransactionReport
from membank.wire.spec import BlockRef


class HistoryCalls(GatewayCalls):
    """The part of `AsyncBankClient` that deals with earlier states; see `AdminCalls`."""

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

    async def delete_snapshot(
        self, name: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> Snapshot:
        """Give a snapshot up and return it; readers that are pinned to it get an error from then on.

        What only it kept becomes garbage.

        Parameters
        ----------
        name
            Name of the snapshot.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If there is no such snapshot.
        """
        request_id = request_id or new_request_id()

        async def call(gateway: Transport, timeout_s: float) -> tuple[Snapshot, int]:
            return await gateway.delete_snapshot(name, request_id=request_id, timeout_s=timeout_s)

        snapshot, revision = await self._session.ask_gateway(
            call, what="delete_snapshot", deadline=self._session.admin_deadline(timeout_s)
        )
        self._session.note_revision(revision)
        return snapshot

    async def rollback(
        self,
        target: str | int,
        *,
        topic: BlockRef | None = None,
        only_block: bool = False,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> TransactionReport:
        """Bring the bank, one topic or one block back to an earlier state.

        Weights, optimizer state and step come back; versions go on growing, and deleted blocks stay
        deleted.

        Parameters
        ----------
        target
            Name of a snapshot, or number of a revision to whose end to return; ``audit`` with
            `retained_only` lists those.
        topic
            Only this topic and everything under it; None = the whole bank.
        only_block
            True leaves what lies under the topic as it is.
        dry_run
            True only reports what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If there is no such snapshot or topic, or the revision is not retained.
        InvalidArgumentError
            If the revision is the one in force.
        """
        request_id = request_id or new_request_id()
        return await self._change(
            "rollback",
            lambda gateway, timeout_s: gateway.rollback(
                target,
                topic,
                only_block=only_block,
                request_id=request_id,
                dry_run=dry_run,
                timeout_s=timeout_s,
            ),
            timeout_s,
        )

    async def collect_garbage(
        self,
        *,
        keep_revisions: int | None = None,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> GarbageReport:
        """Remove what nothing retained needs; cut off at any moment, it can be repeated.

        Parameters
        ----------
        keep_revisions
            Newest revisions whose history is kept, >= 1, whatever the settings of the service say;
            older history goes for good, but for snapshots. None = as the settings say.
        dry_run
            True only reports what would be removed.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        InvalidArgumentError
            If `keep_revisions` is less than 1.
        """
        if keep_revisions is not None and keep_revisions < 1:
            raise InvalidArgumentError(f"keep_revisions is {keep_revisions}; accepted: >= 1")
        request_id = request_id or new_request_id()

        async def call(gateway: Transport, timeout_s: float) -> GarbageReport:
            return await gateway.collect_garbage(
                keep_revisions=keep_revisions,
                dry_run=dry_run,
                request_id=request_id,
                timeout_s=timeout_s,
            )

        return await self._session.ask_gateway(
            call, what="collect_garbage", deadline=self._session.admin_deadline(timeout_s)
        )

    async def audit(
        self,
        *,
        limit: int = 100,
        retained_only: bool = False,
        timeout_s: float | None = None,
    ) -> tuple[AuditRecord, ...]:
        """Return who did what to the bank, newest first.

        Parameters
        ----------
        limit
            Most records to return, >= 1.
        retained_only
            True returns only those of revisions that the whole bank can be rolled back to.
        timeout_s
            Deadline; None = ``config.timeout_s``.
        """
        if limit < 1:
            raise InvalidArgumentError(f"limit is {limit}; accepted: >= 1")

        async def call(gateway: Transport, timeout_s: float) -> tuple[AuditRecord, ...]:
            return await gateway.list_audit_records(
                limit=limit, retained_only=retained_only, timeout_s=timeout_s
            )

        return await self._session.ask_gateway(
            call, what="audit", deadline=self._session.deadline(timeout_s)
        )

    async def receipt(self, revision: int, *, timeout_s: float | None = None) -> bytes:
        """Return the signed receipt of a deletion (`membank.wire.format.receipt`).

        Whether its signature is right, and its key to be trusted, is not checked here.

        Parameters
        ----------
        revision
            Revision of the deletion.
        timeout_s
            Deadline; None = ``config.timeout_s``.

        Raises
        ------
        NotFoundError
            If the revision deleted nothing, or there is none (UNKNOWN_RECEIPT).
        """
        if revision < 0:
            raise InvalidArgumentError(f"revision is {revision}; accepted: >= 0")

        async def call(gateway: Transport, timeout_s: float) -> bytes:
            return await gateway.get_receipt(revision, timeout_s=timeout_s)

        return await self._session.ask_gateway(
            call, what="receipt", deadline=self._session.deadline(timeout_s)
        )
