"""What every journal must do, whatever it is written to."""

from __future__ import annotations

import itertools
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import fsspec
import pytest

from journal_rigs import (
    JournalRig,
    LocalRig,
    MemoryObjects,
    ObjectRig,
    ShippedRig,
    Story,
    append,
    numbered,
    payloads_of,
)
from membank.bank_service.store import FsspecObjects, LocalObjects, open_objects
from membank.bank_service.store.journal import FrameKind
from membank.wire.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    Reason,
    UnavailableError,
)
from s3_server import S3Place
from storage_faults import Crash, FaultPlan, StorageFault

PAYLOADS = [b"first", b"", b"\0" * 40, bytes(range(256)) * 2, b"last"]
KINDS = [
    "local",
    "local-sync",
    "objects",
    "objects-memory",
    pytest.param("objects-s3", marks=pytest.mark.s3),
    "shipped",
    pytest.param("shipped-s3", marks=pytest.mark.s3),
]


@pytest.fixture(params=KINDS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JournalRig]:
    kind: str = request.param
    if kind == "objects-memory":
        name = uuid.uuid4().hex
        fsspec.filesystem("memory").pipe_file(f"/{name}/present", b"")
        yield ObjectRig(lambda: FsspecObjects(f"memory://{name}"))
        fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
        return
    if kind.endswith("s3"):
        store = open_objects(f"{request.getfixturevalue('s3_place').url}/bank")
        make_store = lambda: store  # noqa: E731  # a connection is made once
    else:
        make_store = lambda: LocalObjects(tmp_path / "bank")  # noqa: E731
    match kind.removesuffix("-s3"):
        case "local" | "local-sync":
            yield LocalRig(tmp_path / "journal", sync=kind == "local-sync")
        case "objects":
            yield ObjectRig(make_store)
        case "shipped":
            yield ShippedRig(tmp_path / "journal", make_store)


@pytest.fixture(params=[False, True], ids=["", "kept"])
def is_kept(request: pytest.FixtureRequest) -> bool:
    """Whether housekeeping runs between the steps."""
    return bool(request.param)


def test_an_empty_journal(rig: JournalRig) -> None:
    journal = rig.open()
    assert (journal.last_lsn, journal.base, journal.num_bytes, journal.ownership) == (0, 0, 0, None)
    assert payloads_of(journal) == []


def test_replay_returns_what_was_appended(rig: JournalRig, is_kept: bool) -> None:
    journal = rig.start()
    for number, payload in enumerate(PAYLOADS, 1):
        assert append(journal, payload) == number
        if is_kept:
            rig.housekeep(journal)
    owner = journal.ownership
    size = journal.num_bytes
    journal.close()
    again = rig.open()
    assert payloads_of(again) == PAYLOADS
    assert payloads_of(again, 3) == PAYLOADS[3:]
    assert (again.last_lsn, again.ownership) == (5, owner)
    assert again.num_bytes >= size


def test_a_batch_has_consecutive_numbers(rig: JournalRig) -> None:
    journal = rig.start()
    assert append(journal, *PAYLOADS) == 5
    assert append(journal) == 5
    assert append(journal, b"x", b"y") == 7
    assert payloads_of(journal) == [*PAYLOADS, b"x", b"y"]
    journal.close()
    assert payloads_of(rig.open(), 4) == [b"last", b"x", b"y"]


def test_images_and_updates_keep_their_kind(rig: JournalRig, is_kept: bool) -> None:
    journal = rig.start()
    kinds = [FrameKind.IMAGE, FrameKind.UPDATE, FrameKind.UPDATE, FrameKind.IMAGE]
    for kind in kinds:
        journal.append(kind, [[b"content"]])
    if is_kept:
        rig.housekeep(journal)
    assert [frame.kind for frame in journal.replay(0)] == kinds
    journal.close()
    assert [frame.kind for frame in rig.open().replay(0)] == kinds


@pytest.mark.parametrize("kind", [FrameKind.SEGMENT, FrameKind.CONTINUED])
def test_frames_of_its_own_are_refused(rig: JournalRig, kind: FrameKind) -> None:
    journal = rig.start()
    with pytest.raises(InvalidArgumentError, match=kind.name):
        journal.append(kind, [[b"x"]])
    assert append(journal, b"x") == 1


def test_a_new_owner_continues(rig: JournalRig, is_kept: bool) -> None:
    for life in range(4):
        journal = rig.start()
        assert payloads_of(journal) == PAYLOADS[:life]
        assert append(journal, PAYLOADS[life]) == life + 1
        if is_kept:
            rig.housekeep(journal)
        assert journal.ownership == rig.manifest
        journal.close()


def test_an_owner_that_appends_nothing_leaves_no_trace_in_the_frames(rig: JournalRig) -> None:
    append(rig.start(), b"one")
    for _ in range(40):
        rig.start().close()
    journal = rig.start()
    assert payloads_of(journal) == [b"one"]
    assert append(journal, b"two") == 2


def test_erase_leaves_no_byte_of_what_was_trimmed(rig: JournalRig, is_kept: bool) -> None:
    journal = rig.start()
    append(journal, b"marker one", b"marker two")
    append(journal, b"marker three")
    if is_kept:
        rig.housekeep(journal)
    journal.trim(3)
    journal.erase()
    assert b"marker" not in rig.stored()
    assert (payloads_of(journal), journal.last_lsn, journal.base) == ([], 3, 3)
    assert append(journal, b"next") == 4
    journal.close()
    again = rig.open()
    assert (payloads_of(again), again.last_lsn, again.base) == ([b"next"], 4, 3)


def test_erase_leaves_no_byte_behind_later_frames(rig: JournalRig, is_kept: bool) -> None:
    journal = rig.start()
    later: list[bytes] = []
    for start in range(0, 24, 8):
        later = [b"marker" * 20, *[f"later {start}".encode()] * 7]
        for payload in later:
            append(journal, payload)
            if is_kept:
                rig.housekeep(journal)
        journal.trim(start + 1)
    journal.erase()
    assert b"marker" not in rig.stored()
    assert append(journal, b"next") == 25
    assert payloads_of(journal, 17) == [*later[1:], b"next"]
    journal.close()
    assert payloads_of(rig.open(), 17) == [*later[1:], b"next"]


def test_erase_runs_at_any_time(rig: JournalRig) -> None:
    journal = rig.open()
    journal.erase()
    journal.begin(rig.next_owner(), 0)
    journal.erase()
    for number in range(6):
        append(journal, b"x" * 300)
        journal.trim(number)
        journal.erase()
    assert payloads_of(journal, 5) == [b"x" * 300]
    journal.close()
    journal.erase()
    assert payloads_of(rig.open(), 5) == [b"x" * 300]


def test_trim_keeps_what_is_later(rig: JournalRig, is_kept: bool) -> None:
    journal = rig.start()
    payloads = list(numbered(range(60)))
    for payload in payloads:
        append(journal, payload)
        if is_kept:
            rig.housekeep(journal)
    size, trimmed = journal.num_bytes, 0
    for lsn in (0, 7, 6, 30, 59):
        journal.trim(lsn)
        trimmed = max(trimmed, lsn)
        assert payloads_of(journal, trimmed) == payloads[trimmed:]
        assert journal.base <= trimmed
    assert journal.num_bytes < size
    journal.close()
    assert payloads_of(rig.open(), 59) == payloads[59:]


def test_begin_removes_what_a_manifest_contains(rig: JournalRig, is_kept: bool) -> None:
    journal = rig.start()
    append(journal, b"marker")
    if is_kept:
        rig.housekeep(journal)
    journal.close()
    again = rig.start(after_lsn=1)
    assert b"marker" not in rig.stored()
    assert append(again, b"more") == 2


def test_a_log_behind_the_manifest_is_replaced(rig: JournalRig, is_kept: bool) -> None:
    journal = rig.start()
    append(journal, *PAYLOADS)
    if is_kept:
        rig.housekeep(journal)
    journal.close()
    again = rig.start(after_lsn=9)
    assert (again.base, again.last_lsn, payloads_of(again)) == (9, 9, [])
    assert append(again, b"x") == 10
    again.close()
    last = rig.open()
    assert (payloads_of(last, 9), last.base) == ([b"x"], 9)
    assert bytes(range(256)) not in rig.stored()


@pytest.mark.parametrize("after_lsn", [0, 2, 5, 9])
def test_what_was_discarded_does_not_come_back(
    rig: JournalRig, is_kept: bool, after_lsn: int
) -> None:
    journal = rig.start()
    append(journal, *[b"old"] * 5)
    if is_kept:
        rig.housekeep(journal)
    journal.close()
    again = rig.open()
    again.discard()
    assert (again.last_lsn, again.ownership, payloads_of(again)) == (0, None, [])
    owner = rig.next_owner()
    again.begin(owner, after_lsn)
    rig.publish(owner)
    assert append(again, b"new") == after_lsn + 1
    again.close()
    last = rig.open()
    assert (payloads_of(last), last.base) == ([b"new"], after_lsn)
    assert b"old" not in rig.stored()


def test_what_was_discarded_stays_until_it_is_replaced(rig: JournalRig) -> None:
    append(rig.start(), b"old")
    journal = rig.open()
    journal.discard()
    journal.trim(1)
    assert payloads_of(rig.open()) == [b"old"]


def test_it_must_be_begun_and_not_closed(rig: JournalRig) -> None:
    journal = rig.open()
    with pytest.raises(UnavailableError, match="not begun"):
        append(journal, b"x")
    with pytest.raises(UnavailableError, match="not begun"):
        journal.require_usable()
    journal.begin(rig.next_owner(), 0)
    journal.require_usable()
    journal.close()
    journal.close()
    with pytest.raises(UnavailableError, match="closed"):
        append(journal, b"x")


def test_that_of_another_partition_is_refused(rig: JournalRig) -> None:
    append(rig.start(), b"x")
    with pytest.raises(FailedPreconditionError, match="is the journal of bank/3"):
        rig.open(identity="bank/4")


def test_an_old_owner_is_kept_out(rig: JournalRig) -> None:
    if not rig.fences:
        pytest.skip("a lock keeps it out")
    old = rig.start()
    append(old, b"one")
    rig.housekeep(old)
    new = _elsewhere(rig).start()
    with suppress(UnavailableError):
        append(old, b"lost")
    with pytest.raises(UnavailableError) as caught:
        rig.housekeep(old)
    assert caught.value.reason is Reason.FENCED
    with pytest.raises(UnavailableError) as caught:
        append(old, b"lost")
    assert caught.value.reason is Reason.FENCED
    assert append(new, b"two") == 2
    assert payloads_of(new) == [b"one", b"two"]


def _elsewhere(rig: JournalRig) -> JournalRig:
    """Return the same journal as another machine sees it."""
    if not isinstance(rig, ShippedRig):
        return rig
    other = ShippedRig(rig.local.folder.with_name("elsewhere"), rig.remote.make_store)
    other.manifest, other.nonce = rig.manifest, rig.nonce
    return other


def test_trim_runs_beside_append(rig: JournalRig) -> None:
    journal = rig.start()
    payloads = list(numbered(range(60)))
    is_done = threading.Event()
    problems: list[BaseException] = []

    def trim() -> None:
        try:
            while not is_done.is_set():
                rig.housekeep(journal)
                journal.trim(max(journal.last_lsn - 5, 0))
        except BaseException as err:
            problems.append(err)

    thread = threading.Thread(target=trim)
    thread.start()
    for payload in payloads:
        append(journal, payload)
    is_done.set()
    thread.join()
    assert problems == []
    assert payloads_of(journal, 55) == payloads[55:]
    journal.close()
    again = rig.open()
    assert payloads_of(again, 55) == payloads[55:]
    assert again.last_lsn == 60


@pytest.mark.parametrize("fault", [StorageFault.CRASH_BEFORE, StorageFault.CRASH_AFTER])
@pytest.mark.parametrize(
    ("after_lsn", "discards"), [(0, True), (2, True), (5, True), (9, True), (9, False)]
)
@pytest.mark.parametrize("kind", ["local", "objects"])
def test_a_log_that_is_replaced_is_the_old_one_or_the_new_one(
    kind: str, after_lsn: int, discards: bool, fault: StorageFault, tmp_path: Path
) -> None:
    seen = set()
    for at in itertools.count(1):
        rig = _fresh(kind, tmp_path / str(at))
        old = rig.start()
        payloads = list(numbered(range(5)))
        for payload in payloads:
            append(old, payload)
        old.close()
        plan = FaultPlan(fault, at)
        journal = rig.open(plan)
        if discards:
            journal.discard()
        owner = rig.next_owner()
        with suppress(Crash):
            journal.begin(owner, after_lsn)
        again = rig.open()
        is_new = again.ownership == owner
        seen.add(is_new)
        if is_new:
            # Before it frames may be left that end exactly there; who replays asks for later ones.
            assert payloads_of(again, after_lsn) == []
            assert again.last_lsn == after_lsn
        else:
            assert payloads_of(again) == payloads
        if not plan.happened:
            break
    assert seen == {False, True} or (seen, kind) == ({True}, "objects")


def _live(story: Story, plan: FaultPlan, *, first: int) -> None:
    """One life of an owner: batches of one to three updates, trims, housekeeping; then it dies."""
    journal = story.begin_life(plan)
    for step in range(8):
        with suppress(MembankError):
            story.append(journal, list(numbered(range(first, first + 1 + step % 3))))
        first += 3
        with suppress(MembankError):
            if step % 2:
                story.rig.housekeep(journal)
            if step % 3 == 2:
                story.trim(journal, max(journal.last_lsn - step % 2, story.trimmed))


@pytest.mark.slow
@pytest.mark.parametrize("fault", StorageFault)
@pytest.mark.parametrize("kind", ["local", "local-sync", "objects", "shipped"])
def test_a_fault_at_every_call(kind: str, fault: StorageFault, tmp_path: Path) -> None:
    at = 0
    while True:
        at += 1
        rig = _fresh(kind, tmp_path / str(at))
        story = Story(rig)
        _live(story, FaultPlan(), first=0)
        plan = FaultPlan(fault, at)
        with suppress(Crash, MembankError):
            _live(story, plan, first=100)
        _live(story, FaultPlan(), first=200)
        story.begin_life()
        if not plan.happened:
            break
    assert at > 10


@pytest.mark.s3
@pytest.mark.slow
@pytest.mark.parametrize("fault", StorageFault)
def test_a_fault_at_some_calls_on_s3(fault: StorageFault, s3_place: S3Place) -> None:
    for at in range(1, 30, 4):
        store = open_objects(f"{s3_place.url}/{at}")
        story = Story(ObjectRig(lambda store=store: store))  # type: ignore[misc]
        plan = FaultPlan(fault, at)
        with suppress(Crash, MembankError):
            _live(story, plan, first=100)
        assert plan.happened == (at <= plan.num_calls)
        _live(story, FaultPlan(), first=200)
        story.begin_life()


def _fresh(kind: str, folder: Path) -> JournalRig:
    objects = MemoryObjects({})
    match kind:
        case "objects":
            return ObjectRig(lambda: objects)
        case "shipped":
            return ShippedRig(folder, lambda: objects)
        case _:
            return LocalRig(folder, sync=kind == "local-sync")
