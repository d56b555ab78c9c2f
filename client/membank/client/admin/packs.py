"""Topics as files."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import BinaryIO

from membank.client.admin.calls import GatewayCalls
from membank.client.session import new_request_id
from membank.client.transport.contract import ImportAnswer, PackInfo, Transport
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BlockRef


class PackCalls(GatewayCalls):
    """The part of `AsyncBankClient` that exports and imports packs; see `AdminCalls`."""

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
