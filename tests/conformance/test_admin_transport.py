"""What every transport does of the operations on what a bank knows, checked behind the bank's back."""

import io
import json
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from in_process import InProcessTransport
from membank.client import ClientConfig, GrpcTransport, Transport
from membank.wire.crc import crc32c
from membank.wire.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
)
from membank.wire.records import (
    Applied,
    CentroidChange,
    Garbage,
    GarbageKind,
    TransactionReport,
    TreeChange,
)
from membank.wire.spec import Array, BlockRef, BlockState
from membank.wire.steps import Combine, Delete, Place, Restore, Swap, Withhold

TIMEOUT_S = 10.0
TOPIC = BlockRef(1, 0)
LEAF = BlockRef(2, 1)
OTHER = BlockRef(1, 1)


class AdminTransportSuite:
    """Inherited for each transport; subclasses connect to the gateway of `bank`."""

    @pytest.fixture
    def bank(self) -> FakeBank:
        return FakeBank()

    @pytest.fixture
    def gateway(self) -> Transport:
        raise NotImplementedError

    async def test_topics(self, bank: FakeBank, gateway: Transport) -> None:
        assert await gateway.list_topics(None, depth=0, timeout_s=TIMEOUT_S) == bank.topics(None, 0)
        under = await gateway.list_topics(TOPIC, depth=1, timeout_s=TIMEOUT_S)
        assert [topic.ref for topic in under] == [TOPIC, BlockRef(2, 0), BlockRef(2, 1)]

    async def test_describe(self, bank: FakeBank, gateway: Transport) -> None:
        blocks = await gateway.describe([LEAF, TOPIC], timeout_s=TIMEOUT_S)
        assert blocks == bank.describe([LEAF, TOPIC])

    async def test_swap_replaces_content(self, bank: FakeBank, gateway: Transport) -> None:
        weights = {ref: 3 * _ones(ref) for ref in (TOPIC, OTHER)}
        report = await _swap(gateway, weights, {TOPIC: 0})
        assert (report.revision, len(report.changes)) == (1, 2)
        for ref, weight in weights.items():
            np.testing.assert_array_equal(bank.held(ref).weight, weight)

    async def test_swap_compares_versions(self, bank: FakeBank, gateway: Transport) -> None:
        with pytest.raises(ConflictError):
            await _swap(gateway, {TOPIC: _ones(TOPIC)}, {TOPIC: 1})
        assert bank.revision == 0

    async def test_steps_of_all_kinds_are_one_transaction(
        self, bank: FakeBank, gateway: Transport
    ) -> None:
        before = {ref: bank.held(ref).weight.copy() for ref in (LEAF, OTHER)}
        bank.store_pack(LEAF, "kept")
        steps = (
            Swap(ref=BlockRef(1, 2), weight=5 * _ones(TOPIC)),
            Combine(ref=BlockRef(1, 3), keep=0.0, other=OTHER, add=0.5, expected_other_version=0),
            Withhold(topic=OTHER, only_block=True),
            Delete(topic=LEAF),
            Place(topic=TOPIC, label="", num_documents=0, centroid=np.array([0.5, 2.0])),
            Place(topic=OTHER, remove_centroid=True),
        )
        dry = await gateway.apply(steps, request_id="t", dry_run=True, timeout_s=TIMEOUT_S)
        assert (bank.revision, dry.report.dry_run, dry.receipt) == (0, True, b"")
        done = await gateway.apply(steps, request_id="t", dry_run=False, timeout_s=TIMEOUT_S)
        again = await gateway.apply(steps, request_id="t", dry_run=False, timeout_s=TIMEOUT_S)
        assert again == done
        assert (done.report.revision, bank.revision) == (1, 1)
        assert replace(done.report, revision=0, dry_run=True) == dry.report
        assert json.loads(done.receipt) == {"deleted": [str(LEAF)]}
        assert (done.report.packs, bank.list_packs()) == (("kept",), ())
        assert done.report.tree_changes == (
            TreeChange(
                topic=TOPIC,
                changes_label=True,
                changes_num_documents=True,
                centroid_change=CentroidChange.SET,
            ),
            TreeChange(topic=OTHER, centroid_change=CentroidChange.REMOVED),
        )
        np.testing.assert_array_equal(bank.held(BlockRef(1, 2)).weight, 5 * _ones(TOPIC))
        np.testing.assert_array_equal(
            bank.held(BlockRef(1, 3)).weight, 0.5 * before[OTHER].astype(np.float32)
        )
        states = [bank.held(ref).state for ref in (OTHER, BlockRef(2, 2), LEAF)]
        assert states == [BlockState.WITHHELD, BlockState.ACTIVE, BlockState.DELETED]

    @pytest.mark.parametrize(
        "step",
        [
            Combine(ref=TOPIC, keep=0.3, expected_version=4),
            Combine(ref=TOPIC, keep=0.3, other=OTHER, add=0.7, expected_other_version=4),
        ],
    )
    async def test_combining_compares_versions(
        self, bank: FakeBank, gateway: Transport, step: Combine
    ) -> None:
        with pytest.raises(ConflictError):
            await gateway.apply([step], request_id="c", dry_run=False, timeout_s=TIMEOUT_S)
        assert bank.revision == 0

    async def test_dry_runs_change_nothing(self, bank: FakeBank, gateway: Transport) -> None:
        for call in _state_changes(gateway, dry_run=True):
            report = (await call).report
            assert (report.dry_run, report.revision) == (True, 0)
            assert [change.ref for change in report.changes] == list(SPEC.subtree(TOPIC))
        assert bank.revision == 0

    async def test_states_change(self, bank: FakeBank, gateway: Transport) -> None:
        states = []
        for call in _state_changes(gateway, dry_run=False):
            await call
            states.append({bank.held(ref).state for ref in SPEC.subtree(TOPIC)})
        assert states == [{BlockState.WITHHELD}, {BlockState.ACTIVE}, {BlockState.DELETED}]

    async def test_export_and_import(self, bank: FakeBank, gateway: Transport) -> None:
        before = bank.held(LEAF).weight.copy()
        target = io.BytesIO()
        info = await gateway.export(TOPIC, target, weights_only=True, timeout_s=TIMEOUT_S)
        assert target.getvalue() == bank.export(TOPIC)
        assert (info.num_bytes, info.crc32c) == (target.tell(), crc32c(target.getvalue()))
        await _swap(gateway, {LEAF: _ones(LEAF)}, {})
        padded = io.BytesIO(b"before" + target.getvalue())
        padded.seek(6)
        answer = await gateway.import_pack(
            padded, request_id="import-1", dry_run=False, timeout_s=TIMEOUT_S
        )
        assert (answer.topic, answer.report.revision) == (TOPIC, 2)
        np.testing.assert_array_equal(bank.held(LEAF).weight, before)

    async def test_import_under_another_topic(self, bank: FakeBank, gateway: Transport) -> None:
        target = io.BytesIO()
        await gateway.export(TOPIC, target, weights_only=False, timeout_s=TIMEOUT_S)
        target.seek(0)
        other = BlockRef(TOPIC.level, TOPIC.cluster ^ 1)
        answer = await gateway.import_pack(
            target, topic=other, force=True, request_id="i", dry_run=False, timeout_s=TIMEOUT_S
        )
        assert answer.topic == other
        assert [change.ref for change in answer.report.changes] == list(SPEC.subtree(other))

    async def test_stored_packs(self, bank: FakeBank, gateway: Transport) -> None:
        info = await gateway.store_pack(
            TOPIC, "kept", weights_only=False, since=None, timeout_s=TIMEOUT_S
        )
        assert info.num_bytes == len(bank.export(TOPIC))
        (kept,) = await gateway.list_packs(timeout_s=TIMEOUT_S)
        assert (kept.name, kept.topic, kept.num_bytes) == ("kept", TOPIC, info.num_bytes)
        answer = await gateway.import_pack(
            "kept", request_id="i", dry_run=True, timeout_s=TIMEOUT_S
        )
        assert answer.topic == TOPIC
        for _ in range(2):
            gone = await gateway.delete_pack("kept", request_id="x", timeout_s=TIMEOUT_S)
            assert gone == kept
        for call in (
            gateway.delete_pack("kept", request_id="y", timeout_s=TIMEOUT_S),
            gateway.import_pack("kept", request_id="j", dry_run=False, timeout_s=TIMEOUT_S),
        ):
            with pytest.raises(NotFoundError) as caught:
                await call
            assert caught.value.reason is Reason.UNKNOWN_PACK

    async def test_import_of_no_pack(self, gateway: Transport) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            await gateway.import_pack(
                io.BytesIO(b"nonsense"), request_id="i", dry_run=False, timeout_s=TIMEOUT_S
            )
        assert caught.value.reason is Reason.BAD_PACK

    async def test_snapshots_and_rollback(self, bank: FakeBank, gateway: Transport) -> None:
        snapshot = await gateway.create_snapshot("one", request_id="s", timeout_s=TIMEOUT_S)
        assert await gateway.list_snapshots(timeout_s=TIMEOUT_S) == (snapshot,)
        before = {ref: bank.held(ref).weight.copy() for ref in (LEAF, OTHER)}
        await _swap(gateway, {ref: _ones(ref) for ref in before}, {})
        await _rollback(gateway, "one", TOPIC, request_id="r")
        np.testing.assert_array_equal(bank.held(LEAF).weight, before[LEAF])
        np.testing.assert_array_equal(bank.held(OTHER).weight, _ones(OTHER))
        await _rollback(gateway, "one", None, request_id="r2")
        np.testing.assert_array_equal(bank.held(OTHER).weight, before[OTHER])

    async def test_snapshot_errors(self, gateway: Transport) -> None:
        await gateway.create_snapshot("one", request_id="s", timeout_s=TIMEOUT_S)
        with pytest.raises(AlreadyExistsError):
            await gateway.create_snapshot("one", request_id="s2", timeout_s=TIMEOUT_S)
        with pytest.raises(NotFoundError) as caught:
            await _rollback(gateway, "two", None, request_id="r")
        assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT
        with pytest.raises(NotFoundError) as caught:
            await gateway.delete_snapshot("two", request_id="d", timeout_s=TIMEOUT_S)
        assert caught.value.reason is Reason.UNKNOWN_SNAPSHOT

    async def test_rollback_of_one_block_to_a_revision(
        self, bank: FakeBank, gateway: Transport
    ) -> None:
        before = {ref: bank.held(ref).weight.copy() for ref in (TOPIC, LEAF)}
        await _swap(gateway, {ref: _ones(ref) for ref in before}, {})
        report = await _rollback(gateway, 0, TOPIC, only_block=True, request_id="r")
        assert [change.ref for change in report.changes] == [TOPIC]
        np.testing.assert_array_equal(bank.held(TOPIC).weight, before[TOPIC])
        np.testing.assert_array_equal(bank.held(LEAF).weight, _ones(LEAF))
        with pytest.raises(NotFoundError) as caught:
            await _rollback(gateway, 9, None, request_id="r2")
        assert caught.value.reason is Reason.UNKNOWN_REVISION

    @pytest.mark.parametrize("keep", [None, 3])
    async def test_garbage_is_told(
        self, bank: FakeBank, gateway: Transport, keep: int | None
    ) -> None:
        bank.garbage = (
            Garbage(kind=GarbageKind.TREE, num_objects=2, num_bytes=77, keys=("a", "b")),
        )
        for dry_run, found in ((True, bank.garbage), (False, bank.garbage), (False, ())):
            report = await gateway.collect_garbage(
                keep_revisions=keep, dry_run=dry_run, request_id="g", timeout_s=TIMEOUT_S
            )
            assert (report.garbage, report.dry_run, bank.keep_revisions) == (found, dry_run, keep)

    async def test_stats_and_audit(self, bank: FakeBank, gateway: Transport) -> None:
        for number in range(3):
            await _swap(gateway, {TOPIC: number * _ones(TOPIC)}, {}, request_id=f"swap-{number}")
        assert await gateway.get_stats(timeout_s=TIMEOUT_S) == bank.stats()
        records = await gateway.list_audit_records(
            limit=2, retained_only=False, timeout_s=TIMEOUT_S
        )
        assert [record.request_id for record in records] == ["swap-2", "swap-1"]
        assert records == tuple(bank.audit[:2])
        retained = await gateway.list_audit_records(
            limit=9, retained_only=True, timeout_s=TIMEOUT_S
        )
        assert [record.revision for record in retained] == [2, 1]


class TestInProcessTransport(AdminTransportSuite):
    @pytest.fixture
    def gateway(self, bank: FakeBank) -> Transport:
        return InProcessTransport(bank)


class TestGrpcTransport(AdminTransportSuite):
    @pytest.fixture
    async def gateway(self, bank: FakeBank) -> AsyncIterator[Transport]:
        service = FakeService(bank)
        transport = GrpcTransport(service.endpoint, ClientConfig())
        yield transport
        await transport.close()
        service.close()


def _ones(ref: BlockRef) -> NDArray[np.float32]:
    return np.ones(SPEC.block_shape(ref.level), np.float32)


async def _swap(
    gateway: Transport,
    weights: Mapping[BlockRef, Array],
    expected: Mapping[BlockRef, int],
    request_id: str = "swap-1",
) -> TransactionReport:
    steps = [
        Swap(ref=ref, weight=weight, expected_version=expected.get(ref))
        for ref, weight in weights.items()
    ]
    applied = await gateway.apply(steps, request_id=request_id, dry_run=False, timeout_s=TIMEOUT_S)
    return applied.report


async def _rollback(
    gateway: Transport,
    target: str | int,
    topic: BlockRef | None,
    *,
    only_block: bool = False,
    request_id: str,
) -> TransactionReport:
    return await gateway.rollback(
        target,
        topic,
        only_block=only_block,
        request_id=request_id,
        dry_run=False,
        timeout_s=TIMEOUT_S,
    )


def _state_changes(gateway: Transport, *, dry_run: bool) -> Iterator[Awaitable[Applied]]:
    for step in (Withhold(topic=TOPIC), Restore(topic=TOPIC), Delete(topic=TOPIC)):
        yield gateway.apply([step], request_id=step.kind, dry_run=dry_run, timeout_s=TIMEOUT_S)
