"""Mappings of operations on what a bank knows."""

from __future__ import annotations

import json

from membank.v1 import admin_service_pb2 as admin_pb
from membank.wire.convert.data_path import (
    ref_from_pb,
    ref_to_pb,
    state_from_pb,
    state_to_pb,
)
from membank.wire.records import (
    AuditRecord,
    BankStats,
    BlockChange,
    BlockDescription,
    CentroidChange,
    Garbage,
    GarbageKind,
    GarbageReport,
    ShardStats,
    Snapshot,
    StoredPack,
    Topic,
    TransactionReport,
    TreeChange,
)


def report_to_pb(report: TransactionReport) -> admin_pb.TransactionReport:
    """Encode what a transaction did."""
    return admin_pb.TransactionReport(
        revision=report.revision,
        changes=[
            admin_pb.BlockChange(
                ref=ref_to_pb(change.ref),
                version_before=change.version_before,
                version_after=change.version_after,
                state_before=state_to_pb(change.state_before),
                state_after=state_to_pb(change.state_after),
                num_bytes=change.num_bytes,
            )
            for change in report.changes
        ],
        dry_run=report.dry_run,
        num_slots_destroyed=report.num_slots_destroyed,
        tree_changes=[
            admin_pb.TreeChange(
                topic=ref_to_pb(change.topic),
                changes_label=change.changes_label,
                changes_num_documents=change.changes_num_documents,
                # The numbers are the same on purpose.
                centroid_change=admin_pb.CentroidChange.ValueType(change.centroid_change),
            )
            for change in report.tree_changes
        ],
        packs=report.packs,
    )


def report_from_pb(message: admin_pb.TransactionReport) -> TransactionReport:
    """Decode what a transaction did."""
    return TransactionReport(
        revision=message.revision,
        changes=tuple(
            BlockChange(
                ref=ref_from_pb(change.ref),
                version_before=change.version_before,
                version_after=change.version_after,
                state_before=state_from_pb(change.state_before),
                state_after=state_from_pb(change.state_after),
                num_bytes=change.num_bytes,
            )
            for change in message.changes
        ),
        dry_run=message.dry_run,
        num_slots_destroyed=message.num_slots_destroyed,
        tree_changes=tuple(
            TreeChange(
                topic=ref_from_pb(change.topic),
                changes_label=change.changes_label,
                changes_num_documents=change.changes_num_documents,
                centroid_change=CentroidChange(change.centroid_change),
            )
            for change in message.tree_changes
        ),
        packs=tuple(message.packs),
    )


def topic_to_pb(topic: Topic) -> admin_pb.Topic:
    """Encode a topic."""
    return admin_pb.Topic(
        ref=ref_to_pb(topic.ref),
        label=topic.label,
        state=state_to_pb(topic.state),
        version=topic.version,
        step=topic.step,
        num_bytes=topic.num_bytes,
        num_documents=topic.num_documents,
        partition=topic.partition,
    )


def topic_from_pb(message: admin_pb.Topic) -> Topic:
    """Decode a topic."""
    return Topic(
        ref=ref_from_pb(message.ref),
        label=message.label,
        state=state_from_pb(message.state),
        version=message.version,
        step=message.step,
        num_bytes=message.num_bytes,
        num_documents=message.num_documents,
        partition=message.partition,
    )


def description_to_pb(block: BlockDescription) -> admin_pb.BlockDescription:
    """Encode a block's description."""
    return admin_pb.BlockDescription(
        topic=topic_to_pb(block.topic),
        crc32c=block.crc32c,
        shape=block.shape,
        optimizer_bytes=block.optimizer_bytes,
        shard_id=block.shard_id,
    )


def description_from_pb(message: admin_pb.BlockDescription) -> BlockDescription:
    """Decode a block's description."""
    return BlockDescription(
        topic=topic_from_pb(message.topic),
        crc32c=message.crc32c,
        shape=tuple(message.shape),
        optimizer_bytes=message.optimizer_bytes,
        shard_id=message.shard_id,
    )


def snapshot_to_pb(snapshot: Snapshot) -> admin_pb.Snapshot:
    """Encode a snapshot."""
    return admin_pb.Snapshot(
        name=snapshot.name, revision=snapshot.revision, create_time_s=snapshot.create_time_s
    )


def snapshot_from_pb(message: admin_pb.Snapshot) -> Snapshot:
    """Decode a snapshot."""
    return Snapshot(
        name=message.name, revision=message.revision, create_time_s=message.create_time_s
    )


def stored_pack_to_pb(pack: StoredPack) -> admin_pb.StoredPack:
    """Encode a pack of the bank's own store."""
    return admin_pb.StoredPack(
        name=pack.name,
        topic=ref_to_pb(pack.topic),
        revision=pack.revision,
        num_bytes=pack.num_bytes,
        create_time_s=pack.create_time_s,
    )


def stored_pack_from_pb(message: admin_pb.StoredPack) -> StoredPack:
    """Decode a pack of the bank's own store."""
    return StoredPack(
        name=message.name,
        topic=ref_from_pb(message.topic),
        revision=message.revision,
        num_bytes=message.num_bytes,
        create_time_s=message.create_time_s,
    )


def garbage_to_pb(report: GarbageReport) -> admin_pb.CollectGarbageResponse:
    """Encode what a collection removed."""
    return admin_pb.CollectGarbageResponse(
        garbage=[
            admin_pb.Garbage(
                # The numbers are the same on purpose.
                kind=admin_pb.GarbageKind.ValueType(garbage.kind),
                num_objects=garbage.num_objects,
                num_bytes=garbage.num_bytes,
                keys=garbage.keys,
            )
            for garbage in report.garbage
        ],
        history_from=report.history_from,
        dry_run=report.dry_run,
    )


def garbage_from_pb(message: admin_pb.CollectGarbageResponse) -> GarbageReport:
    """Decode what a collection removed."""
    return GarbageReport(
        garbage=tuple(
            Garbage(
                kind=_garbage_kind(garbage.kind),
                num_objects=garbage.num_objects,
                num_bytes=garbage.num_bytes,
                keys=tuple(garbage.keys),
            )
            for garbage in message.garbage
        ),
        history_from=message.history_from,
        dry_run=message.dry_run,
    )


def _garbage_kind(value: int) -> GarbageKind:
    return GarbageKind(value) if value in set(GarbageKind) else GarbageKind.UNKNOWN


_SHARD_COUNTERS = (
    "num_blocks_fetched",
    "num_bytes_fetched",
    "num_updates_applied",
    "num_updates_refused",
    "num_bytes_pushed",
    "resident_bytes",
    "journal_bytes",
    "num_restarts",
    "unshipped_s",
)


def stats_to_pb(stats: BankStats) -> admin_pb.GetStatsResponse:
    """Encode statistics."""
    shards = [
        admin_pb.ShardStats(
            shard_id=shard.shard_id,
            endpoint=shard.endpoint,
            pid=shard.pid,
            partitions=shard.partitions,
            **{name: getattr(shard, name) for name in _SHARD_COUNTERS},
        )
        for shard in stats.shards
    ]
    return admin_pb.GetStatsResponse(
        shards=shards,
        revision=stats.revision,
        num_blocks=stats.num_blocks,
        num_blocks_written=stats.num_blocks_written,
    )


def stats_from_pb(message: admin_pb.GetStatsResponse) -> BankStats:
    """Decode statistics."""
    shards = tuple(
        ShardStats(
            shard_id=shard.shard_id,
            endpoint=shard.endpoint,
            pid=shard.pid,
            partitions=tuple(shard.partitions),
            **{name: getattr(shard, name) for name in _SHARD_COUNTERS},
        )
        for shard in message.shards
    )
    return BankStats(
        shards=shards,
        revision=message.revision,
        num_blocks=message.num_blocks,
        num_blocks_written=message.num_blocks_written,
    )


def audit_to_pb(record: AuditRecord) -> admin_pb.AuditRecord:
    """Encode an audit record."""
    return admin_pb.AuditRecord(
        revision=record.revision,
        time_s=record.time_s,
        principal=record.principal,
        operation=record.operation,
        request_id=record.request_id,
        detail_json=json.dumps(record.detail, sort_keys=True),
    )


def audit_from_pb(message: admin_pb.AuditRecord) -> AuditRecord:
    """Decode an audit record."""
    return AuditRecord(
        revision=message.revision,
        time_s=message.time_s,
        principal=message.principal,
        operation=message.operation,
        request_id=message.request_id,
        detail=json.loads(message.detail_json),
    )
