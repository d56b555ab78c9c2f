"""Records of revisions: read ahead along the chain, once for all, and remembered within bounds."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from membank.bank_service.knowledge import RevisionLog
from membank.bank_service.store import Bank
from membank.wire.errors import CorruptionError
from membank.wire.format import RevisionRecord
from membank.wire.format.layout import number_of, revision_key
from tiny_bank import UnsyncedObjects, create_bank

WAIT_S = 20.0
NUM_RECORDS = 60


class _Reads(UnsyncedObjects):
    """Counts the records that are read; those of `together` wait for one another."""

    def __init__(self, root: Path, together: Collection[int] = ()) -> None:
        super().__init__(root)
        self.records: Counter[int] = Counter()
        self._together = together
        self._barrier = threading.Barrier(max(len(together), 1))

    def get(self, key: str) -> bytes:
        if key.startswith("revisions/"):
            revision = number_of(key)
            self.records[revision] += 1
            if revision in self._together:
                self._barrier.wait(WAIT_S)
        return super().get(key)


def _decide(bank: Bank, revision: int, *, detail: str = "") -> None:
    bank.decide(
        RevisionRecord(
            revision=revision,
            committed=revision % 3 != 0,
            nonce="",
            previous_sha256="",
            operation="test",
            principal="tester",
            request_id=f"r{revision}",
            time_s=float(revision),
            manifests={0: revision},
            detail={"text": detail},
        )
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    bank = create_bank(tmp_path)
    for revision in range(1, NUM_RECORDS + 1):
        _decide(bank, revision)
    return tmp_path


def test_what_a_walk_comes_to_is_read_side_by_side(root: Path) -> None:
    # The first is read alone, as most walks end there; then come two, and four.
    ahead = [NUM_RECORDS - 3, NUM_RECORDS - 4, NUM_RECORDS - 5, NUM_RECORDS - 6]
    objects = _Reads(root, ahead)
    assert Bank.open(objects).named_manifest(NUM_RECORDS, 1) == 0
    assert objects.records.total() == NUM_RECORDS + 1


def test_walks_along_the_same_chain_share_the_reading(root: Path) -> None:
    objects = _Reads(root)
    bank = Bank.open(objects)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda partition: bank.named_manifest(60, partition), range(1, 5)))
    assert found == [0, 0, 0, 0]
    # But for the first one, which each may read for itself.
    assert objects.records.total() <= NUM_RECORDS + 4


def test_a_walk_reads_little_where_it_ends_early(root: Path) -> None:
    objects = _Reads(root)
    bank = Bank.open(objects)
    assert bank.named_manifest(60, 0) == 59
    assert bank.named_manifest(60, 1, since=50) == 0
    assert min(objects.records) == 50
    assert bank.latest_commit().revision == 59


def test_a_record_that_is_missing_ends_a_walk(root: Path) -> None:
    (root / revision_key(40)).unlink()
    with pytest.raises(CorruptionError, match="0000000040"):
        Bank.open(UnsyncedObjects(root)).named_manifest(60, 1)


def test_the_log_is_read_ahead_and_knows_requests_without_their_records(root: Path) -> None:
    objects = _Reads(root, [3, 4, 5, 6])
    log = RevisionLog(Bank.open(objects))
    assert (log.last, log.committed.revision) == (60, 59)
    found = log.find("r4")
    assert found is not None
    assert found.detail == {"text": ""}
    assert log.find("r3") is None


def test_large_records_are_not_kept_but_what_they_did_is(tmp_path: Path) -> None:
    bank = create_bank(tmp_path)
    for revision in range(1, 7):
        _decide(bank, revision, detail="x" * 3_000_000)
    objects = _Reads(tmp_path)
    bank = Bank.open(objects)
    for revision in [*range(1, 7), 6]:
        record = bank.record(revision)
        assert record is not None
        assert len(str(record.detail["text"])) == 3_000_000
    assert objects.records == Counter(range(1, 7))
    outline = bank.outline(1)
    assert outline is not None
    assert (outline.committed, outline.manifests, outline.detail) == (True, {0: 1}, {})
    assert objects.records[1] == 1
    assert bank.record(1) is not None
    assert objects.records[1] == 2
