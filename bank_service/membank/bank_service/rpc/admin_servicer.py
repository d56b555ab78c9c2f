"""Operations over gRPC: a thin skin around a `BankAdmin`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import grpc

from membank.bank_service.knowledge.contract import AdminRequest, BankAdmin, BankHost, ExportedPack
from membank.bank_service.knowledge.pack_operations import SPOOL_BYTES
from membank.bank_service.rpc.auth import current_principal
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.interceptor import check_alive
from membank.bank_service.rpc.requests import MAX_REFS, check_bank
from membank.v1 import admin_service_pb2 as pb
from membank.v1 import types_pb2 as types_pb
from membank.v1.admin_service_pb2_grpc import AdminServiceServicer
from membank.wire import convert
from membank.wire.crc import Buffer
from membank.wire.errors import InvalidArgumentError, Reason
from membank.wire.framing import Payload, PayloadAssembler
from membank.wire.spec import BankSpec, BlockRef, dtype_of

_DEFAULT_AUDIT_RECORDS = 100
_MAX_AUDIT_RECORDS = 10_000


class AdminServicer(AdminServiceServicer):
    """Serves the operations of one bank.

    Parameters
    ----------
    host
        Has the bank, or waits for it.
    budget
        Bound on payload bytes in flight, shared by all calls.
    """

    def __init__(self, host: BankHost, budget: ByteBudget) -> None:
        self._host = host
        self._budget = budget

    def CreateBank(
        self, request: pb.CreateBankRequest, context: grpc.ServicerContext
    ) -> pb.CreateBankResponse:
        # docstring inherited
        check_alive(context)
        if not request.HasField("spec"):
            raise InvalidArgumentError("a bank needs its spec")
        spec = self._host.create_bank(
            _request(request.request_id, context), convert.spec_from_pb(request.spec), request.tree
        )
        return pb.CreateBankResponse(spec=convert.spec_to_pb(spec))

    def ListTopics(
        self, request: pb.ListTopicsRequest, context: grpc.ServicerContext
    ) -> pb.ListTopicsResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        parent = convert.ref_from_pb(request.parent) if request.HasField("parent") else None
        topics, revision = admin.list_topics(parent, depth=request.depth)
        return pb.ListTopicsResponse(
            topics=[convert.topic_to_pb(topic) for topic in topics], revision=revision
        )

    def DescribeBlocks(
        self, request: pb.DescribeBlocksRequest, context: grpc.ServicerContext
    ) -> pb.DescribeBlocksResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        if len(request.refs) > MAX_REFS:
            raise InvalidArgumentError(f"{len(request.refs)} blocks; at most {MAX_REFS}")
        blocks = admin.describe_blocks(convert.refs_from_pb(request.refs))
        return pb.DescribeBlocksResponse(
            blocks=[convert.description_to_pb(block) for block in blocks]
        )

    def ApplyTransaction(
        self, request_iterator: Iterator[pb.ApplyTransactionRequest], context: grpc.ServicerContext
    ) -> pb.ApplyTransactionResponse:
        # docstring inherited
        head = next(request_iterator, None)
        if head is None or not head.steps:
            raise InvalidArgumentError("the transaction has no step in its first message")
        if len(head.steps) > MAX_REFS:
            raise InvalidArgumentError(
                f"{len(head.steps)} steps; at most {MAX_REFS} are applied together",
                reason=Reason.MESSAGE_TOO_LARGE,
            )
        admin = self._open(head.bank, context)
        spec = admin.spec
        swaps = [step.swap for step in head.steps if step.HasField("swap")]
        payloads = [_swap_payload(swap, spec) for swap in swaps]
        total = sum(payload.num_bytes for payload in payloads)
        with self._budget.reserve(total + _combined_bytes(head, spec), what="transaction"):
            assembler = PayloadAssembler(max_bytes=total)
            for payload in payloads:
                assembler.expect(payload)
            assembler.feed(head.data)
            for message in request_iterator:
                assembler.feed(message.data)
            weights = iter(
                buffer.view(spec.numpy_dtype).reshape(spec.block_shape(swap.ref.level))
                for swap, buffer in zip(swaps, assembler.finish(), strict=True)
            )
            steps = [
                convert.step_from_pb(step, next(weights) if step.HasField("swap") else None)
                for step in head.steps
            ]
            check_alive(context)
            applied = admin.apply(_request(head.request_id, context, head.dry_run), steps)
        return pb.ApplyTransactionResponse(
            report=convert.report_to_pb(applied.report), receipt=applied.receipt
        )

    def ExportTopic(
        self, request: pb.ExportTopicRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.ExportTopicResponse]:
        # docstring inherited
        admin = self._open(request.bank, context)
        topic = _topic(request.topic, admin.spec)
        since = _since(request)
        if request.store_as:
            with admin.store_pack(
                topic, request.store_as, weights_only=request.weights_only, since=since
            ) as pack:
                yield _pack_head(pack)
            return
        # What is larger waits in a file.
        with (
            self._budget.reserve(min(_size_of(admin.spec, topic), SPOOL_BYTES), what="export"),
            admin.export_topic(topic, weights_only=request.weights_only, since=since) as pack,
        ):
            message = _pack_head(pack)
            for chunk in pack.chunks():
                check_alive(context)
                message.data = chunk
                yield message
                message = pb.ExportTopicResponse()

    def ImportTopic(
        self, request_iterator: Iterator[pb.ImportTopicRequest], context: grpc.ServicerContext
    ) -> pb.ImportTopicResponse:
        # docstring inherited
        head = next(request_iterator, None)
        if head is None:
            raise InvalidArgumentError("the import is empty; its first message announces the pack")
        admin = self._open(head.bank, context)
        topic = _topic(head.topic, admin.spec) if head.HasField("topic") else None
        request = _request(head.request_id, context, head.dry_run)
        if head.stored:
            sizes = {pack.name: pack.num_bytes for pack in admin.list_packs()}
            with self._budget.reserve(sizes.get(head.stored, 0), what="import"):
                report, installed = admin.import_stored(
                    request, head.stored, topic=topic, force=head.force
                )
        else:
            with self._budget.reserve(head.num_bytes, what="import"):
                pack = _received(head, request_iterator)
                check_alive(context)
                report, installed = admin.import_topic(request, pack, topic=topic, force=head.force)
        return pb.ImportTopicResponse(
            report=convert.report_to_pb(report), topic=convert.ref_to_pb(installed)
        )

    def ListPacks(
        self, request: pb.ListPacksRequest, context: grpc.ServicerContext
    ) -> pb.ListPacksResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        return pb.ListPacksResponse(packs=map(convert.stored_pack_to_pb, admin.list_packs()))

    def DeletePack(
        self, request: pb.DeletePackRequest, context: grpc.ServicerContext
    ) -> pb.DeletePackResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        pack = admin.delete_pack(_request(request.request_id, context), request.name)
        return pb.DeletePackResponse(pack=convert.stored_pack_to_pb(pack))

    def CreateSnapshot(
        self, request: pb.CreateSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.CreateSnapshotResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        snapshot = admin.create_snapshot(_request(request.request_id, context), request.snapshot)
        return pb.CreateSnapshotResponse(snapshot=convert.snapshot_to_pb(snapshot))

    def ListSnapshots(
        self, request: pb.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> pb.ListSnapshotsResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        snapshots = admin.list_snapshots()
        return pb.ListSnapshotsResponse(
            snapshots=[convert.snapshot_to_pb(snapshot) for snapshot in snapshots]
        )

    def Rollback(
        self, request: pb.RollbackRequest, context: grpc.ServicerContext
    ) -> pb.RollbackResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        topic = None
        if request.HasField("topic"):
            topic = _topic(request.topic, admin.spec)
        report = admin.rollback(
            _request(request.request_id, context, request.dry_run),
            _target(request),
            topic,
            only_block=request.only_block,
        )
        return pb.RollbackResponse(report=convert.report_to_pb(report))

    def DeleteSnapshot(
        self, request: pb.DeleteSnapshotRequest, context: grpc.ServicerContext
    ) -> pb.DeleteSnapshotResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        snapshot, revision = admin.delete_snapshot(
            _request(request.request_id, context), request.snapshot
        )
        return pb.DeleteSnapshotResponse(
            snapshot=convert.snapshot_to_pb(snapshot), revision=revision
        )

    def CollectGarbage(
        self, request: pb.CollectGarbageRequest, context: grpc.ServicerContext
    ) -> pb.CollectGarbageResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        report = admin.collect_garbage(
            _request(request.request_id, context, request.dry_run),
            keep_revisions=request.keep_revisions or None,
        )
        return convert.garbage_to_pb(report)

    def GetStats(
        self, request: pb.GetStatsRequest, context: grpc.ServicerContext
    ) -> pb.GetStatsResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        return convert.stats_to_pb(admin.stats())

    def ListAuditRecords(
        self, request: pb.ListAuditRecordsRequest, context: grpc.ServicerContext
    ) -> pb.ListAuditRecordsResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        limit = min(request.limit or _DEFAULT_AUDIT_RECORDS, _MAX_AUDIT_RECORDS)
        records = admin.audit(limit, retained_only=request.retained_only)
        return pb.ListAuditRecordsResponse(
            records=[convert.audit_to_pb(record) for record in records]
        )

    def GetReceipt(
        self, request: pb.GetReceiptRequest, context: grpc.ServicerContext
    ) -> pb.GetReceiptResponse:
        # docstring inherited
        admin = self._open(request.bank, context)
        return pb.GetReceiptResponse(receipt=admin.receipt(request.revision))

    def _open(self, bank: str, context: grpc.ServicerContext) -> BankAdmin:
        check_alive(context)
        admin = self._host.operations()
        check_bank(bank, admin.spec)
        return admin


def _topic(message: types_pb.BlockRef, spec: BankSpec) -> BlockRef:
    topic = convert.ref_from_pb(message)
    spec.check_ref(topic)
    return topic


def _since(request: pb.ExportTopicRequest) -> str | int | None:
    if request.since_snapshot and request.since_revision_plus_one:
        raise InvalidArgumentError("a diff is against a snapshot or a revision; name one")
    if request.since_revision_plus_one:
        return request.since_revision_plus_one - 1
    return request.since_snapshot or None


def _size_of(spec: BankSpec, topic: BlockRef) -> int:
    return sum(
        spec.weight_bytes(ref.level) + spec.optimizer_bytes(ref.level)
        for ref in spec.subtree(topic)
    )


def _pack_head(pack: ExportedPack) -> pb.ExportTopicResponse:
    return pb.ExportTopicResponse(
        num_bytes=pack.num_bytes, crc32c=pack.crc32c, revision=pack.revision
    )


def _received(head: pb.ImportTopicRequest, rest: Iterator[pb.ImportTopicRequest]) -> Buffer:
    assembler = PayloadAssembler(max_bytes=head.num_bytes)
    assembler.expect(Payload(num_bytes=head.num_bytes, crc32c=head.crc32c, what="pack"))
    assembler.feed(head.data)
    for message in rest:
        assembler.feed(message.data)
    (pack,) = assembler.finish()
    return pack


def _target(request: pb.RollbackRequest) -> str | int:
    if bool(request.snapshot) == bool(request.revision_plus_one):
        raise InvalidArgumentError("a rollback goes to a snapshot or to a revision; name one")
    return request.snapshot or request.revision_plus_one - 1


def _request(request_id: str, context: grpc.ServicerContext, dry_run: bool = False) -> AdminRequest:
    if not request_id and not dry_run:
        raise InvalidArgumentError(
            "a change needs a request id (UUID), so that a retry is harmless"
        )
    return AdminRequest(
        request_id=request_id,
        principal=current_principal.get().name,
        dry_run=dry_run,
        check_wanted=partial(check_alive, context),
    )


def _combined_bytes(head: pb.ApplyTransactionRequest, spec: BankSpec) -> int:
    """Return the bytes of the blocks that the steps compute: as much is read of others for them."""
    refs = [convert.ref_from_pb(s.combine.ref) for s in head.steps if s.HasField("combine")]
    for ref in refs:
        spec.check_ref(ref)
    return sum(spec.weight_bytes(ref.level) for ref in refs)


def _swap_payload(header: pb.SwapStep, spec: BankSpec) -> Payload:
    ref = convert.ref_from_pb(header.ref)
    spec.check_ref(ref)
    dtype = convert.dtype_from_pb(header.dtype) or spec.dtype
    if dtype != spec.dtype:
        raise InvalidArgumentError(
            f"content of block {ref} is {dtype}; the bank keeps {spec.dtype}: convert it first",
            reason=Reason.BAD_DTYPE,
            metadata={"block": str(ref), "dtype": dtype},
        )
    expected = spec.block_params(ref.level) * dtype_of(dtype).itemsize
    if header.num_bytes != expected:
        raise InvalidArgumentError(
            f"content of block {ref} has {header.num_bytes} bytes; its shape "
            f"{spec.block_shape(ref.level)} takes {expected}",
            reason=Reason.BAD_SHAPE,
            metadata={"block": str(ref)},
        )
    return Payload(num_bytes=header.num_bytes, crc32c=header.crc32c, what=f"content of {ref}")
