"""A sealed bank at work: what a deletion destroyed is in no copy, and everything else goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from bank_rig import BankRig, SealedPlace
from membank.bank_service.fsck import FindingKind, FsckReport, check_bank, verify_audit
from membank.bank_service.shard import ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.store import LocalObjects, SealedObjects
from membank.client import BankClient, OpenedBank
from membank.wire.errors import CorruptionError, FailedPreconditionError, MembankError, Reason
from membank.wire.format.layout import log_prefix, tree_key
from membank.wire.format.sealed import encode_secret, new_secret
from membank.wire.records import Gradient, Update
from membank.wire.spec import Array, BlockRef
from membank.wire.steps import Delete, Swap
from shard_rig import RIG_SPEC, asked, full_tree
from storage_faults import FaultPlan
from tiny_bank import file_bytes

TOPIC, OTHER = BlockRef(1, 1), BlockRef(1, 2)
LEAF = BlockRef(2, 2)
"""Of `TOPIC`."""


@pytest.fixture
def place(tmp_path: Path) -> SealedPlace:
    return SealedPlace(tmp_path / "place")


@pytest.fixture
def rig(place: SealedPlace) -> Iterator[BankRig]:
    config = ShardConfig(durability=Durability.STORE)
    rig = BankRig(place, RIG_SPEC, tree=full_tree(RIG_SPEC), config=config)
    yield rig
    rig.close()


def marker(ref: BlockRef) -> Array:
    """Return content of which any 16 bytes are known again."""
    values = np.random.default_rng(ref).standard_normal(RIG_SPEC.block_shape(ref.level))
    return values.astype(RIG_SPEC.numpy_dtype)


def traces(files: dict[str, bytes], *refs: BlockRef) -> list[str]:
    """Return the files that hold 16 bytes of a block's marker."""
    needles = [marker(ref).tobytes()[at : at + 16] for ref in refs for at in (0, 32)]
    return [name for name, data in files.items() if any(needle in data for needle in needles)]


def plant(rig: BankRig, *refs: BlockRef, request_id: str = "plant") -> None:
    rig.operations.apply(asked(request_id), [Swap(ref=ref, weight=marker(ref)) for ref in refs])


def push(rig: BankRig, ref: BlockRef, request_id: str) -> None:
    shard = rig.shard(rig.owner_of(ref))
    values = np.ones(RIG_SPEC.block_shape(ref.level), np.float32)
    base = shard.describe([ref])[0].version
    gradient = Gradient(ref=ref, base_version=base, values=values)
    shard.push(Update(request_id=request_id, step=1, gradients=(gradient,)))


def consolidate(rig: BankRig) -> None:
    for shard in rig.shards.values():
        shard.consolidate()


def opened(bank: Path, keyring: Path) -> OpenedBank:
    return BankClient.open(bank, keyring=keyring)


def check(place: SealedPlace, *, deep: bool = True) -> FsckReport:
    return check_bank(place.objects(FaultPlan()), deep=deep)


def test_a_bank_with_something_of_everything_is_in_the_clear_nowhere(
    rig: BankRig, place: SealedPlace
) -> None:
    plant(rig, TOPIC, LEAF, OTHER)
    rig.operations.create_snapshot(asked("s"), "pinned")
    push(rig, TOPIC, "u1")
    with rig.operations.store_pack(TOPIC, "kept") as pack:
        assert traces({"the pack": pack.data}, LEAF)
    assert traces(file_bytes(place.root), TOPIC, LEAF, OTHER) == []
    assert not [name for name, data in file_bytes(place.bank).items() if b"label of" in data]
    consolidate(rig)
    assert traces(file_bytes(place.root), TOPIC, LEAF, OTHER) == []
    assert check(place).findings == ()
    read = opened(place.bank, place.keyring)
    np.testing.assert_array_equal(read.fetch_blocks([LEAF]).weights[LEAF], marker(LEAF))
    assert read.tree.labels[TOPIC] == "label of 1-1"


def test_a_copy_from_before_the_deletion_has_all_but_the_topic(
    rig: BankRig, place: SealedPlace, tmp_path: Path
) -> None:
    plant(rig, TOPIC, LEAF, OTHER)
    push(rig, TOPIC, "u1")
    rig.operations.create_snapshot(asked("s"), "pinned")
    push(rig, LEAF, "u2")
    copy = tmp_path / "copy"
    shutil.copytree(place.bank, copy)
    keys_before = tmp_path / "keys"
    shutil.copytree(place.keyring, keys_before)
    rig.operations.apply(asked("d"), [Delete(topic=TOPIC)])

    # With the keys of then the copy is whole: it is the keyring that makes the difference.
    assert check_bank(SealedObjects(LocalObjects(copy), LocalObjects(keys_before))).is_clean
    pinned = BankClient.open(copy, keyring=keys_before, snapshot="pinned")
    np.testing.assert_array_equal(pinned.fetch_blocks([LEAF]).weights[LEAF], marker(LEAF))

    # With the keys of now nothing of the topic is there, in no version, journal or tree.
    now = SealedObjects(LocalObjects(copy), LocalObjects(place.keyring))
    readable: dict[str, bytes] = {}
    for key in LocalObjects(copy).list(""):
        try:
            readable[key] = now.get(key)
        except MembankError:
            continue
    assert traces(readable, TOPIC, LEAF) == []
    assert traces(readable, OTHER)
    assert not [key for key in readable if b"label of 1-1" in readable[key]]
    for ref in (TOPIC, LEAF):
        with pytest.raises(CorruptionError):
            BankClient.open(copy, keyring=place.keyring).fetch_blocks([ref])
        with pytest.raises(CorruptionError):
            BankClient.open(copy, keyring=place.keyring, snapshot="pinned").fetch_blocks([ref])
    for snapshot in ("", "pinned"):
        read = BankClient.open(copy, keyring=place.keyring, snapshot=snapshot)
        np.testing.assert_array_equal(read.fetch_blocks([OTHER]).weights[OTHER], marker(OTHER))

    # The bank itself goes on, and its log holds.
    report = verify_audit(place.objects(FaultPlan()))
    assert (report.found.findings, report.num_receipts) == ((), 1)
    read = opened(place.bank, place.keyring)
    np.testing.assert_array_equal(read.fetch_blocks([OTHER]).weights[OTHER], marker(OTHER))
    assert check(place).findings == ()


def test_nobody_opens_it_without_its_keyring(rig: BankRig, place: SealedPlace) -> None:
    plant(rig, TOPIC)
    calls: Sequence[Callable[[], object]] = (
        lambda: BankClient.open(place.bank),
        lambda: check_bank(LocalObjects(place.bank)),
        lambda: verify_audit(LocalObjects(place.bank)),
    )
    for call in calls:
        with pytest.raises(FailedPreconditionError, match="keyring") as caught:
            call()
        assert caught.value.reason is Reason.KEYRING_NEEDED
    other = place.root / "other"
    shutil.copytree(place.keyring, other)
    for call in (
        lambda: BankClient.open(place.bank, keyring=place.root),
        lambda: check_bank(SealedObjects(LocalObjects(place.bank), LocalObjects(place.root))),
    ):
        with pytest.raises(FailedPreconditionError) as caught:
            call()
        assert caught.value.reason is Reason.KEYRING_MISMATCH


def test_a_topic_is_carried_into_a_sealed_bank_and_out_of_it(
    rig: BankRig, place: SealedPlace
) -> None:
    plant(rig, TOPIC, LEAF)
    with rig.operations.export_topic(TOPIC) as pack:
        data = pack.data
    assert marker(LEAF).tobytes()[:16] in data
    rig.operations.apply(asked("d"), [Delete(topic=TOPIC)])
    rig.operations.import_topic(asked("i"), data)
    consolidate(rig)
    read = opened(place.bank, place.keyring)
    np.testing.assert_array_equal(read.fetch_blocks([LEAF]).weights[LEAF], marker(LEAF))
    assert traces(file_bytes(place.root), TOPIC, LEAF) == []


def test_what_a_crash_left_is_named_and_collected(rig: BankRig, place: SealedPlace) -> None:
    plant(rig, TOPIC, LEAF)
    restart(rig)
    bank, keyring = LocalObjects(place.bank), LocalObjects(place.keyring)
    # A removal that was cut off, of a slot, a tree and a part of a journal; and puts that were.
    log = bank.list(log_prefix(1))[0]
    keyring.delete(log)
    slots = [f"partitions/0001/level-{level}/weight/c.1.0.0.0.0" for level in (1, 2)]
    trees = [tree_key(98), tree_key(99)]
    for removed, begun in (slots, trees):
        bank.put_if_absent(removed, bytes(44))
        keyring.put_if_absent(begun, encode_secret(new_secret()))
    report = check(place)
    left = {log, *slots, *trees}
    assert {finding.key for finding in report.of(FindingKind.SEAL_UNFINISHED)} == left
    assert report.is_clean
    restart(rig)
    found = rig.operations.collect_garbage(asked("gc"), keep_revisions=None)
    collected = {key for part in found.garbage for key in part.keys}
    assert collected >= {log, *trees}
    # Slots from the next one on may be another owner's. They are simply taken.
    plant(rig, TOPIC, LEAF, request_id="again")
    assert set(slots) <= set(bank.list("")) & set(keyring.list(""))
    assert check(place).findings == ()
    read = opened(place.bank, place.keyring)
    np.testing.assert_array_equal(read.fetch_blocks([LEAF]).weights[LEAF], marker(LEAF))


def restart(rig: BankRig) -> None:
    for name in list(rig.shards):
        rig.stop(name, consolidate=True)
    rig.start()


def test_a_slot_whose_key_is_lost_is_damage_and_named(rig: BankRig, place: SealedPlace) -> None:
    plant(rig, TOPIC)
    (slot,) = [key for key in LocalObjects(place.bank).list("partitions") if "/c." in key]
    LocalObjects(place.keyring).delete(slot)
    for deep in (False, True):
        report = check(place, deep=deep)
        assert [f.key for f in report.of(FindingKind.SEAL_KEY_MISSING)] == [slot]
        assert [f.key for f in report.of(FindingKind.SLOT_MISSING)] == [slot]
    with pytest.raises(CorruptionError, match=slot):
        opened(place.bank, place.keyring).fetch_blocks([TOPIC])


def test_its_journal_is_made_of_objects_alone(rig: BankRig, place: SealedPlace) -> None:
    push(rig, TOPIC, "u1")
    assert not list(place.bank.rglob("*.log"))
    rig.kill("shard-1")
    rig.set_durability("shard-1", Durability.PROCESS)
    with pytest.raises(FailedPreconditionError, match="durability") as caught:
        rig.start()
    assert caught.value.reason is Reason.BAD_CONFIG
    rig.set_durability("shard-1", Durability.STORE)
    rig.start()
    # What was acknowledged is there, from the journal.
    assert rig.shard(rig.owner_of(TOPIC)).describe([TOPIC])[0].version == 1
