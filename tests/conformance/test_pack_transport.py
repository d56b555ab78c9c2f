"""What every transport does with packs, checked against the bank behind its back."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Iterator

import numpy as np
import pytest

from fake_bank import SPEC, FakeBank
from fake_service import FakeService
from in_process import InProcessTransport
from membank.client import ClientConfig, GrpcTransport, Transport
from membank.wire.crc import crc32c
from membank.wire.errors import InvalidArgumentError, NotFoundError, Reason
from membank.wire.spec import BlockRef
from membank.wire.steps import Swap

TIMEOUT_S = 10.0
TOPIC = BlockRef(1, 0)
LEAF = BlockRef(2, 1)


@pytest.fixture
def bank() -> FakeBank:
    return FakeBank()


@pytest.fixture
def service(bank: FakeBank) -> Iterator[FakeService]:
    service = FakeService(bank)
    yield service
    service.close()


@pytest.fixture(params=["in process", "gRPC"])
async def gateway(
    request: pytest.FixtureRequest, bank: FakeBank, service: FakeService
) -> AsyncIterator[Transport]:
    gateway: Transport = (
        InProcessTransport(bank)
        if request.param == "in process"
        else GrpcTransport(service.endpoint, ClientConfig())
    )
    yield gateway
    await gateway.close()


async def test_export_and_import(self, bank: FakeBank, gateway: Transport) -> None:
    before = bank.held(LEAF).weight.copy()
    target = io.BytesIO()
    info = await gateway.export(TOPIC, target, weights_only=True, timeout_s=TIMEOUT_S)
    assert target.getvalue() == bank.export(TOPIC)
    assert (info.num_bytes, info.crc32c) == (target.tell(), crc32c(target.getvalue()))
    ones = Swap(ref=LEAF, weight=np.ones(SPEC.block_shape(2), np.float32))
    await gateway.apply([ones], request_id="swap-1", dry_run=False, timeout_s=TIMEOUT_S)
    padded = io.BytesIO(b"before" + target.getvalue())
    padded.seek(6)
    answer = await gateway.import_pack(
        padded, request_id="import-1", dry_run=False, timeout_s=TIMEOUT_S
    )
    assert (answer.topic, answer.report.revision) == (TOPIC, 2)
    np.testing.assert_array_equal(bank.held(LEAF).weight, before)

async def test_import_of_no_pack(self, gateway: Transport) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await gateway.import_pack(
            io.BytesIO(b"nonsense"), request_id="i", dry_run=False, timeout_s=TIMEOUT_S
        )
    assert caught.value.reason is Reason.BAD_PACK

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
    assert await gateway.delete_pack("kept", timeout_s=TIMEOUT_S) == kept
    for call in (
        gateway.delete_pack("kept", timeout_s=TIMEOUT_S),
        gateway.import_pack("kept", request_id="j", dry_run=False, timeout_s=TIMEOUT_S),
    ):
        with pytest.raises(NotFoundError) as caught:
            await call
        assert caught.value.reason is Reason.UNKNOWN_PACK
