"""Receipts of deletions: what they say, when they are made, and what goes without one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from membank.bank_service.fsck import FindingKind, verify_audit
from membank.bank_service.knowledge import (
    BankOperations,
    Coordinator,
    CoordinatorConfig,
    ReceiptDesk,
    RevisionLog,
    ShardGroup,
    ShardMember,
    TreeStore,
)
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.store import Bank, LocalObjects
from membank.wire.errors import FailedPreconditionError, NotFoundError, Reason, UnavailableError
from membank.wire.format.layout import public_key_key, receipt_key, revision_key
from membank.wire.format.receipt import KEY_OPERATION, Receipt, Recycling, decode_receipt
from membank.wire.signing import Signer
from membank.wire.spec import BlockRef, Role
from membank.wire.steps import Delete, Swap, Withhold
from s3_server import S3Place
from shard_rig import RIG_SPEC, Crash, ShardRig, asked

TOPIC, OTHER = BlockRef(1, 1), BlockRef(1, 2)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[ShardRig]:
    rig = ShardRig(tmp_path / "bank", recycles=True)
    for number in range(2):
        rig.push(TOPIC, f"u{number}")
    yield rig
    rig.close()


def delete(rig: ShardRig, request_id: str = "r1", topic: BlockRef = TOPIC) -> bytes:
    return rig.operations.apply(asked(request_id), [Delete(topic=topic)]).receipt


def read(data: bytes) -> Receipt:
    return decode_receipt(data, what="the receipt").receipt


def check_verified(rig: ShardRig, num_deletions: int) -> None:
    report = verify_audit(rig.objects)
    assert report.found.findings == ()
    assert report.num_deletions == report.num_receipts == num_deletions


def test_a_receipt_says_what_was_destroyed_by_whom_and_for_whom(rig: ShardRig) -> None:
    rig.operations.create_snapshot(asked("s"), "before")
    rig.push(TOPIC, "u2")
    (content,) = rig.owner(TOPIC).read([TOPIC])
    arrays = {Role.WEIGHT: content.weight, **content.optimizer_state}
    digests = {str(role): hashlib.sha256(a.tobytes()).hexdigest() for role, a in arrays.items()}
    receipt = read(delete(rig))
    assert (receipt.revision, receipt.operation) == (2, "delete")
    assert (receipt.principal, receipt.request_id) == ("alice", "r1")
    assert receipt.bank_id == rig.spec.bank_id
    record = rig.objects.get(revision_key(2))
    assert receipt.record_sha256 == hashlib.sha256(record).hexdigest()
    deletion = receipt.deletion
    assert deletion.topics == (TOPIC,)
    assert [block.ref for block in deletion.blocks] == list(RIG_SPEC.subtree(TOPIC))
    block, *never_written = deletion.blocks
    # The version that the snapshot pins, and the one after it.
    assert (block.version, block.num_slots, block.sha256) == (3, 2, digests)
    assert [(b.num_slots, b.sha256) for b in never_written] == [(0, {})] * 2
    (owner,) = deletion.owners
    assert (owner.shard_id, owner.partitions, owner.num_slots) == ("shard-1", (1,), 2)
    assert owner.num_manifests >= 2
    assert owner.journal_bytes > 0
    assert deletion.trees == ("trees/0000000000.safetensors",)
    (acknowledged,) = receipt.acknowledgements
    assert acknowledged.confirmed_by == owner.process
    assert receipt.recycling is Recycling.DONE
    assert acknowledged.now != owner.process
    check_verified(rig, 1)


def test_packs_that_go_with_it_are_named(rig: ShardRig) -> None:
    rig.operations.store_pack(TOPIC, "kept").close()
    rig.operations.store_pack(OTHER, "another").close()
    assert read(delete(rig)).deletion.packs == ("kept",)
    assert [pack.name for pack in rig.operations.list_packs()] == ["another"]
    check_verified(rig, 1)


def test_a_retry_gets_the_same_receipt(rig: ShardRig) -> None:
    first = delete(rig)
    assert delete(rig) == first
    rig.start_coordinator()
    assert delete(rig) == first
    assert rig.operations.receipt(1) == first
    assert rig.objects.get(receipt_key(1)) == first


def test_only_what_deletes_has_a_receipt(rig: ShardRig) -> None:
    dry = rig.operations.apply(asked("", dry_run=True), [Delete(topic=TOPIC)])
    assert (dry.receipt, dry.report.num_slots_destroyed) == (b"", 1)
    withheld = rig.operations.apply(asked("w"), [Withhold(topic=TOPIC)])
    assert withheld.receipt == b""
    with pytest.raises(NotFoundError) as caught:
        rig.operations.receipt(withheld.report.revision)
    assert caught.value.reason is Reason.UNKNOWN_RECEIPT
    assert rig.objects.list("receipts") == rig.objects.list("keys") == []
    (audited, _) = rig.operations.audit(2)
    assert "deletion" not in audited.detail


def test_nothing_else_is_committed_before_there_is_a_receipt(rig: ShardRig) -> None:
    run = rig.faults.run

    def refuse(step: str, action: Callable[[], object]) -> object:
        if step.startswith("put_if_absent receipts"):
            raise UnavailableError("the storage fails")
        return run(step, action)

    rig.faults.run = refuse  # type: ignore[method-assign,assignment]  # a fault of its own
    for _ in range(2):
        with pytest.raises(UnavailableError):
            delete(rig)
    with pytest.raises(UnavailableError):
        rig.operations.apply(asked("w"), [Withhold(topic=OTHER)])
    assert rig.log.last == 1
    report = verify_audit(rig.objects).found
    assert [finding.kind for finding in report.findings] == [FindingKind.RECEIPT_PENDING]
    rig.faults.run = run  # type: ignore[method-assign]
    rig.operations.apply(asked("w"), [Withhold(topic=OTHER)])
    assert rig.log.last == 2
    check_verified(rig, 1)


def test_a_shard_that_does_not_come_back_holds_up_the_others_with_a_word(rig: ShardRig) -> None:
    run = rig.faults.run

    def away(step: str, action: Callable[[], object]) -> object:
        if step == "recycle shard-1":
            raise UnavailableError("shard-1 is down and being started again; retry")
        return run(step, action)

    rig.faults.run = away  # type: ignore[method-assign,assignment]  # a fault of its own
    with pytest.raises(UnavailableError) as caught:
        delete(rig)
    assert "revision 1 is committed" in caught.value.message
    assert "shard-1 is down" in caught.value.message
    for _ in range(2):
        # Of a partition that has nothing to do with it.
        with pytest.raises(UnavailableError, match="nothing was changed") as caught:
            rig.operations.apply(asked("w"), [Withhold(topic=OTHER)])
        for word in ("deletion at revision 1", "shard-1 is down", "membank status"):
            assert word in caught.value.message
        assert caught.value.metadata["revision"] == "1"
        assert rig.coordinator.held_up == caught.value.message
    with pytest.raises(UnavailableError, match="deletion at revision 1"):
        rig.operations.export_topic(OTHER)
    rig.faults.run = run  # type: ignore[method-assign]
    rig.operations.apply(asked("w"), [Withhold(topic=OTHER)])
    assert rig.coordinator.held_up == ""
    check_verified(rig, 1)


def test_a_coordinator_with_another_key_makes_that_known_first(rig: ShardRig) -> None:
    run = rig.faults.run

    def refuse(step: str, action: Callable[[], object]) -> object:
        if step.startswith("put_if_absent receipts"):
            raise UnavailableError("the storage fails")
        return run(step, action)

    rig.faults.run = refuse  # type: ignore[method-assign,assignment]  # a fault of its own
    with pytest.raises(UnavailableError):
        delete(rig)
    rig.faults.run = run  # type: ignore[method-assign]
    rig.receipt_signer = Signer.generate()
    rig.start_coordinator()
    assert rig.log.committed.operation == KEY_OPERATION
    signed = decode_receipt(rig.operations.receipt(1), what="it")
    assert signed.signature.public_key == rig.receipt_signer.public_key
    assert len(rig.objects.list("keys")) == 2
    assert rig.objects.get(public_key_key(rig.receipt_signer.public_key.key_id))
    check_verified(rig, 1)
    # Once is enough.
    rig.start_coordinator()
    delete(rig, "r2", OTHER)
    assert rig.log.last == 3
    check_verified(rig, 2)


def test_what_is_damaged_can_be_deleted(rig: ShardRig) -> None:
    for shard in rig.shards.values():
        shard.consolidate()
    rig.kill_shards()
    rig.open_shards()
    (slot,) = rig.objects.root.glob("partitions/0001/level-1/weight/c.*")
    slot.write_bytes(b"\0" * slot.stat().st_size)
    block = read(delete(rig)).deletion.blocks[0]
    assert (block.num_slots, block.sha256) == (1, {})
    check_verified(rig, 1)


def test_a_swap_that_also_creates_anew_and_a_second_deletion_have_receipts_of_their_own(
    rig: ShardRig,
) -> None:
    delete(rig)
    weight = np.full(RIG_SPEC.block_shape(1), 2.0, np.float32)
    rig.operations.apply(asked("s"), [Swap(ref=TOPIC, weight=weight)])
    receipt = read(delete(rig, "r2"))
    assert [block.ref for block in receipt.deletion.blocks] == [TOPIC]
    assert (
        receipt.deletion.blocks[0].sha256["weight"] == hashlib.sha256(weight.tobytes()).hexdigest()
    )
    check_verified(rig, 2)


def test_a_coordinator_ends_before_the_receipt_where_another_is_started(rig: ShardRig) -> None:
    def end() -> None:
        raise Crash

    rig.end_coordinator = end
    rig.start_coordinator()
    with pytest.raises(Crash):
        delete(rig)
    assert rig.objects.list("receipts") == []
    # The next one does not end for it again.
    rig.start_coordinator()
    receipt = read(delete(rig))
    assert receipt.issuer.pid < receipt.deletion.coordinator.pid < 0
    check_verified(rig, 1)


def test_shards_that_live_on_are_said_to(tmp_path: Path) -> None:
    rig = ShardRig(tmp_path / "bank")
    receipt = read(delete(rig))
    assert receipt.recycling is Recycling.NONE
    (acknowledged,) = receipt.acknowledgements
    assert acknowledged.now == acknowledged.confirmed_by
    assert receipt.issuer == receipt.deletion.coordinator
    check_verified(rig, 1)
    rig.close()


def test_a_coordinator_without_a_key_deletes_without_receipts(rig: ShardRig) -> None:
    group = ShardGroup(rig.spec, rig)
    coordinator = Coordinator(
        rig.bank,
        group,
        log=rig.log,
        trees=TreeStore(rig.bank),
        config=CoordinatorConfig(lock_wait_s=0.0, commit_patience_s=0.0),
    )
    rig.operations._coordinator = coordinator  # as a program of an earlier version
    assert delete(rig) == b""
    report = verify_audit(rig.objects)
    assert [f.kind for f in report.found.findings] == [FindingKind.RECEIPT_NEVER_MADE]
    assert report.found.is_clean


class _Versioned(LocalObjects):
    """A directory that says, once it is told to, that it keeps versions."""

    is_versioned = False

    def keeps_versions(self, key: str) -> bool:
        return self.is_versioned


def test_a_storage_that_keeps_versions_since_deletes_nothing(tmp_path: Path) -> None:
    rig = ShardRig(tmp_path / "bank")
    rig.push(TOPIC, "u")
    versioned = _Versioned(rig.objects.root)
    rig.bank.objects = versioned
    versioned.is_versioned = True
    with pytest.raises(FailedPreconditionError, match="versioning") as caught:
        delete(rig)
    assert caught.value.reason is Reason.STORE_UNSUPPORTED
    assert rig.log.last == 0
    assert rig.weight(TOPIC) is not None
    versioned.is_versioned = False
    assert delete(rig)
    rig.close()


def test_a_storage_that_keeps_versions_from_the_commit_on_gets_no_receipt(tmp_path: Path) -> None:
    rig = ShardRig(tmp_path / "bank")
    versioned = _Versioned(rig.objects.root)
    rig.bank.objects = versioned
    destroy = rig.coordinator._trees.destroy_others

    def turn_on(revision: int) -> None:
        destroy(revision)
        versioned.is_versioned = True

    rig.coordinator._trees.destroy_others = turn_on  # type: ignore[method-assign]
    with pytest.raises(FailedPreconditionError, match="versioning"):
        delete(rig)
    assert rig.log.last == 1
    assert rig.objects.list("receipts") == []
    rig.close()


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "fsspec+"])
def test_a_bucket_whose_versioning_was_turned_on_since_deletes_nothing(
    s3_place: S3Place, prefix: str, tmp_path: Path
) -> None:
    if s3_place.prefix:
        pytest.skip("needs a bucket of its own, to change its settings")
    bank = Bank.create(f"{prefix}{s3_place.url}/bank", RIG_SPEC)
    config = ShardConfig(journal_dir=str(tmp_path), lease_s=0.0)
    shard = Shard.open(bank, config=config)
    member = ShardMember(shard_id="shard-0", partitions=tuple(range(4)), handle=shard)
    group, log, trees = ShardGroup(bank.spec, _Only(member)), RevisionLog(bank), TreeStore(bank)
    desk = ReceiptDesk(bank, group, log=log, signer=Signer.generate())
    coordinator = Coordinator(bank, group, log=log, trees=trees, receipts=desk)
    operations = BankOperations(bank, group, coordinator, log=log, trees=trees)
    assert operations.apply(asked("r1"), [Delete(topic=OTHER)]).receipt
    s3_place.server.client.put_bucket_versioning(
        Bucket=s3_place.bucket, VersioningConfiguration={"Status": "Enabled"}
    )
    with pytest.raises(FailedPreconditionError, match="versioning") as caught:
        operations.apply(asked("r2"), [Delete(topic=TOPIC)])
    assert caught.value.reason is Reason.STORE_UNSUPPORTED
    assert log.last == 1
    assert shard.fetch([TOPIC]).blocks[0].weight is not None
    shard.close(consolidate=False)


class _Only:
    """A `ShardDirectory` of one shard."""

    def __init__(self, member: ShardMember) -> None:
        self._member = member

    def members(self) -> tuple[ShardMember, ...]:
        return (self._member,)
