"""Topics as files."""

from __future__ import annotations

import asyncio
import io
import mmap
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO

from membank.client.admin.calls import GatewayCalls
from membank.client.session import new_request_id
from membank.client.transport.contract import ImportAnswer, PackInfo, Transport
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.format.pack import sign_pack
from membank.wire.records import StoredPack
from membank.wire.signing import Signer
from membank.wire.spec import BlockRef


class PackCalls(GatewayCalls):
    """The part of `AsyncBankClient` that exports and imports packs; see `AdminCalls`."""

    async def export(
        self,
        topic: BlockRef,
        *,
        weights_only: bool = False,
        since: str | int | None = None,
        signer: Signer | None = None,
        timeout_s: float | None = None,
    ) -> bytes:
        """Return a topic as a pack (safetensors), checked, at most ``config.max_answer_bytes``.

        Parameters
        ----------
        topic
            The topic.
        weights_only
            True leaves the optimizer state out.
        since
            Name of a snapshot, or number of a revision: only blocks that differ from that, or from
            its end, as a diff; None = all.
        signer
            Signs it, once it is here and was checked; None = nobody does.
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            If the bank has no such topic, snapshot (UNKNOWN_SNAPSHOT) or revision (UNKNOWN_REVISION).
        CorruptionError
            If bytes were damaged on the way.
        InvalidArgumentError
            If it has more bytes (MESSAGE_TOO_LARGE); `export_to` has no such bound.
        """
        target = _Bounded(self._session.config.max_answer_bytes)
        await self.export_to(
            topic,
            target,
            weights_only=weights_only,
            since=since,
            signer=signer,
            timeout_s=timeout_s,
        )
        return target.getvalue()

    async def export_to(
        self,
        topic: BlockRef,
        target: BinaryIO,
        *,
        weights_only: bool = False,
        since: str | int | None = None,
        signer: Signer | None = None,
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
        since
            As for `export`.
        signer
            As for `export`; the pack waits in a temporary file meanwhile.
        timeout_s
            Deadline.

        Returns
        -------
        PackInfo
            What was received; a signature comes to that.

        Raises
        ------
        NotFoundError
            As for `export`.
        CorruptionError
            If bytes were damaged on the way; discard what was written.
        """
        if signer is not None:
            with tempfile.TemporaryFile() as received:
                info = await self.export_to(
                    topic, received, weights_only=weights_only, since=since, timeout_s=timeout_s
                )
                await asyncio.to_thread(_sign, received, target, signer, topic)
            return info
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
                topic, target, weights_only=weights_only, since=since, timeout_s=timeout_s
            )

        return await self._session.ask_gateway(
            call, what="export", deadline=self._session.admin_deadline(timeout_s), retry=retry
        )

    async def store_pack(
        self,
        topic: BlockRef,
        name: str,
        *,
        weights_only: bool = False,
        since: str | int | None = None,
        timeout_s: float | None = None,
    ) -> PackInfo:
        """Keep a topic as a pack in the bank's own store, until a block of it is deleted.

        Parameters
        ----------
        topic
            The topic.
        name
            Name of the pack: lower case letters, digits, hyphens, at most 63 characters.
        weights_only
            True leaves the optimizer state out.
        since
            As for `export`.
        timeout_s
            Deadline.

        Raises
        ------
        NotFoundError
            As for `export`.
        AlreadyExistsError
            If there is another pack of this name (PACK_EXISTS).
        """

        async def call(gateway: Transport, timeout_s: float) -> PackInfo:
            return await gateway.store_pack(
                topic, name, weights_only=weights_only, since=since, timeout_s=timeout_s
            )

        return await self._session.ask_gateway(
            call, what="store_pack", deadline=self._session.admin_deadline(timeout_s)
        )

    async def packs(self, *, timeout_s: float | None = None) -> tuple[StoredPack, ...]:
        """Return the packs in the bank's own store, by name."""

        async def call(gateway: Transport, timeout_s: float) -> tuple[StoredPack, ...]:
            return await gateway.list_packs(timeout_s=timeout_s)

        return await self._session.ask_gateway(
            call, what="packs", deadline=self._session.deadline(timeout_s)
        )

    async def delete_pack(
        self, name: str, *, request_id: str | None = None, timeout_s: float | None = None
    ) -> StoredPack:
        """Destroy a pack in the bank's own store, and return what it was.

        Parameters
        ----------
        name
            Its name.
        request_id
            Unique id; None = a new one.
        timeout_s
            Longest wait; None = as configured.

        Returns
        -------
        StoredPack
            What it was.

        Raises
        ------
        NotFoundError
            If there is none of this name (UNKNOWN_PACK).
        """
        request_id = request_id or new_request_id()

        async def call(gateway: Transport, timeout_s: float) -> StoredPack:
            return await gateway.delete_pack(name, request_id=request_id, timeout_s=timeout_s)

        return await self._session.ask_gateway(
            call, what="delete_pack", deadline=self._session.admin_deadline(timeout_s)
        )

    async def import_pack(
        self,
        pack: bytes | BinaryIO,
        *,
        topic: BlockRef | None = None,
        force: bool = False,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> ImportAnswer:
        """Install a pack.

        Parameters
        ----------
        pack
            The pack, or a binary file object that can seek, read from its present position.
        topic
            Topic to install it under, of the same level and shape; None = the one that it was exported
            from.
        force
            True installs a diff also where the bank does not hold what it was made against.
        dry_run
            True only reports what would change.
        request_id
            Id of the request.
        timeout_s
            Deadline.

        Raises
        ------
        InvalidArgumentError
            If it is no pack, or not one for this bank or topic.
        FailedPreconditionError
            If the pack belongs to another anchor or retriever, or the service takes only packs that
            are signed by keys it trusts (UNSIGNED, UNTRUSTED_KEY).
        CorruptionError
            If the pack is damaged, or its signature is not of it (BAD_SIGNATURE).
        ConflictError
            If it is a diff against something else than the bank holds (BASE_MISMATCH).
        """
        source = io.BytesIO(pack) if isinstance(pack, bytes) else pack
        if not source.seekable():
            raise InvalidArgumentError("the pack must be read twice; give a file that can seek")
        start = source.tell()

        def rewound() -> BinaryIO:
            source.seek(start)
            return source

        return await self._import(
            rewound, topic, force=force, dry_run=dry_run, request_id=request_id, timeout_s=timeout_s
        )

    async def import_stored(
        self,
        name: str,
        *,
        topic: BlockRef | None = None,
        force: bool = False,
        dry_run: bool = False,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> ImportAnswer:
        """Install a pack of the bank's own store.

        Parameters
        ----------
        name
            Name of the pack.
        topic, force, dry_run, request_id, timeout_s
            As for `import_pack`.

        Raises
        ------
        NotFoundError
            If there is none of this name (UNKNOWN_PACK).
        InvalidArgumentError, FailedPreconditionError, CorruptionError, ConflictError
            As for `import_pack`.
        """
        return await self._import(
            lambda: name,
            topic,
            force=force,
            dry_run=dry_run,
            request_id=request_id,
            timeout_s=timeout_s,
        )

    async def _import(
        self,
        source: Callable[[], BinaryIO | str],
        topic: BlockRef | None,
        *,
        force: bool,
        dry_run: bool,
        request_id: str | None,
        timeout_s: float | None,
    ) -> ImportAnswer:
        request_id = request_id or new_request_id()

        async def call(gateway: Transport, timeout_s: float) -> ImportAnswer:
            return await gateway.import_pack(
                source(),
                topic=topic,
                force=force,
                request_id=request_id,
                dry_run=dry_run,
                timeout_s=timeout_s,
            )

        answer = await self._session.ask_gateway(
            call, what="import_pack", deadline=self._session.admin_deadline(timeout_s)
        )
        self._session.noted(answer.report)
        return answer


def _sign(received: BinaryIO, target: BinaryIO, signer: Signer, topic: BlockRef) -> None:
    received.flush()
    # Unmapped with the last view of it.
    mapped = memoryview(mmap.mmap(received.fileno(), 0, access=mmap.ACCESS_READ))
    sign_pack(mapped, target, signer, what=f"the pack of topic {topic}")


class _Bounded(io.BytesIO):
    """Memory that takes so many bytes and no more."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__()
        self._max_bytes = max_bytes

    def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]  # what is written here
        # docstring inherited
        if self.tell() + len(data) > self._max_bytes:
            raise InvalidArgumentError(
                f"the pack has more bytes than max_answer_bytes, {self._max_bytes}; export it to a "
                "file (export_to)",
                reason=Reason.MESSAGE_TOO_LARGE,
            )
        return super().write(data)
