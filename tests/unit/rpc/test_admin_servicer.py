"""Operations over a real gRPC server on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from membank.v1 import admin_service_pb2 as pb
from membank.v1 import types_pb2 as types_pb
from membank.wire import convert
from membank.wire.crc import crc32c
from membank.wire.errors import Reason
from membank.wire.spec import Array, BlockRef, BlockState
from membank.wire.steps import Combine, Delete, Place, Restore, Step, Withhold
from rpc_rig import RpcRig, error_of
from shard_rig import RIG_SPEC

TOPIC = BlockRef(1, 1)
TOPIC_PB = types_pb.BlockRef(level=1, cluster=1)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[RpcRig]:
    with RpcRig(tmp_path / "bank") as rig:
        yield rig


def swap_messages(
    weight: Array, *, expected: int | None = None, dtype: str = "float32"
) -> Iterator[pb.ApplyTransactionRequest]:
    swap = pb.SwapStep(
        ref=TOPIC_PB,
        expected_version_plus_one=0 if expected is None else expected + 1,
        dtype=convert.dtype_to_pb(dtype),
        num_bytes=weight.nbytes,
        crc32c=crc32c(weight),
    )
    yield pb.ApplyTransactionRequest(request_id="r1", steps=[pb.TransactionStep(swap=swap)])
    data = weight.tobytes()
    yield pb.ApplyTransactionRequest(data=data[:10])
    yield pb.ApplyTransactionRequest(data=data[10:])


def step_messages(
    *steps: Step, request_id: str = "", dry_run: bool = False
) -> Iterator[pb.ApplyTransactionRequest]:
    """Steps without content."""
    yield pb.ApplyTransactionRequest(
        request_id=request_id, steps=map(convert.step_to_pb, steps), dry_run=dry_run
    )


def full(value: float) -> Array:
    return np.full(RIG_SPEC.block_shape(1), value, np.float32)


def test_swap_installs_content_and_reports_it(rig: RpcRig) -> None:
    report = rig.admin.ApplyTransaction(swap_messages(full(2.0), expected=0)).report
    assert (report.revision, report.changes[0].version_after) == (1, 1)
    np.testing.assert_array_equal(rig.bank.weight(TOPIC), full(2.0))


@pytest.mark.parametrize(
    ("weight", "expected", "dtype", "reason"),
    [
        (full(1.0), 5, "float32", Reason.VERSION_MISMATCH),
        (full(1.0), None, "bfloat16", Reason.BAD_DTYPE),
        (np.zeros(3, np.float32), None, "float32", Reason.BAD_SHAPE),
        (full(np.nan), None, "float32", Reason.NOT_FINITE),
    ],
)
def test_wrong_swaps_change_nothing(
    rig: RpcRig, weight: Array, expected: int | None, dtype: str, reason: Reason
) -> None:
    before = rig.bank.state()
    with pytest.raises(grpc.RpcError) as caught:
        rig.admin.ApplyTransaction(swap_messages(weight, expected=expected, dtype=dtype))
    assert error_of(caught.value).reason is reason
    assert rig.bank.state() == before


def test_withhold_restore_and_delete_go_through(rig: RpcRig) -> None:
    withheld = rig.admin.ApplyTransaction(step_messages(Withhold(topic=TOPIC), request_id="a"))
    assert {int(change.state_after) for change in withheld.report.changes} == {BlockState.WITHHELD}
    rig.admin.ApplyTransaction(step_messages(Restore(topic=TOPIC), request_id="b"))
    dry = rig.admin.ApplyTransaction(step_messages(Delete(topic=TOPIC), dry_run=True))
    assert dry.report.dry_run
    assert len(dry.report.tree_changes) == 3
    rig.admin.ApplyTransaction(step_messages(Delete(topic=TOPIC), request_id="c"))
    topics = rig.admin.ListTopics(pb.ListTopicsRequest(parent=TOPIC_PB))
    assert {int(topic.state) for topic in topics.topics} == {BlockState.DELETED}
    assert {topic.label for topic in topics.topics} == {""}
    assert topics.revision == 3


def test_steps_of_all_kinds_are_one_transaction(rig: RpcRig) -> None:
    first, *rest = swap_messages(full(2.0))
    others: tuple[Step, ...] = (
        Combine(ref=BlockRef(1, 0), keep=0.5, other=BlockRef(1, 2), add=0.25),
        Delete(topic=BlockRef(1, 3)),
        Place(topic=BlockRef(1, 2), label="iron", num_documents=7),
    )
    own, other = (
        np.array(rig.bank.weight(ref), np.float32) for ref in (BlockRef(1, 0), BlockRef(1, 2))
    )
    first.steps.extend(map(convert.step_to_pb, others))
    report = rig.admin.ApplyTransaction(iter([first, *rest])).report
    assert report.revision == 1
    np.testing.assert_array_equal(rig.bank.weight(TOPIC), full(2.0))
    np.testing.assert_array_equal(rig.bank.weight(BlockRef(1, 0)), 0.5 * own + 0.25 * other)
    assert rig.bank.status(BlockRef(1, 3)).state is BlockState.DELETED
    (topic,) = rig.admin.ListTopics(
        pb.ListTopicsRequest(parent=convert.ref_to_pb(BlockRef(1, 2)), depth=0)
    ).topics[:1]
    assert (topic.label, topic.num_documents) == ("iron", 7)
    (record,) = rig.admin.ListAuditRecords(pb.ListAuditRecordsRequest(limit=1)).records
    assert record.operation == "transaction"
    assert "iron" not in record.detail_json


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((), Reason.BAD_ARGUMENT),
        ((pb.TransactionStep(),), Reason.BAD_ARGUMENT),
        (
            (pb.TransactionStep(place=pb.PlaceStep(topic=TOPIC_PB)),),
            Reason.BAD_ARGUMENT,
        ),
        (
            (pb.TransactionStep(place=pb.PlaceStep(topic=TOPIC_PB, label="x", centroid=[1.0])),),
            Reason.BAD_ARGUMENT,
        ),
        (
            (pb.TransactionStep(combine=pb.CombineStep(ref=TOPIC_PB, add=1.0)),),
            Reason.BAD_ARGUMENT,
        ),
        (
            (pb.TransactionStep(combine=pb.CombineStep(ref=TOPIC_PB, keep=float("nan"))),),
            Reason.NOT_FINITE,
        ),
        (
            (pb.TransactionStep(delete=pb.TopicStep(topic=types_pb.BlockRef(level=1, cluster=9))),),
            Reason.UNKNOWN_CLUSTER,
        ),
    ],
)
def test_what_no_step_can_be_is_a_typed_error(
    rig: RpcRig, steps: tuple[pb.TransactionStep, ...], reason: Reason
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        rig.admin.ApplyTransaction(iter([pb.ApplyTransactionRequest(request_id="r", steps=steps)]))
    assert error_of(caught.value).reason is reason
    assert rig.bank.log.last == 0


def test_blocks_that_are_computed_are_bounded_like_what_is_sent(tmp_path: Path) -> None:
    with RpcRig(tmp_path / "bank", budget_bytes=100) as rig:
        with pytest.raises(grpc.RpcError) as caught:
            rig.admin.ApplyTransaction(step_messages(Combine(ref=TOPIC, keep=0), request_id="r"))
        assert error_of(caught.value).reason is Reason.MESSAGE_TOO_LARGE


def test_a_topic_travels_out_and_in(rig: RpcRig) -> None:
    first, *rest = rig.admin.ExportTopic(pb.ExportTopicRequest(topic=TOPIC_PB))
    pack = first.data + b"".join(message.data for message in rest)
    assert (len(pack), crc32c(pack)) == (first.num_bytes, first.crc32c)
    rig.admin.ApplyTransaction(step_messages(Delete(topic=TOPIC), request_id="a"))
    head = pb.ImportTopicRequest(request_id="b", num_bytes=len(pack), crc32c=crc32c(pack))
    messages = [head, pb.ImportTopicRequest(data=pack[:99]), pb.ImportTopicRequest(data=pack[99:])]
    answer = rig.admin.ImportTopic(iter(messages))
    assert answer.topic == TOPIC_PB
    assert rig.bank.status(TOPIC).state is BlockState.ACTIVE
    with pytest.raises(grpc.RpcError) as caught:
        rig.admin.ImportTopic(iter([head, pb.ImportTopicRequest(data=pack[:-1] + b"!")]))
    assert error_of(caught.value).reason is Reason.CHECKSUM_MISMATCH


def test_exports_are_bounded_like_everything_that_is_held(tmp_path: Path) -> None:
    with RpcRig(tmp_path / "bank", budget_bytes=1500) as rig:
        with pytest.raises(grpc.RpcError) as caught:
            list(rig.admin.ExportTopic(pb.ExportTopicRequest(topic=TOPIC_PB)))
        assert error_of(caught.value).reason is Reason.MESSAGE_TOO_LARGE
        leaf = types_pb.BlockRef(level=2, cluster=2)
        assert list(rig.admin.ExportTopic(pb.ExportTopicRequest(topic=leaf)))
        assert rig.budget.used_bytes == 0


def test_snapshot_rollback_stats_and_audit(rig: RpcRig) -> None:
    snapshot = rig.admin.CreateSnapshot(pb.CreateSnapshotRequest(request_id="a", snapshot="s"))
    assert list(rig.admin.ListSnapshots(pb.ListSnapshotsRequest()).snapshots) == [snapshot.snapshot]
    rig.bank.push(TOPIC, "p1")
    rolled = rig.admin.Rollback(pb.RollbackRequest(request_id="b", snapshot="s", topic=TOPIC_PB))
    assert [change.version_after for change in rolled.report.changes] == [2]
    stats = rig.admin.GetStats(pb.GetStatsRequest())
    assert (stats.num_blocks, stats.revision) == (12, 2)
    records = rig.admin.ListAuditRecords(pb.ListAuditRecordsRequest(limit=2)).records
    assert [record.operation for record in records] == ["rollback", "snapshot"]
    assert records[0].principal == "local"
    assert json.loads(records[0].detail_json)["topic"] == "1/1"


def test_rollback_to_a_revision_and_the_ways_back(rig: RpcRig) -> None:
    rig.admin.ApplyTransaction(swap_messages(full(2.0)))
    rig.admin.ApplyTransaction(step_messages(Withhold(topic=TOPIC), request_id="w"))
    listed = rig.admin.ListAuditRecords(pb.ListAuditRecordsRequest(retained_only=True)).records
    assert [record.revision for record in listed] == [1, 0]
    back = pb.RollbackRequest(request_id="b", topic=TOPIC_PB, revision_plus_one=2, only_block=True)
    report = rig.admin.Rollback(back).report
    assert [(change.ref, change.state_after) for change in report.changes] == [
        (TOPIC_PB, types_pb.BLOCK_STATE_ACTIVE)
    ]
    np.testing.assert_array_equal(rig.bank.weight(TOPIC), full(2.0))
    # Revision 0 is a revision, and no target at all is not it.
    rig.admin.Rollback(pb.RollbackRequest(request_id="c", revision_plus_one=1))
    assert rig.bank.status(TOPIC).step == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, Reason.BAD_ARGUMENT),
        ({"snapshot": "s", "revision_plus_one": 1}, Reason.BAD_ARGUMENT),
        ({"revision_plus_one": 1}, Reason.BAD_ARGUMENT),
        ({"revision_plus_one": 9}, Reason.UNKNOWN_REVISION),
        ({"revision_plus_one": 2**64 - 1}, Reason.UNKNOWN_REVISION),
        ({"snapshot": "s"}, Reason.UNKNOWN_SNAPSHOT),
        ({"snapshot": "s", "only_block": True}, Reason.BAD_ARGUMENT),
    ],
)
def test_a_wrong_rollback_is_a_typed_error(
    rig: RpcRig, fields: dict[str, object], reason: Reason
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        rig.admin.Rollback(pb.RollbackRequest(request_id="r", **fields))  # type: ignore[arg-type]
    assert error_of(caught.value).reason is reason


def test_a_snapshot_is_given_up(rig: RpcRig) -> None:
    made = rig.admin.CreateSnapshot(pb.CreateSnapshotRequest(request_id="a", snapshot="s"))
    answer = rig.admin.DeleteSnapshot(pb.DeleteSnapshotRequest(request_id="b", snapshot="s"))
    assert (answer.snapshot, answer.revision) == (made.snapshot, 2)
    assert not rig.admin.ListSnapshots(pb.ListSnapshotsRequest()).snapshots
    with pytest.raises(grpc.RpcError) as caught:
        rig.admin.DeleteSnapshot(pb.DeleteSnapshotRequest(request_id="c", snapshot="s"))
    assert error_of(caught.value).reason is Reason.UNKNOWN_SNAPSHOT


def test_garbage_is_told_and_removed(rig: RpcRig) -> None:
    for number in range(3):
        rig.bank.push(TOPIC, f"p{number}")
        for step in (Withhold(topic=TOPIC), Restore(topic=TOPIC)):
            request_id = f"{step.kind}{number}"
            rig.admin.ApplyTransaction(step_messages(step, request_id=request_id))
    ask = pb.CollectGarbageRequest(dry_run=True, keep_revisions=1)
    dry = rig.admin.CollectGarbage(ask)
    assert dry.dry_run
    assert rig.admin.GetStats(pb.GetStatsRequest()).revision == 6
    wet = rig.admin.CollectGarbage(pb.CollectGarbageRequest(request_id="g", keep_revisions=1))
    assert (wet.dry_run, wet.history_from) == (False, 7)
    assert {g.kind for g in wet.garbage} == {
        pb.GARBAGE_KIND_RETIRED_MANIFEST,
        pb.GARBAGE_KIND_RETIRED_SLOT,
    }
    stored = set(rig.bank.objects.list(""))
    for garbage in wet.garbage:
        assert garbage.num_objects == len(garbage.keys) > 0
        assert garbage.num_bytes > 0
        assert not stored & set(garbage.keys)
    again = rig.admin.CollectGarbage(pb.CollectGarbageRequest(request_id="g2"))
    assert not again.garbage


def test_describe_answers_in_the_order_asked(rig: RpcRig) -> None:
    refs = [types_pb.BlockRef(level=2, cluster=5), TOPIC_PB]
    blocks = rig.admin.DescribeBlocks(pb.DescribeBlocksRequest(refs=refs)).blocks
    assert [block.topic.ref for block in blocks] == refs


def test_create_bank_carries_who_asked(rig: RpcRig) -> None:
    spec = convert.spec_to_pb(RIG_SPEC)
    answer = rig.admin.CreateBank(pb.CreateBankRequest(request_id="a", spec=spec))
    assert answer.spec.name == "local"
    for request in (
        pb.CreateBankRequest(request_id="a"),
        pb.CreateBankRequest(spec=spec),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            rig.admin.CreateBank(request)
        assert error_of(caught.value).reason is Reason.BAD_ARGUMENT


def test_a_change_needs_a_request_id(rig: RpcRig) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        rig.admin.ApplyTransaction(step_messages(Withhold(topic=TOPIC)))
    assert error_of(caught.value).reason is Reason.BAD_ARGUMENT
    assert rig.bank.log.last == 0


def test_without_a_bank_every_operation_says_so(rig: RpcRig) -> None:
    rig.has_bank = False
    for call in (
        lambda: rig.admin.ListTopics(pb.ListTopicsRequest()),
        lambda: rig.admin.ApplyTransaction(step_messages(Delete(topic=TOPIC), request_id="a")),
        lambda: list(rig.admin.ExportTopic(pb.ExportTopicRequest(topic=TOPIC_PB))),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert error_of(caught.value).reason is Reason.UNKNOWN_BANK


def test_another_bank_is_not_served(rig: RpcRig) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        rig.admin.GetStats(pb.GetStatsRequest(bank="other"))
    assert error_of(caught.value).reason is Reason.UNKNOWN_BANK


def test_a_deletion_is_answered_with_its_receipt(rig: RpcRig) -> None:
    answer = rig.admin.ApplyTransaction(step_messages(Delete(topic=TOPIC), request_id="a"))
    again = rig.admin.GetReceipt(pb.GetReceiptRequest(revision=answer.report.revision))
    assert again.receipt == answer.receipt != b""
    with pytest.raises(grpc.RpcError) as caught:
        rig.admin.GetReceipt(pb.GetReceiptRequest(revision=0))
    assert error_of(caught.value).reason is Reason.UNKNOWN_RECEIPT
