"""A real gRPC server with hand-written servicers around `FakeBank`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NoReturn

import grpc
import numpy as np

from fake_bank import FakeBank
from fake_shard import FakeShard
from faults import Fault, FaultScript
from membank.bank_service.rpc.auth import LOCAL_PRINCIPAL
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.direct import DataListener
from membank.bank_service.rpc.same_host import SameHostDoor
from membank.bank_service.rpc.server import ServerConfig
from membank.v1 import admin_service_pb2 as admin_pb
from membank.v1 import block_service_pb2 as block_pb
from membank.v1.admin_service_pb2_grpc import (
    AdminServiceServicer,
    add_AdminServiceServicer_to_server,
)
from membank.v1.block_service_pb2_grpc import (
    BlockServiceServicer,
    add_BlockServiceServicer_to_server,
)
from membank.wire import convert
from membank.wire.alternative import ALTERNATIVE_KEY
from membank.wire.codec import push_codec
from membank.wire.crc import crc32c
from membank.wire.errors import (
    InternalError,
    MembankError,
    NotFoundError,
    Reason,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    to_status,
)
from membank.wire.framing import (
    MAX_MESSAGE_BYTES,
    WATCH_ON_KEY,
    Payload,
    PayloadAssembler,
    iter_chunks,
)
from membank.wire.records import Block, Gradient, Update
from membank.wire.spec import Array, BlockRef

REFUSALS: dict[Fault, Callable[[], MembankError]] = {
    Fault.UNAVAILABLE: lambda: UnavailableError("away"),
    Fault.NOT_OWNER: lambda: UnavailableError("moved", reason=Reason.NOT_OWNER),
    Fault.OVERLOADED: lambda: ResourceExhaustedError("full", metadata={"retry_after_ms": "5"}),
    Fault.INTERNAL: lambda: InternalError("defect"),
}
"""Faults that come before anything is done."""


def _wait_for_deadline(context: grpc.ServicerContext) -> NoReturn:
    import threading

    ended = threading.Event()
    if context.add_callback(ended.set):
        ended.wait(timeout=30)
    raise UnavailableError("nobody listens any more")


def _rpc(method: Callable[..., Any]) -> Callable[..., Any]:
    """Encode errors, check the caller and inject the planned fault around a unary answer."""

    @functools.wraps(method)
    def call(self: _Servicer, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            fault = self.admit(method.__name__, context)
            answer = method(self, request, context)
            if fault is Fault.DROP_RESPONSE:
                raise UnavailableError("the answer was lost")
        except MembankError as err:
            context.abort_with_status(to_status(err))
        return answer

    return call


def _stream_rpc(method: Callable[..., Any]) -> Callable[..., Any]:
    """Do what `_rpc` does around a streamed answer."""

    @functools.wraps(method)
    def call(self: _Servicer, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            fault = self.admit(method.__name__, context)
            yield from _spoilt(method(self, request, context), fault)
        except MembankError as err:
            context.abort_with_status(to_status(err))

    return call


def _spoilt(messages: Iterator[Any], fault: Fault | None) -> Iterator[Any]:
    for message in messages:
        if fault in (Fault.CUT, Fault.SHORT, Fault.DROP_RESPONSE) and message.data:
            message.data = message.data[: len(message.data) // 2]
            yield message
            if fault is Fault.SHORT:
                return
            raise UnavailableError("the connection broke")
        if fault is Fault.WRONG_CRC and message.data:
            message.data = bytes([message.data[0] ^ 1]) + message.data[1:]
            fault = None
        yield message


class _Servicer:
    def __init__(self, bank: FakeBank, script: FaultScript, token: str | None) -> None:
        self._bank = bank
        self._script = script
        self._token = token

    def admit(self, method: str, context: grpc.ServicerContext) -> Fault | None:
        metadata = {key: str(value) for key, value in context.invocation_metadata()}
        self._script.metadata.append(metadata)
        if self._token is not None and metadata.get("authorization") != f"Bearer {self._token}":
            raise UnauthenticatedError("who are you?")
        fault = self._script.take(method)
        if fault in REFUSALS:
            raise REFUSALS[fault]()
        if fault is Fault.SLOW:
            _wait_for_deadline(context)
        return fault


class FakeBlockServicer(_Servicer, BlockServiceServicer):
    """The data path of one shard, or of the gateway where `shard` is None."""

    def __init__(
        self,
        bank: FakeBank,
        shard: FakeShard | None,
        script: FaultScript,
        token: str | None,
        door: SameHostDoor | None = None,
        listeners: Mapping[str, DataListener] | None = None,
    ) -> None:
        super().__init__(bank, script, token)
        self._shard_or_none = shard
        self._door = door
        self._listeners = listeners or {}

    @property
    def _shard(self) -> FakeShard:
        if self._shard_or_none is None:
            raise UnavailableError("ask a shard", reason=Reason.NOT_OWNER)
        return self._shard_or_none

    @_rpc
    def GetBank(
        self, request: block_pb.GetBankRequest, context: grpc.ServicerContext
    ) -> block_pb.GetBankResponse:
        if request.bank not in ("", self._bank.spec.name):
            raise NotFoundError(f"no bank {request.bank}", reason=Reason.UNKNOWN_BANK)
        return convert.info_to_pb(self._bank.info())

    @_rpc
    def GetSameHostDoor(
        self, request: block_pb.GetSameHostDoorRequest, context: grpc.ServicerContext
    ) -> block_pb.GetSameHostDoorResponse:
        if self._door is None:
            return block_pb.GetSameHostDoorResponse()
        return self._door.show(LOCAL_PRINCIPAL)

    @_stream_rpc
    def GetTree(
        self, request: block_pb.GetTreeRequest, context: grpc.ServicerContext
    ) -> Iterator[block_pb.GetTreeResponse]:
        document = self._bank.tree()
        yield block_pb.GetTreeResponse(num_bytes=len(document), crc32c=crc32c(document))
        for chunk in iter_chunks([document], chunk_bytes=100):
            yield block_pb.GetTreeResponse(data=chunk)

    @_stream_rpc
    def FetchBlocks(
        self, request: block_pb.FetchBlocksRequest, context: grpc.ServicerContext
    ) -> Iterator[block_pb.FetchBlocksResponse]:
        refs = convert.refs_from_pb(request.refs)
        self._script.refs.append(refs)
        held = [version - 1 if version else None for version in request.held_version_plus_one]
        fetched = self._shard.fetch(
            refs,
            held_versions=held or None,
            dtype=convert.dtype_from_pb(request.dtype),
            min_revision=request.min_revision,
            snapshot=request.snapshot,
        )
        listener = self._listeners.get(self._shard.shard_id)
        if listener is not None:
            context.send_initial_metadata(((ALTERNATIVE_KEY, listener.alternative_header),))
        # One header per message and odd chunks: what a client must cope with.
        revision = fetched.revision
        for number, blocks in enumerate(_rounds(fetched.blocks, request.layers_per_part)):
            for block in blocks:
                header = convert.header_to_pb(block.header)
                yield block_pb.FetchBlocksResponse(revision=revision, headers=[header])
                revision = 0
            weights = [block.weight for block in blocks if block.weight is not None]
            payload = self._script.spoil_part(number, b"".join(map(np.ndarray.tobytes, weights)))
            for chunk in iter_chunks([payload], chunk_bytes=1_000):
                yield block_pb.FetchBlocksResponse(data=chunk)

    @_rpc
    def PushUpdates(
        self, request: Iterator[block_pb.PushUpdatesRequest], context: grpc.ServicerContext
    ) -> block_pb.PushUpdatesResponse:
        head = next(request)
        self._script.request_ids.append(head.request_id)
        refs = [convert.ref_from_pb(header.ref) for header in head.headers]
        self._script.refs.append(tuple(refs))
        arrays = _receive(self._bank, head.headers, (message.data for message in request))
        gradients = tuple(
            Gradient(ref=ref, base_version=header.base_version, values=array)
            for ref, header, array in zip(refs, head.headers, arrays, strict=True)
        )
        answer = self._shard.push(
            Update(
                request_id=head.request_id,
                step=head.step,
                gradients=gradients,
                learning_rate_scale=head.learning_rate_scale,
            )
        )
        return block_pb.PushUpdatesResponse(
            results=[convert.result_to_pb(result) for result in answer.results],
            duplicate=answer.duplicate,
        )

    @_stream_rpc
    def WatchBlocks(
        self, request: block_pb.WatchBlocksRequest, context: grpc.ServicerContext
    ) -> Iterator[block_pb.WatchBlocksResponse]:
        subscription = self._shard.subscribe(
            convert.refs_from_pb(request.refs), admin_only=request.admin_only
        )
        context.add_callback(subscription.close)
        context.send_initial_metadata(((WATCH_ON_KEY, "1"),))
        while not subscription.is_closed:
            events, num_dropped = subscription.next_events(0.5)
            if events or num_dropped:
                yield block_pb.WatchBlocksResponse(
                    events=map(convert.event_to_pb, events), num_dropped=num_dropped
                )
        raise UnavailableError("the shard stops")


def _receive(bank: FakeBank, headers: Any, chunks: Iterator[bytes]) -> list[Array]:
    assembler = PayloadAssembler(max_bytes=1 << 30)
    for header in headers:
        assembler.expect(Payload(header.num_bytes, header.crc32c, str(header.ref)))
    for chunk in chunks:
        assembler.feed(chunk)
    return [
        push_codec(convert.dtype_from_pb(header.dtype) or "").decode(
            buffer, bank.spec.block_shape(header.ref.level)
        )
        for header, buffer in zip(headers, assembler.finish(), strict=True)
    ]


class FakeAdminServicer(_Servicer, AdminServiceServicer):
    """The gateway's operations."""

    @_rpc
    def CreateBank(
        self, request: admin_pb.CreateBankRequest, context: grpc.ServicerContext
    ) -> admin_pb.CreateBankResponse:
        spec = self._bank.create_bank(
            convert.spec_from_pb(request.spec), request.tree, request_id=request.request_id
        )
        return admin_pb.CreateBankResponse(spec=convert.spec_to_pb(spec))

    @_rpc
    def ListTopics(
        self, request: admin_pb.ListTopicsRequest, context: grpc.ServicerContext
    ) -> admin_pb.ListTopicsResponse:
        parent = _optional_ref(request, "parent")
        topics = self._bank.topics(parent, request.depth)
        return admin_pb.ListTopicsResponse(
            topics=map(convert.topic_to_pb, topics), revision=self._bank.revision
        )

    @_rpc
    def DescribeBlocks(
        self, request: admin_pb.DescribeBlocksRequest, context: grpc.ServicerContext
    ) -> admin_pb.DescribeBlocksResponse:
        blocks = self._bank.describe(convert.refs_from_pb(request.refs))
        return admin_pb.DescribeBlocksResponse(blocks=map(convert.description_to_pb, blocks))

    @_rpc
    def ApplyTransaction(
        self, request: Iterator[admin_pb.ApplyTransactionRequest], context: grpc.ServicerContext
    ) -> admin_pb.ApplyTransactionResponse:
        head = next(request)
        self._script.request_ids.append(head.request_id)
        swaps = [step.swap for step in head.steps if step.HasField("swap")]
        arrays = iter(_receive(self._bank, swaps, (message.data for message in request)))
        steps = [
            convert.step_from_pb(step, next(arrays) if step.HasField("swap") else None)
            for step in head.steps
        ]
        applied = self._bank.apply(steps, request_id=head.request_id, dry_run=head.dry_run)
        return admin_pb.ApplyTransactionResponse(
            report=convert.report_to_pb(applied.report), receipt=applied.receipt
        )

    @_stream_rpc
    def ExportTopic(
        self, request: admin_pb.ExportTopicRequest, context: grpc.ServicerContext
    ) -> Iterator[admin_pb.ExportTopicResponse]:
        topic = convert.ref_from_pb(request.topic)
        pack = (
            self._bank.store_pack(topic, request.store_as)
            if request.store_as
            else self._bank.export(topic)
        )
        yield admin_pb.ExportTopicResponse(
            num_bytes=len(pack), crc32c=crc32c(pack), revision=self._bank.revision
        )
        for chunk in iter_chunks([] if request.store_as else [pack], chunk_bytes=500):
            yield admin_pb.ExportTopicResponse(data=chunk)

    @_rpc
    def ListPacks(
        self, request: admin_pb.ListPacksRequest, context: grpc.ServicerContext
    ) -> admin_pb.ListPacksResponse:
        packs = map(convert.stored_pack_to_pb, self._bank.list_packs())
        return admin_pb.ListPacksResponse(packs=packs)

    @_rpc
    def DeletePack(
        self, request: admin_pb.DeletePackRequest, context: grpc.ServicerContext
    ) -> admin_pb.DeletePackResponse:
        pack = self._bank.delete_pack(request.name, request_id=request.request_id)
        return admin_pb.DeletePackResponse(pack=convert.stored_pack_to_pb(pack))

    @_rpc
    def ImportTopic(
        self, request: Iterator[admin_pb.ImportTopicRequest], context: grpc.ServicerContext
    ) -> admin_pb.ImportTopicResponse:
        head = next(request)
        self._script.request_ids.append(head.request_id)
        assembler = PayloadAssembler(max_bytes=1 << 30)
        assembler.expect(Payload(head.num_bytes, head.crc32c, "pack"))
        for message in request:
            assembler.feed(message.data)
        report, topic = self._bank.import_pack(
            head.stored or np.concatenate(assembler.finish()).tobytes(),
            topic=convert.ref_from_pb(head.topic) if head.HasField("topic") else None,
            request_id=head.request_id,
            dry_run=head.dry_run,
        )
        return admin_pb.ImportTopicResponse(
            report=convert.report_to_pb(report), topic=convert.ref_to_pb(topic)
        )

    @_rpc
    def CreateSnapshot(
        self, request: admin_pb.CreateSnapshotRequest, context: grpc.ServicerContext
    ) -> admin_pb.CreateSnapshotResponse:
        snapshot = self._bank.create_snapshot(request.snapshot)
        return admin_pb.CreateSnapshotResponse(snapshot=convert.snapshot_to_pb(snapshot))

    @_rpc
    def ListSnapshots(
        self, request: admin_pb.ListSnapshotsRequest, context: grpc.ServicerContext
    ) -> admin_pb.ListSnapshotsResponse:
        snapshots = self._bank.list_snapshots()
        return admin_pb.ListSnapshotsResponse(snapshots=map(convert.snapshot_to_pb, snapshots))

    @_rpc
    def DeleteSnapshot(
        self, request: admin_pb.DeleteSnapshotRequest, context: grpc.ServicerContext
    ) -> admin_pb.DeleteSnapshotResponse:
        self._script.request_ids.append(request.request_id)
        snapshot, revision = self._bank.delete_snapshot(
            request.snapshot, request_id=request.request_id
        )
        return admin_pb.DeleteSnapshotResponse(
            snapshot=convert.snapshot_to_pb(snapshot), revision=revision
        )

    @_rpc
    def Rollback(
        self, request: admin_pb.RollbackRequest, context: grpc.ServicerContext
    ) -> admin_pb.RollbackResponse:
        report = self._bank.rollback(
            request.snapshot or request.revision_plus_one - 1,
            _optional_ref(request, "topic"),
            only_block=request.only_block,
            request_id=request.request_id,
            dry_run=request.dry_run,
        )
        return admin_pb.RollbackResponse(report=convert.report_to_pb(report))

    @_rpc
    def CollectGarbage(
        self, request: admin_pb.CollectGarbageRequest, context: grpc.ServicerContext
    ) -> admin_pb.CollectGarbageResponse:
        report = self._bank.collect_garbage(
            keep_revisions=request.keep_revisions or None, dry_run=request.dry_run
        )
        return convert.garbage_to_pb(report)

    @_rpc
    def GetStats(
        self, request: admin_pb.GetStatsRequest, context: grpc.ServicerContext
    ) -> admin_pb.GetStatsResponse:
        return convert.stats_to_pb(self._bank.stats())

    @_rpc
    def ListAuditRecords(
        self, request: admin_pb.ListAuditRecordsRequest, context: grpc.ServicerContext
    ) -> admin_pb.ListAuditRecordsResponse:
        records = self._bank.audit_records(request.limit, retained_only=request.retained_only)
        return admin_pb.ListAuditRecordsResponse(records=map(convert.audit_to_pb, records))

    @_rpc
    def GetReceipt(
        self, request: admin_pb.GetReceiptRequest, context: grpc.ServicerContext
    ) -> admin_pb.GetReceiptResponse:
        return admin_pb.GetReceiptResponse(receipt=self._bank.receipt(request.revision))


def _rounds(blocks: Sequence[Block], layers_per_part: int) -> Iterator[list[Block]]:
    """Yield what is sent together: all, or the first layers of each, then the next of each."""
    if not layers_per_part:
        yield list(blocks)
        return
    yield [_layers(block, 0, layers_per_part) for block in blocks]
    left = [block for block in blocks if block.weight is not None]
    for first in range(layers_per_part, left[0].header.shape[0] if left else 0, layers_per_part):
        yield [_layers(block, first, layers_per_part) for block in left]


def _layers(block: Block, first: int, count: int) -> Block:
    if block.weight is None:
        return block
    layers = block.weight[first : first + count]
    header = replace(
        block.header,
        num_bytes=layers.nbytes,
        crc32c=crc32c(layers),
        first_layer=first,
        num_layers=len(layers),
    )
    return Block(header=header, weight=layers)


def _optional_ref(request: Any, name: str) -> BlockRef | None:
    return convert.ref_from_pb(getattr(request, name)) if request.HasField(name) else None


class FakeService:
    """A gateway and shards, each a gRPC server on a loopback port of its own.

    Parameters
    ----------
    bank
        The bank.
    token
        Bearer token that every call must carry; None = none.
    credentials
        TLS of all servers; None = none.
    same_host
        True lets callers in to shared memory too.
    data_port
        True gives shards a port for data too.
    """

    def __init__(
        self,
        bank: FakeBank,
        *,
        token: str | None = None,
        credentials: grpc.ServerCredentials | None = None,
        same_host: bool = False,
        data_port: bool = False,
    ) -> None:
        self.bank = bank
        self.doors: dict[str, SameHostDoor] = {}
        self.data: dict[str, DataListener] = {}
        self._same_host = same_host
        self._data_port = data_port
        self.script = FaultScript()
        self.scripts = {shard.shard_id: FaultScript() for shard in bank.shards}
        self._token = token
        self._credentials = credentials
        self._executor = ThreadPoolExecutor(max_workers=24)
        self._servers: dict[str, grpc.Server] = {}
        self.endpoint = self._start("gateway", None, self.script)
        for shard in bank.shards:
            self.start_shard(shard)

    def start_shard(self, shard: FakeShard) -> str:
        """Start a shard's server at a new port and say so in the placement."""
        if self._same_host:
            # The fake has what a door asks of a shard.
            self.doors[shard.shard_id] = SameHostDoor(shard, ByteBudget(1 << 30))  # type: ignore[arg-type]
        if self._data_port:
            listener = DataListener(ServerConfig(drain_s=1.0), shard, ByteBudget(1 << 30))  # type: ignore[arg-type]
            self.data[shard.shard_id] = listener
        endpoint = self._start(shard.shard_id, shard, self.scripts[shard.shard_id])
        self.bank.move(shard, endpoint)
        return endpoint

    def tell_of(self, shard_id: str, listener: DataListener) -> None:
        """Tell callers of a shard of another port for data; closed by whoever made it."""
        self.data[shard_id] = listener

    def stop_server(self, name: str) -> None:
        """Stop the server of a shard, or of the "gateway", at once."""
        if name in self.doors:
            self.doors.pop(name).close()
        if name in self.data:
            self.data.pop(name).stop(within_s=0.0)
        self._servers.pop(name).stop(grace=None).wait()

    def close(self) -> None:
        """Stop everything."""
        for door in self.doors.values():
            door.close()
        for listener in self.data.values():
            listener.stop()
        for shard in self.bank.shards:
            for subscription in shard.subscriptions:
                subscription.close()
        for stopping in [server.stop(grace=None) for server in self._servers.values()]:
            stopping.wait()
        self._executor.shutdown()

    def _start(self, name: str, shard: FakeShard | None, script: FaultScript) -> str:
        server = grpc.server(
            self._executor,
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
            ],
        )
        add_BlockServiceServicer_to_server(
            FakeBlockServicer(
                self.bank,
                shard,
                script,
                self._token,
                self.doors.get(name),
                self.data,
            ),
            server,
        )
        if shard is None:
            add_AdminServiceServicer_to_server(
                FakeAdminServicer(self.bank, script, self._token), server
            )
        address = "127.0.0.1:0"
        if self._credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, self._credentials)
        server.start()
        self._servers[name] = server
        return f"127.0.0.1:{port}"
