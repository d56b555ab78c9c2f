"""A journal of objects keeps older owners out, and knows what it holds when answers are lost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from journal_rigs import IDENTITY, PARTITION, MemoryObjects, ObjectRig, append, payloads_of
from membank.bank_service.store import Data
from membank.bank_service.store.journal import (
    FrameKind,
    ObjectJournal,
    Ownership,
    SegmentHead,
    scan,
)
from membank.bank_service.store.journal.frames import encode_batch, encode_head
from membank.wire.errors import (
    AlreadyExistsError,
    CorruptionError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format.layout import log_key
from storage_faults import Outage


class _Bucket:
    """A store that can be cut off, and the journals on it."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.objects = MemoryObjects(self.content)
        self.rig = ObjectRig(lambda: self.objects)

    def start(self, store: Outage | MemoryObjects | None = None) -> ObjectJournal:
        """Begin the next owner, over `store`."""
        journal = ObjectJournal.open(store or self.objects, PARTITION, IDENTITY)
        owner = self.rig.next_owner()
        journal.begin(owner, 0)
        self.rig.publish(owner)
        return journal

    def start_behind_outage(self) -> tuple[ObjectJournal, Outage]:
        outage = Outage(self.objects)
        return self.start(outage), outage

    def payloads(self) -> list[bytes]:
        return payloads_of(self.rig.open())

    def numbers(self) -> list[int]:
        keys = self.rig.keys()
        return [int(key.rsplit("/", 1)[1]) for key in keys]


@pytest.fixture
def bucket() -> _Bucket:
    return _Bucket()


def test_one_batch_is_one_object(bucket: _Bucket) -> None:
    journal = bucket.start()
    append(journal, b"one", b"two")
    append(journal, b"three")
    assert bucket.rig.keys() == [f"partitions/0003/log/{number:010d}" for number in (1, 2, 3)]
    found = [scan(key, data) for key, data in sorted(bucket.content.items())]
    assert [segment.last for segment in found] == [0, 2, 3]


def test_opening_changes_nothing(bucket: _Bucket) -> None:
    append(bucket.start(), b"one")
    before = dict(bucket.content)
    bucket.rig.open()
    assert bucket.content == before


def test_an_owner_that_slept_while_the_log_was_trimmed_is_kept_out(bucket: _Bucket) -> None:
    old = bucket.start()
    append(old, b"one")
    new = bucket.start()
    for number in range(5):
        append(new, f"new {number}".encode())
        new.trim(new.last_lsn)
    with pytest.raises(UnavailableError) as caught:
        append(old, b"lost")
    assert caught.value.reason is Reason.FENCED
    assert append(new, b"last") == 7
    assert bucket.payloads() == [b"last"]


def test_an_owner_that_slept_may_not_trim_either(bucket: _Bucket) -> None:
    old = bucket.start()
    append(old, b"one")
    append(bucket.start(), b"two")
    with pytest.raises(UnavailableError) as caught:
        old.trim(1)
    assert caught.value.reason is Reason.FENCED
    assert bucket.payloads() == [b"one", b"two"]


def test_fences_do_not_pile_up(bucket: _Bucket) -> None:
    for _ in range(50):
        journal = bucket.start()
        journal.trim(append(journal, b"x"))
    assert len(bucket.content) <= 20
    assert bucket.rig.open().last_lsn == 50


def test_a_batch_that_did_not_arrive_is_not_in_the_log(bucket: _Bucket) -> None:
    journal, outage = bucket.start_behind_outage()
    append(journal, b"one")
    outage.is_down = True
    for _ in range(3):
        with pytest.raises(UnavailableError):
            append(journal, b"lost")
    outage.is_down = False
    assert append(journal, b"two") == 2
    assert payloads_of(journal) == bucket.payloads() == [b"one", b"two"]


def test_a_request_that_was_given_up_cannot_arrive_later(bucket: _Bucket) -> None:
    journal, outage = bucket.start_behind_outage()
    outage.is_down = True
    with pytest.raises(UnavailableError):
        append(journal, b"lost")
    outage.is_down = False
    append(journal, b"one")
    journal.trim(1)
    with pytest.raises(AlreadyExistsError):
        bucket.objects.put_if_absent(log_key(PARTITION, 2), b"the request that was given up")


def test_a_batch_that_arrived_without_an_answer_seals_the_journal(bucket: _Bucket) -> None:
    journal, outage = bucket.start_behind_outage()
    append(journal, b"one")
    outage.is_down = outage.delivers = True
    with pytest.raises(UnavailableError):
        append(journal, b"two", b"three")
    outage.is_down = False
    for _ in range(2):
        with pytest.raises(UnavailableError, match="reported as failed"):
            append(journal, b"four")
    assert bucket.payloads() == [b"one", b"two", b"three"]


def test_who_settles_learns_of_a_batch_that_arrived(bucket: _Bucket) -> None:
    journal, outage = bucket.start_behind_outage()
    outage.is_down = outage.delivers = True
    with pytest.raises(UnavailableError):
        append(journal, b"one", b"two")
    assert journal.last_lsn == 0
    outage.is_down = False
    journal.settle()
    assert journal.last_lsn == 2
    assert append(journal, b"three") == 3
    assert bucket.payloads() == [b"one", b"two", b"three"]


def test_an_outage_over_which_another_owner_came(bucket: _Bucket) -> None:
    journal, outage = bucket.start_behind_outage()
    append(journal, b"one")
    outage.is_down = True
    with pytest.raises(UnavailableError):
        append(journal, b"lost")
    new = bucket.start()
    outage.is_down = False
    with pytest.raises(UnavailableError) as caught:
        append(journal, b"lost")
    assert caught.value.reason is Reason.FENCED
    append(new, b"two")
    assert bucket.payloads() == [b"one", b"two"]


def test_an_outage_over_which_another_owner_came_and_trimmed(bucket: _Bucket) -> None:
    # The batch arrived and was removed with the rest, so its number is free again.
    journal, outage = bucket.start_behind_outage()
    outage.is_down = outage.delivers = True
    with pytest.raises(UnavailableError):
        append(journal, b"one")
    new = bucket.start()
    append(new, b"two")
    new.trim(2)
    outage.is_down = False
    with pytest.raises(UnavailableError) as caught:
        append(journal, b"lost")
    assert caught.value.reason is Reason.FENCED
    append(new, b"three")
    assert bucket.payloads() == [b"three"]


def test_a_fence_that_fills_the_gap_of_what_was_trimmed(bucket: _Bucket) -> None:
    journal, outage = bucket.start_behind_outage()
    outage.is_down = outage.delivers = True
    with pytest.raises(UnavailableError):
        append(journal, b"one")
    new = bucket.start()
    append(new, b"two")
    new.trim(1)
    outage.is_down = False
    with pytest.raises(UnavailableError):
        append(journal, b"lost")
    assert bucket.numbers() == [1, 2, 3, 4]
    again = bucket.rig.open()
    assert (again.base, payloads_of(again)) == (1, [b"two"])


def test_a_repeated_request_that_outlived_its_batch_is_harmless(bucket: _Bucket) -> None:
    journal = bucket.start()
    append(journal, b"one")
    batch = bucket.content[log_key(PARTITION, 2)]
    new = bucket.start()
    append(new, b"two", b"three")
    new.trim(3)
    assert 2 not in bucket.numbers()
    bucket.objects.put_if_absent(log_key(PARTITION, 2), batch)
    append(new, b"four")
    assert bucket.payloads() == [b"four"]
    bucket.start()
    assert 2 not in bucket.numbers()


@pytest.mark.parametrize("delivers", [False, True])
def test_an_outage_while_trimming(bucket: _Bucket, delivers: bool) -> None:
    journal, outage = bucket.start_behind_outage()
    append(journal, b"one")
    outage.is_down, outage.delivers = True, delivers
    with pytest.raises(UnavailableError):
        journal.trim(1)
    outage.is_down = False
    assert append(journal, b"two") == 2
    journal.trim(1)
    assert bucket.payloads() == [b"two"]


@pytest.mark.parametrize("delivers", [False, True])
def test_an_outage_while_beginning(bucket: _Bucket, delivers: bool) -> None:
    append(bucket.start(), b"one")
    outage = Outage(bucket.objects)
    outage.delivers = delivers
    journal = ObjectJournal.open(outage, PARTITION, IDENTITY)
    outage.is_down = True
    with pytest.raises(UnavailableError):
        journal.begin(bucket.rig.next_owner(), 0)
    with pytest.raises(UnavailableError, match="not begun"):
        append(journal, b"x")
    outage.is_down = False
    journal.begin(bucket.rig.next_owner(), 0)
    assert append(journal, b"two") == 2
    assert bucket.payloads() == [b"one", b"two"]


def test_what_an_older_owner_slipped_in_is_part_of_the_log(bucket: _Bucket) -> None:
    old = bucket.start()
    new = bucket.rig.open()
    append(old, b"one")
    append(old, b"two")
    new.begin(bucket.rig.next_owner(), 0)
    assert payloads_of(new) == [b"one", b"two"]
    assert append(new, b"three") == 3
    with pytest.raises(UnavailableError):
        append(old, b"lost")


def test_what_an_older_owner_slipped_in_after_all_was_discarded_is_discarded(
    bucket: _Bucket,
) -> None:
    old = bucket.start()
    append(old, b"one")
    new = bucket.rig.open()
    new.discard()
    append(old, b"two")
    new.begin(bucket.rig.next_owner(), 0)
    assert append(new, b"new") == 1
    assert bucket.payloads() == [b"new"]


class _Interfering(MemoryObjects):
    """Somebody else does something before every create-only put, or every read."""

    def __init__(self, content: dict[str, bytes]) -> None:
        super().__init__(content)
        self.before_put: Callable[[], object] = lambda: None
        self.before_get: Callable[[], object] = lambda: None

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self.before_put()
        super().put_if_absent(key, data, durable=durable)

    def get(self, key: str) -> bytes:
        self.before_get()
        return super().get(key)


def test_an_owner_that_never_stops_is_not_waited_for(bucket: _Bucket) -> None:
    old = bucket.start()
    store = _Interfering(bucket.content)
    new = ObjectJournal.open(store, PARTITION, IDENTITY)
    store.before_put = lambda: append(old, b"x")
    with pytest.raises(UnavailableError) as caught:
        new.begin(bucket.rig.next_owner(), 0)
    assert caught.value.reason is Reason.BANK_IN_USE
    append(old, b"goes on")


def test_an_owner_that_stops_in_time_is_overtaken(bucket: _Bucket) -> None:
    old = bucket.start()
    store = _Interfering(bucket.content)
    new = ObjectJournal.open(store, PARTITION, IDENTITY)
    left = iter([b"1", b"2", b"3"])
    store.before_put = lambda: [append(old, payload) for payload in [next(left, b"")] if payload]
    new.begin(bucket.rig.next_owner(), 0)
    assert payloads_of(new) == [b"1", b"2", b"3"]


def test_opening_beside_an_owner_that_trims(bucket: _Bucket) -> None:
    owner = bucket.start()
    append(owner, b"one")
    append(owner, b"two")
    store = _Interfering(bucket.content)
    times = iter([2])
    store.before_get = lambda: owner.trim(next(times, 0))
    assert ObjectJournal.open(store, PARTITION, IDENTITY).base == 2


def test_an_object_that_is_listed_and_never_there(bucket: _Bucket) -> None:
    append(bucket.start(), b"one")

    class Lying(MemoryObjects):
        def get(self, key: str) -> bytes:
            if key.endswith("2"):
                raise NotFoundError(key, reason=Reason.OBJECT_MISSING)
            return super().get(key)

    with pytest.raises(NotFoundError):
        ObjectJournal.open(Lying(bucket.content), PARTITION, IDENTITY)


def test_numbers_may_outgrow_their_padding(bucket: _Bucket) -> None:
    owner = Ownership(1, "a", "")
    first = 9_999_999_999
    for number in (first, first + 1):
        base = number - first
        head = SegmentHead(IDENTITY, owner, base, base, number=number, last=base + 1)
        data = encode_batch(FrameKind.UPDATE, base, [[str(number).encode()]])
        bucket.content[log_key(PARTITION, number)] = b"".join([encode_head(head), *data])
    assert bucket.payloads() == [b"9999999999", b"10000000000"]
    assert append(bucket.start(), b"next") == 3


@pytest.mark.parametrize("name", ["x", "0000000001.bak", "1", "0000000000", "a/0000000001"])
def test_an_object_with_a_strange_name_is_told(bucket: _Bucket, name: str) -> None:
    bucket.start()
    bucket.content[f"partitions/0003/log/{name}"] = b""
    with pytest.raises(CorruptionError, match="not that of a log object") as caught:
        bucket.rig.open()
    assert caught.value.metadata["file"].endswith(name)


def test_a_missing_object_is_named(bucket: _Bucket) -> None:
    journal = bucket.start()
    for payload in (b"one", b"two", b"three"):
        append(journal, payload)
    del bucket.content[log_key(PARTITION, 3)]
    with pytest.raises(CorruptionError, match="missing between objects 2 and 4") as caught:
        bucket.rig.open()
    assert caught.value.metadata["file"] == f"dict://bank/{log_key(PARTITION, 3)}"


def test_an_object_that_changed_after_the_opening(bucket: _Bucket) -> None:
    append(bucket.start(), b"one")
    journal = bucket.rig.open()
    key = log_key(PARTITION, 2)
    bucket.content[key] = bucket.content[key][:-1]
    with pytest.raises(CorruptionError, match="changed its size"):
        payloads_of(journal)


def test_more_objects_than_are_read_ahead(bucket: _Bucket) -> None:
    journal = bucket.start()
    payloads = [str(number).encode() for number in range(30)]
    for payload in payloads:
        append(journal, payload)
    assert bucket.payloads() == payloads
