"""The admin half of the gRPC transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, BinaryIO

from membank.client.config import ClientConfig
from membank.client.transport.contract import ImportAnswer, PackInfo
from membank.client.transport.grpc_channel import GrpcChannel
from membank.client.transport.payloads import (
    import_requests,
    read_pack_head,
    transaction_requests,
    write_pack,
)
from membank.v1 import admin_service_pb2 as admin_pb
from membank.v1.admin_service_pb2_grpc import AdminServiceStub
from membank.wire.convert import (
    audit_from_pb,
    description_from_pb,
    garbage_from_pb,
    ref_from_pb,
    ref_to_pb,
    report_from_pb,
    snapshot_from_pb,
    spec_from_pb,
    spec_to_pb,
    stats_from_pb,
    stored_pack_from_pb,
    topic_from_pb,
)
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.framing import MAX_MESSAGE_BYTES
from membank.wire.records import (
    Applied,
    AuditRecord,
    BankStats,
    BlockDescription,
    GarbageReport,
    Snapshot,
    StoredPack,
    Topic,
    TransactionReport,
)
from membank.wire.spec import BankSpec, BlockRef
from membank.wire.steps import Step

if TYPE_CHECKING:
    # The stubs alone know it.
    from membank.v1.admin_service_pb2_grpc import AdminServiceAsyncStub


class GrpcAdminTransport:
    """Operations on what a bank knows, over a channel to the gateway.

    Parameters
    ----------
    channel
        The channel; closed together with this.
    config
        Bank and limits.
    """

    def __init__(self, channel: GrpcChannel, config: ClientConfig) -> None:
        self._channel = channel
        self._bank = config.bank
        self._max_answer_bytes = config.max_answer_bytes
        self._admin: AdminServiceAsyncStub = AdminServiceStub(channel.channel)

    async def close(self, *, grace_s: float = 0.0) -> None:
        """Close the connection; calls that still run have `grace_s` seconds to end."""
        await self._channel.close(grace_s=grace_s)

    async def create_bank(
        self, spec: BankSpec, tree: bytes, *, request_id: str, timeout_s: float
    ) -> BankSpec:
        """Create the bank and return its spec with the bank_id."""
        request = admin_pb.CreateBankRequest(
            request_id=request_id, spec=spec_to_pb(spec), tree=tree
        )
        if request.ByteSize() > MAX_MESSAGE_BYTES:
            raise InvalidArgumentError(
                f"the tree document has {len(tree)} bytes; a bank is created over the network with "
                f"at most {MAX_MESSAGE_BYTES}: keep fewer terms, or create it at its location",
                reason=Reason.MESSAGE_TOO_LARGE,
                metadata={"max_bytes": str(MAX_MESSAGE_BYTES)},
            )
        call = self._admin.CreateBank(request, timeout=timeout_s, metadata=self._channel.metadata)
        return spec_from_pb((await self._channel.unary("CreateBank", call)).spec)

    async def list_topics(
        self, parent: BlockRef | None, *, depth: int, timeout_s: float
    ) -> tuple[Topic, ...]:
        """Return topics by level and cluster."""
        request = admin_pb.ListTopicsRequest(
            bank=self._bank, parent=None if parent is None else ref_to_pb(parent), depth=depth
        )
        call = self._admin.ListTopics(request, timeout=timeout_s, metadata=self._channel.metadata)
        answer = await self._channel.unary("ListTopics", call)
        return tuple(map(topic_from_pb, answer.topics))

    async def describe(
        self, refs: Sequence[BlockRef], *, timeout_s: float
    ) -> tuple[BlockDescription, ...]:
        """Return blocks in full, in the order of the request."""
        request = admin_pb.DescribeBlocksRequest(bank=self._bank, refs=map(ref_to_pb, refs))
        call = self._admin.DescribeBlocks(
            request, timeout=timeout_s, metadata=self._channel.metadata
        )
        answer = await self._channel.unary("DescribeBlocks", call)
        return tuple(map(description_from_pb, answer.blocks))

    async def apply(
        self, steps: Sequence[Step], *, request_id: str, dry_run: bool, timeout_s: float
    ) -> Applied:
        """Apply steps as one transaction."""
        requests = transaction_requests(
            steps, bank=self._bank, request_id=request_id, dry_run=dry_run
        )
        call = self._admin.ApplyTransaction(
            requests, timeout=timeout_s, metadata=self._channel.metadata
        )
        answer = await self._channel.upload("ApplyTransaction", call)
        return Applied(report=report_from_pb(answer.report), receipt=answer.receipt)

    async def export(
        self,
        topic: BlockRef,
        target: BinaryIO,
        *,
        weights_only: bool,
        since: str | int | None = None,
        timeout_s: float,
    ) -> PackInfo:
        """Write a topic's pack to `target`; on an error it holds a part of it."""
        request = self._export_request(topic, weights_only, since)
        call = self._admin.ExportTopic(request, timeout=timeout_s, metadata=self._channel.metadata)
        return await write_pack(
            self._channel.stream("ExportTopic", call), target, where=self._channel.endpoint
        )

    async def store_pack(
        self,
        topic: BlockRef,
        name: str,
        *,
        weights_only: bool,
        since: str | int | None,
        timeout_s: float,
    ) -> PackInfo:
        """Keep a topic's pack in the bank's own store."""
        request = self._export_request(topic, weights_only, since)
        request.store_as = name
        call = self._admin.ExportTopic(request, timeout=timeout_s, metadata=self._channel.metadata)
        return await read_pack_head(
            self._channel.stream("ExportTopic", call), where=self._channel.endpoint
        )

    def _export_request(
        self, topic: BlockRef, weights_only: bool, since: str | int | None
    ) -> admin_pb.ExportTopicRequest:
        request = admin_pb.ExportTopicRequest(
            bank=self._bank, topic=ref_to_pb(topic), weights_only=weights_only
        )
        if isinstance(since, str):
            request.since_snapshot = since
        elif since is not None:
            request.since_revision_plus_one = since + 1
        return request

    async def list_packs(self, *, timeout_s: float) -> tuple[StoredPack, ...]:
        """Return the packs in the bank's own store, by name."""
        request = admin_pb.ListPacksRequest(bank=self._bank)
        call = self._admin.ListPacks(request, timeout=timeout_s, metadata=self._channel.metadata)
        answer = await self._channel.unary("ListPacks", call)
        return tuple(map(stored_pack_from_pb, answer.packs))

    async def delete_pack(self, name: str, *, request_id: str, timeout_s: float) -> StoredPack:
        """Destroy a pack in the bank's own store, and return it."""
        request = admin_pb.DeletePackRequest(bank=self._bank, name=name, request_id=request_id)
        call = self._admin.DeletePack(request, timeout=timeout_s, metadata=self._channel.metadata)
        return stored_pack_from_pb((await self._channel.unary("DeletePack", call)).pack)

    async def import_pack(
        self,
        pack: BinaryIO | str,
        *,
        topic: BlockRef | None = None,
        force: bool = False,
        request_id: str,
        dry_run: bool,
        timeout_s: float,
    ) -> ImportAnswer:
        """Install a pack: from its present position (seekable), or the one that is stored by a name."""
        failures: list[OSError] = []
        head = admin_pb.ImportTopicRequest(
            bank=self._bank,
            request_id=request_id,
            dry_run=dry_run,
            topic=None if topic is None else ref_to_pb(topic),
            force=force,
            stored=pack if isinstance(pack, str) else "",
        )
        requests = import_requests(head, None if isinstance(pack, str) else pack, failures=failures)
        call = self._admin.ImportTopic(requests, timeout=timeout_s, metadata=self._channel.metadata)
        try:
            answer = await self._channel.upload("ImportTopic", call)
        except BaseException:
            if failures:
                raise failures[0] from None
            raise
        return ImportAnswer(report=report_from_pb(answer.report), topic=ref_from_pb(answer.topic))

    async def create_snapshot(self, name: str, *, request_id: str, timeout_s: float) -> Snapshot:
        """Pin the present state."""
        request = admin_pb.CreateSnapshotRequest(
            bank=self._bank, request_id=request_id, snapshot=name
        )
        call = self._admin.CreateSnapshot(
            request, timeout=timeout_s, metadata=self._channel.metadata
        )
        return snapshot_from_pb((await self._channel.unary("CreateSnapshot", call)).snapshot)

    async def list_snapshots(self, *, timeout_s: float) -> tuple[Snapshot, ...]:
        """Return the snapshots, oldest first."""
        request = admin_pb.ListSnapshotsRequest(bank=self._bank)
        call = self._admin.ListSnapshots(
            request, timeout=timeout_s, metadata=self._channel.metadata
        )
        answer = await self._channel.unary("ListSnapshots", call)
        return tuple(map(snapshot_from_pb, answer.snapshots))

    async def delete_snapshot(
        self, name: str, *, request_id: str, timeout_s: float
    ) -> tuple[Snapshot, int]:
        """Give a snapshot up; return it, and the revision after it."""
        request = admin_pb.DeleteSnapshotRequest(
            bank=self._bank, request_id=request_id, snapshot=name
        )
        call = self._admin.DeleteSnapshot(
            request, timeout=timeout_s, metadata=self._channel.metadata
        )
        answer = await self._channel.unary("DeleteSnapshot", call)
        return snapshot_from_pb(answer.snapshot), answer.revision

    async def rollback(
        self,
        target: str | int,
        topic: BlockRef | None,
        *,
        only_block: bool,
        request_id: str,
        dry_run: bool,
        timeout_s: float,
    ) -> TransactionReport:
        """Bring the bank, a topic or a block back to a snapshot or to the end of a revision."""
        request = admin_pb.RollbackRequest(
            bank=self._bank,
            request_id=request_id,
            topic=None if topic is None else ref_to_pb(topic),
            only_block=only_block,
            dry_run=dry_run,
        )
        if isinstance(target, str):
            request.snapshot = target
        else:
            request.revision_plus_one = target + 1
        call = self._admin.Rollback(request, timeout=timeout_s, metadata=self._channel.metadata)
        return report_from_pb((await self._channel.unary("Rollback", call)).report)

    async def collect_garbage(
        self, *, keep_revisions: int | None, dry_run: bool, request_id: str, timeout_s: float
    ) -> GarbageReport:
        """Remove what nothing retained needs."""
        request = admin_pb.CollectGarbageRequest(
            bank=self._bank,
            request_id=request_id,
            dry_run=dry_run,
            keep_revisions=keep_revisions or 0,
        )
        call = self._admin.CollectGarbage(
            request, timeout=timeout_s, metadata=self._channel.metadata
        )
        return garbage_from_pb(await self._channel.unary("CollectGarbage", call))

    async def get_stats(self, *, timeout_s: float) -> BankStats:
        """Return counters and sizes."""
        request = admin_pb.GetStatsRequest(bank=self._bank)
        call = self._admin.GetStats(request, timeout=timeout_s, metadata=self._channel.metadata)
        return stats_from_pb(await self._channel.unary("GetStats", call))

    async def get_receipt(self, revision: int, *, timeout_s: float) -> bytes:
        """Return the signed receipt of what a revision deleted."""
        request = admin_pb.GetReceiptRequest(bank=self._bank, revision=revision)
        call = self._admin.GetReceipt(request, timeout=timeout_s, metadata=self._channel.metadata)
        return (await self._channel.unary("GetReceipt", call)).receipt

    async def list_audit_records(
        self, *, limit: int, retained_only: bool, timeout_s: float
    ) -> tuple[AuditRecord, ...]:
        """Return who did what, newest first; on request, only what can be rolled back to."""
        request = admin_pb.ListAuditRecordsRequest(
            bank=self._bank, limit=limit, retained_only=retained_only
        )
        call = self._admin.ListAuditRecords(
            request, timeout=timeout_s, metadata=self._channel.metadata
        )
        answer = await self._channel.unary("ListAuditRecords", call)
        return tuple(map(audit_from_pb, answer.records))
