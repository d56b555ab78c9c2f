"""A bank's documents: created whole, opened with clear errors, decided once."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from membank.bank_service.store import Bank, Data
from membank.wire.errors import (
    AlreadyExistsError,
    ConflictError,
    CorruptionError,
    FailedPreconditionError,
    NotFoundError,
    Reason,
)
from membank.wire.format import Manifest, RevisionRecord, TreeDocument
from membank.wire.records import Snapshot
from membank.wire.spec import BlockRef
from storage_faults import Interleaved
from tiny_bank import UnsyncedObjects, create_bank, file_bytes, tiny_spec


def _record(revision: int, **fields: object) -> RevisionRecord:
    record = RevisionRecord(
        revision=revision,
        committed=True,
        nonce="",
        previous_sha256="",
        operation="swap",
        principal="ada",
        request_id="r",
        time_s=1.0,
    )
    return dataclasses.replace(record, **fields)  # type: ignore[arg-type]


def test_create_and_open(tmp_path: Path) -> None:
    tree = TreeDocument(labels={BlockRef(1, 0): "metals"})
    bank = Bank.create(str(tmp_path), tiny_spec(), tree=tree, principal="ada")
    again = Bank.open(str(tmp_path))
    assert again.spec == bank.spec
    assert again.spec.bank_id
    assert again.latest_commit().principal == "ada"
    found = again.read_tree(0)
    assert found is not None
    assert found.labels == tree.labels


class _Crash(BaseException):
    """The one who creates a bank dies here."""


class _Meeting(UnsyncedObjects):
    """Lets something else happen just before an object under a prefix is written, once."""

    def __init__(self, root: Path, prefix: str, meanwhile: Callable[[], object]) -> None:
        super().__init__(root)
        self._begins = prefix
        self._meanwhile: list[Callable[[], object]] = [meanwhile]

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._meet(key)
        super().put(key, data, durable=durable)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._meet(key)
        super().put_if_absent(key, data, durable=durable)

    def _meet(self, key: str) -> None:
        if key.startswith(self._begins) and self._meanwhile:
            self._meanwhile.pop()()


def _create(objects: UnsyncedObjects, name: str, *, labelled: bool = True) -> None:
    tree = TreeDocument(labels={BlockRef(1, 0): name}) if labelled else None
    Bank.create(objects, tiny_spec(), tree=tree, principal=name)


def _creator(root: Path) -> tuple[str, str | None]:
    """Return who made a bank, and who made its tree."""
    bank = Bank.open(str(root))
    tree = bank.read_tree(0)
    return bank.require_record(0).principal, None if tree is None else tree.labels[BlockRef(1, 0)]


@pytest.mark.parametrize("prefix", ["revisions", "trees", "bank.json"])
def test_of_two_creations_at_once_the_one_that_loses_leaves_nothing(
    tmp_path: Path, prefix: str
) -> None:
    winner = UnsyncedObjects(tmp_path)
    loser = _Meeting(tmp_path, prefix, lambda: _create(winner, "winner"))
    with pytest.raises(AlreadyExistsError) as caught:
        _create(loser, "loser")
    assert caught.value.reason is Reason.BANK_EXISTS
    assert _creator(tmp_path) == ("winner", "winner")


@pytest.mark.parametrize("labelled", [True, False])
def test_what_another_creation_replaces_before_it_loses_is_put_right(
    tmp_path: Path, *, labelled: bool
) -> None:
    def die() -> None:
        raise _Crash

    def meanwhile() -> None:
        with pytest.raises(_Crash):
            _create(_Meeting(tmp_path, "bank.json", die), "loser")

    _create(_Meeting(tmp_path, "bank.json", meanwhile), "winner", labelled=labelled)
    assert _creator(tmp_path) == ("winner", "winner" if labelled else None)


def test_what_a_creation_replaced_before_it_lost_is_put_back(tmp_path: Path) -> None:
    winner, loser = Interleaved(UnsyncedObjects(tmp_path)), Interleaved(UnsyncedObjects(tmp_path))
    looked, may_go = threading.Event(), threading.Event()

    def wait() -> None:
        looked.set()
        assert may_go.wait(30)

    def lose() -> None:
        # It has seen that there is no bank, and is about to take the record there for leftovers.
        loser.before("put", "revisions/", wait)
        with pytest.raises(AlreadyExistsError):
            Bank.create(loser, tiny_spec(), principal="loser")

    losing = threading.Thread(target=lose)

    def let_it_look() -> None:
        losing.start()
        assert looked.wait(30)

    winner.before("put_if_absent", "bank.json", let_it_look)
    Bank.create(winner, tiny_spec(), principal="winner")
    may_go.set()
    losing.join()
    assert _creator(tmp_path)[0] == "winner"


def test_create_leaves_an_existing_bank_alone(tmp_path: Path) -> None:
    create_bank(tmp_path)
    before = file_bytes(tmp_path)
    with pytest.raises(AlreadyExistsError) as caught:
        create_bank(tmp_path)
    assert caught.value.reason is Reason.BANK_EXISTS
    assert file_bytes(tmp_path) == before


@pytest.mark.parametrize("present", [False, True])
def test_not_a_bank(tmp_path: Path, present: bool) -> None:
    place = tmp_path / "place"
    if present:
        place.mkdir()
        (place / "other.txt").write_text("x")
    with pytest.raises(NotFoundError) as caught:
        Bank.open(str(place))
    assert caught.value.reason is Reason.NOT_A_BANK
    assert place.exists() == present


def test_a_creation_that_was_cut_short_is_no_bank_and_is_repeated(tmp_path: Path) -> None:
    create_bank(tmp_path)
    (tmp_path / "bank.json").unlink()
    with pytest.raises(NotFoundError):
        Bank.open(str(tmp_path))
    create_bank(tmp_path)
    assert Bank.open(str(tmp_path)).latest_number() == 0


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    create_bank(tmp_path)
    path = tmp_path / "bank.json"
    path.write_bytes(path.read_bytes().replace(b'"format": 1', b'"format": 3'))
    with pytest.raises(FailedPreconditionError) as caught:
        Bank.open(str(tmp_path))
    assert caught.value.reason is Reason.FORMAT_TOO_NEW


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b'{"format": 1, "spec": {}}'])
def test_a_damaged_spec_is_refused(tmp_path: Path, data: bytes) -> None:
    create_bank(tmp_path)
    (tmp_path / "bank.json").write_bytes(data)
    with pytest.raises(CorruptionError) as caught:
        Bank.open(str(tmp_path))
    assert caught.value.reason is Reason.SPEC_CORRUPT


def test_a_missing_first_revision_is_corruption(tmp_path: Path) -> None:
    create_bank(tmp_path)
    (tmp_path / "revisions" / "0000000000.json").unlink()
    with pytest.raises(CorruptionError, match=r"revisions/0000000000\.json"):
        Bank.open(str(tmp_path))


def test_a_revision_is_decided_once(tmp_path: Path) -> None:
    bank, other = create_bank(tmp_path), Bank.open(str(tmp_path))
    mine = bank.decide(_record(1, principal="ada"))
    with pytest.raises(ConflictError) as caught:
        other.decide(_record(1, principal="bob"))
    assert caught.value.reason is Reason.TRANSACTION_CONFLICT
    assert other.record(1) == mine


def test_one_of_many_coordinators_decides(tmp_path: Path) -> None:
    create_bank(tmp_path)
    barrier = threading.Barrier(4)
    winners: list[str] = []

    def decide(name: str) -> None:
        bank = Bank.open(str(tmp_path))
        barrier.wait()
        try:
            bank.decide(_record(1, principal=name))
        except ConflictError:
            return
        winners.append(name)

    threads = [threading.Thread(target=decide, args=(f"c{i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    record = Bank.open(str(tmp_path)).record(1)
    assert record is not None
    assert winners == [record.principal]


def test_revisions_have_no_gaps(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    with pytest.raises(FailedPreconditionError):
        bank.decide(_record(2))


def test_records_form_a_chain(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    first, second = bank.decide(_record(1)), bank.decide(_record(2))
    assert first.previous_sha256 != second.previous_sha256
    assert len(second.previous_sha256) == 64


def test_aborted_revisions_are_passed_over(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    bank.decide(_record(1, manifests={0: 4}))
    bank.decide(_record(2, committed=False, manifests={0: 9, 1: 9}))
    assert bank.latest_number() == 2
    assert bank.latest_commit().revision == 1
    assert bank.named_manifest(2, 0) == 4
    assert bank.named_manifest(2, 1) == 0


def test_snapshots(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    snapshot = Snapshot(name="before", revision=0, create_time_s=1.5)
    bank.create_snapshot(snapshot)
    bank.create_snapshot(snapshot)  # a retry
    assert Bank.open(str(tmp_path)).snapshots() == [snapshot]
    with pytest.raises(AlreadyExistsError) as caught:
        bank.create_snapshot(dataclasses.replace(snapshot, revision=1))
    assert caught.value.reason is Reason.SNAPSHOT_EXISTS
    bank.delete_snapshot("before")
    assert bank.snapshots() == []
    with pytest.raises(NotFoundError) as missing:
        bank.snapshot("before")
    assert missing.value.reason is Reason.UNKNOWN_SNAPSHOT


def test_a_manifest_under_anothers_name_is_corruption(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    bank.publish_manifest(
        Manifest(partition=0, number=1, revision=0, epoch=1, nonce="n", lsn=0, entries={})
    )
    folder = tmp_path / "partitions" / "0000" / "manifests"
    (folder / "0000000001").rename(folder / "0000000002")
    with pytest.raises(CorruptionError) as caught:
        bank.read_manifest(0, 2)
    assert caught.value.reason is Reason.MANIFEST_CORRUPT
