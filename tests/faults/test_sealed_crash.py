"""Deaths at every change of a sealed bank and of its keyring: the deletion is whole, or never was."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from bank_rig import COORDINATOR, BankRig, Disturbance, SealedPlace
from membank.bank_service.fsck import check_bank, verify_audit
from membank.bank_service.shard import ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.store import LocalObjects, SealedObjects
from membank.client import BankClient
from membank.wire.errors import MembankError
from membank.wire.records import Gradient, Update
from membank.wire.spec import BlockRef
from membank.wire.steps import Delete
from shard_rig import RIG_SPEC, asked, full_tree
from storage_faults import Crash, FaultPlan, StorageFault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TOPIC, LEAF, OTHER = BlockRef(1, 1), BlockRef(2, 2), BlockRef(1, 3)
OWNER = "shard-1"
"""Of all three."""


def push(rig: BankRig, ref: BlockRef, request_id: str) -> None:
    shard = rig.shard(rig.owner_of(ref))
    values = np.ones(RIG_SPEC.block_shape(ref.level), np.float32)
    base = shard.describe([ref])[0].version
    gradient = Gradient(ref=ref, base_version=base, values=values)
    shard.push(Update(request_id=request_id, step=1, gradients=(gradient,)))


def story(rig: BankRig) -> None:
    """Change, fold and delete what is to be deleted; the deaths happen meanwhile."""
    push(rig, LEAF, "s1")
    rig.shard(OWNER).consolidate()
    push(rig, TOPIC, "s2")
    rig.operations.apply(asked("d"), [Delete(topic=TOPIC)])


def disturbances(fault: StorageFault, victim: str, stride: int) -> Iterator[Disturbance]:
    for at in itertools.count(1, stride):
        yield Disturbance(victim, fault, at)


@pytest.mark.parametrize(("victim", "stride"), [(OWNER, 3), (COORDINATOR, 1)])
@pytest.mark.parametrize("fault", [StorageFault.CRASH_BEFORE, StorageFault.CRASH_AFTER])
def test_a_death_anywhere(tmp_path: Path, victim: str, stride: int, fault: StorageFault) -> None:
    for disturbance in disturbances(fault, victim, stride):
        folder = tmp_path / f"{disturbance.at}"
        place = SealedPlace(folder)
        config = ShardConfig(durability=Durability.STORE)
        rig = BankRig(place, RIG_SPEC, tree=full_tree(RIG_SPEC), config=config)
        for number, ref in enumerate((TOPIC, LEAF, OTHER, TOPIC)):
            push(rig, ref, f"u{number}")
            rig.shard(OWNER).consolidate()
        copy = folder / "copy"
        shutil.copytree(place.bank, copy)
        with rig.disturbed(disturbance), suppress(Crash, MembankError):
            story(rig)
        was_disturbed = rig.was_disturbed
        rig.start()
        # Where the coordinator lives, it has yet to hear of the death.
        rig.recover()
        is_deleted = rig.committed_by("d") is not None
        check(place, copy, is_deleted=is_deleted)
        # A repetition finds it done, or does it.
        rig.operations.apply(asked("d"), [Delete(topic=TOPIC)])
        check(place, copy, is_deleted=True)
        rig.close()
        if not was_disturbed:
            assert is_deleted
            break


def check(place: SealedPlace, copy: Path, *, is_deleted: bool) -> None:
    objects = place.objects(FaultPlan())
    report = check_bank(objects)
    assert report.is_clean, report.findings
    assert verify_audit(objects).found.is_clean
    assert BankClient.open(place.bank, keyring=place.keyring).fetch_blocks([OTHER])
    # A copy from before has the topic exactly as long as the bank has it.
    seen = SealedObjects(LocalObjects(copy), LocalObjects(place.keyring))
    for key in LocalObjects(copy).list("partitions/0001"):
        if "/c." in key and is_deleted:
            with pytest.raises(MembankError):
                seen.get(key)
    read = BankClient.open(place.bank, keyring=place.keyring).fetch_blocks([TOPIC, LEAF])
    assert [block.weight is None for block in read.values()] == [is_deleted] * 2


def test_the_partitions_are_as_the_checks_take_them() -> None:
    assert [RIG_SPEC.partition_of(ref) for ref in (TOPIC, LEAF, OTHER)] == [1, 1, 3]
