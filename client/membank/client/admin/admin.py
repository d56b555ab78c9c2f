"""Operations on what a bank knows."""

from __future__ import annotations

from membank.client.admin.changes import ChangeCalls
from membank.client.admin.history import HistoryCalls
from membank.client.admin.packs import PackCalls
from membank.client.admin.topics import TopicCalls
from membank.client.session import new_request_id
from membank.client.transport.contract import Transport
from membank.wire.format import TreeDocument, encode_tree
from membank.wire.records import BankStats
from membank.wire.spec import BankSpec


class AdminCalls(TopicCalls, ChangeCalls, PackCalls, HistoryCalls):
    """The admin half of `AsyncBankClient`.

    Every change is one transaction: it takes effect on all shards at one revision or not at all.
    Each takes a `request_id` (None = a new one): a retry with the same id returns the first answer.
    Each takes a `timeout_s` in seconds (None = ``config.admin_timeout_s``), retries included. Beside
    what its docstring names, each raises `UnavailableError` where the gateway does not answer,
    `DeadlineError` where time ran out (a change may or may not have happened; repeat it with the
    same request id), `UnauthenticatedError`, and `AccessDeniedError` where the caller's role is too
    low.
    """

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

    async def stats(self, *, timeout_s: float | None = None) -> BankStats:
        """Return counters and sizes of the service; `timeout_s` None = ``config.timeout_s``."""

        async def call(gateway: Transport, timeout_s: float) -> BankStats:
            return await gateway.get_stats(timeout_s=timeout_s)

        return await self._session.ask_gateway(
            call, what="stats", deadline=self._session.deadline(timeout_s)
        )
