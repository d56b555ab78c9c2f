"""Kills between the commit of a deletion and its receipt: it is finished, once, by whoever comes next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from membank.bank_service.fsck import verify_audit
from membank.wire.errors import UnavailableError
from membank.wire.format.receipt import decode_receipt
from membank.wire.spec import BlockRef
from membank.wire.steps import Delete
from shard_rig import Crash, ShardRig, When, asked

TOPIC = BlockRef(1, 1)

STEPS = [
    "put_if_absent keys",
    "put_if_absent revisions",
    "commit shard-0",
    "commit shard-1",
    "delete trees",
    "recycle shard-1",
    "put_if_absent receipts",
]
"""In this order; the shards confirm again after `recycle`."""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank", recycles=True)
    rig.push(TOPIC, "u")
    yield rig
    rig.close()


def delete(rig: ShardRig) -> bytes:
    return rig.operations.apply(asked("r1"), [Delete(topic=TOPIC)]).receipt


def restart_coordinator(rig: ShardRig) -> None:
    rig.start_coordinator()


def restart_everything(rig: ShardRig) -> None:
    rig.kill_shards()
    rig.open_shards()
    rig.start_coordinator()


def check_finished(rig: ShardRig, receipt: bytes) -> None:
    report = verify_audit(rig.objects)
    assert report.found.findings == ()
    assert (report.num_deletions, report.num_receipts) == (1, 1)
    assert receipt == rig.operations.receipt(1)
    # No process that held it acknowledges it.
    read = decode_receipt(receipt, what="it").receipt
    assert {one.now for one in read.acknowledgements}.isdisjoint(
        {owner.process for owner in read.deletion.owners}
    )
    assert rig.log.last == 1


@pytest.mark.parametrize("restart", [restart_coordinator, restart_everything])
@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize("step", STEPS)
def test_the_coordinator_dies(
    rig: ShardRig, step: str, when: When, restart: Callable[[ShardRig], None]
) -> None:
    rig.faults.arm(step, when, Crash)
    with pytest.raises(Crash):
        delete(rig)
    assert not rig.faults.is_armed
    restart(rig)
    is_committed = rig.log.find("r1") is not None
    # What is committed has its receipt as soon as a coordinator is there.
    assert len(rig.objects.list("receipts")) == is_committed
    if is_committed:
        check_finished(rig, delete(rig))
    else:
        assert delete(rig)


@pytest.mark.parametrize("when", When)
@pytest.mark.parametrize("step", STEPS[2:])
def test_a_call_is_lost(rig: ShardRig, step: str, when: When) -> None:
    rig.faults.arm(step, when, UnavailableError)
    try:
        delete(rig)
    except UnavailableError:
        assert rig.objects.list("receipts") == []
    check_finished(rig, delete(rig))


def test_a_shard_dies_while_it_is_recycled(rig: ShardRig) -> None:
    rig.faults.arm("recycle", When.BEFORE, Crash)
    with pytest.raises(Crash):
        delete(rig)
    rig.shards.pop("shard-1").close(consolidate=False)
    with pytest.raises(UnavailableError):
        rig.start_coordinator()
    assert rig.objects.list("receipts") == []
    rig.open_shards()
    rig.start_coordinator()
    check_finished(rig, delete(rig))
