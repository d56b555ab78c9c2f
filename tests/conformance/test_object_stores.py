"""What every object store must do. Each test looks, or writes, behind the store's back too."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from membank.bank_service.store import (
    FsspecObjects,
    LocalObjects,
    ObjectStore,
    open_objects,
    probe_create_only,
    publish,
)
from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    Reason,
    UnavailableError,
)


@dataclass(frozen=True)
class Subject:
    """A store under test, and a way to its bytes that does not lead through it."""

    store: ObjectStore
    read_raw: Callable[[str], bytes]
    write_raw: Callable[[str, bytes], None]


def _local(tmp_path: Path) -> Subject:
    root = tmp_path / "bank"

    def write_raw(key: str, data: bytes) -> None:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    return Subject(LocalObjects(root), lambda key: (root / key).read_bytes(), write_raw)


def _fsspec(url: str) -> Subject:
    fs, root = fsspec.core.url_to_fs(url, use_listings_cache=False)

    def write_raw(key: str, data: bytes) -> None:
        path = f"{root}/{key}"
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(path, data)

    return Subject(FsspecObjects(url), lambda key: bytes(fs.cat_file(f"{root}/{key}")), write_raw)


@pytest.fixture(
    params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)],
)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    name = uuid.uuid4().hex
    match request.param:
        case "local":
            yield _local(tmp_path)
        case "memory":
            yield _fsspec(f"memory://{name}")
            fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
        case _:
            url = f"{os.environ['MEMBANK_TEST_S3_URL'].rstrip('/')}/{name}"
            found = _fsspec(url)
            yield found
            for key in found.store.list(""):
                found.store.delete(key)


@pytest.fixture(autouse=True)
def _not_empty(subject: Subject) -> None:
    # fsspec's memory file system cannot remove a folder that never came to be.
    subject.write_raw("present", b"0123456789")


def test_put_is_what_lies_there(subject: Subject) -> None:
    subject.store.put("a/b/c", b"content")
    assert subject.read_raw("a/b/c") == b"content"


def test_get_returns_what_others_wrote(subject: Subject) -> None:
    subject.write_raw("x/y", b"theirs")
    assert subject.store.get("x/y") == b"theirs"


@pytest.mark.parametrize("durable", [False, True])
def test_put_replaces(subject: Subject, durable: bool) -> None:
    subject.store.put("k", b"a long first value", durable=durable)
    subject.store.put("k", b"second", durable=durable)
    assert subject.read_raw("k") == b"second"


def test_sync_keeps_what_was_put(subject: Subject) -> None:
    subject.store.put("s/1", b"1")
    subject.store.put_if_absent("t/2", b"2")
    subject.store.sync([])
    subject.store.sync(["s/1", "t/2"])
    assert (subject.read_raw("s/1"), subject.read_raw("t/2")) == (b"1", b"2")


def test_empty_object(subject: Subject) -> None:
    subject.store.put("empty", b"")
    assert subject.store.get("empty") == b""


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0, 4, b"0123"), (3, 7, b"3456"), (8, 99, b"89"), (5, 5, b""), (0, 10, b"0123456789")],
)
def test_get_range(subject: Subject, start: int, end: int, expected: bytes) -> None:
    assert subject.store.get_range("present", start, end) == expected


def test_missing_object(subject: Subject) -> None:
    with pytest.raises(NotFoundError) as caught:
        subject.store.get("no/such")
    assert caught.value.reason is Reason.OBJECT_MISSING


def test_range_of_a_missing_object(subject: Subject) -> None:
    with pytest.raises(NotFoundError) as caught:
        subject.store.get_range("no/such", 0, 1)
    assert caught.value.reason is Reason.OBJECT_MISSING


def test_a_prefix_is_no_object(subject: Subject) -> None:
    subject.store.put("folder/key", b"1")
    with pytest.raises(NotFoundError):
        subject.store.get("folder")


def test_create_only_creates_once(subject: Subject) -> None:
    subject.store.put_if_absent("d/once", b"first")
    with pytest.raises(AlreadyExistsError) as caught:
        subject.store.put_if_absent("d/once", b"second")
    assert caught.value.reason is Reason.OBJECT_EXISTS
    assert subject.read_raw("d/once") == b"first"


def test_create_only_respects_what_others_wrote(subject: Subject) -> None:
    subject.write_raw("d/theirs", b"theirs")
    with pytest.raises(AlreadyExistsError):
        subject.store.put_if_absent("d/theirs", b"ours", durable=True)
    assert subject.read_raw("d/theirs") == b"theirs"


def test_create_only_after_delete(subject: Subject) -> None:
    subject.store.put_if_absent("d/k", b"1")
    subject.store.delete("d/k")
    subject.store.put_if_absent("d/k", b"2")
    assert subject.read_raw("d/k") == b"2"


def test_delete_is_idempotent(subject: Subject) -> None:
    subject.store.put("gone", b"1")
    subject.store.delete("gone")
    subject.store.delete("gone")
    with pytest.raises(NotFoundError):
        subject.store.get("gone")


def test_list_is_sorted_recursive_and_bounded_by_parts(subject: Subject) -> None:
    for key in ("m/2", "m/10", "m/sub/1", "mm/1", "n"):
        subject.store.put(key, b"")
    subject.write_raw("m/theirs", b"")
    assert subject.store.list("m") == ["m/10", "m/2", "m/sub/1", "m/theirs"]
    assert subject.store.list("none") == []
    assert set(subject.store.list("")) >= {"m/2", "mm/1", "n", "present"}


def test_list_sees_what_came_and_went(subject: Subject) -> None:
    assert subject.store.list("l") == []
    subject.write_raw("l/1", b"")
    assert subject.store.list("l") == ["l/1"]
    subject.store.delete("l/1")
    assert subject.store.list("l") == []


def test_a_failed_create_leaves_nothing(subject: Subject) -> None:
    before = subject.store.list("")
    with pytest.raises(AlreadyExistsError):
        subject.store.put_if_absent("present", b"x")
    assert subject.store.list("") == before


@pytest.mark.parametrize("key", ["", "/abs", "a//b", "../up", "a/../../b", "a/."])
def test_keys_stay_inside(subject: Subject, key: str) -> None:
    with pytest.raises(InvalidArgumentError):
        subject.store.put(key, b"")


def test_one_of_many_creators_wins(subject: Subject) -> None:
    barrier = threading.Barrier(4)
    winners: list[int] = []

    def create(number: int) -> None:
        barrier.wait()
        try:
            subject.store.put_if_absent("race/key", str(number).encode())
        except AlreadyExistsError:
            return
        winners.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert subject.read_raw("race/key") == str(winners[0]).encode()


def test_probe_passes_and_leaves_nothing(subject: Subject) -> None:
    before = subject.store.list("")
    probe_create_only(subject.store)
    assert subject.store.list("") == before


class _Forwarding:
    """A store around a store; subclasses change one verb."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


class _IgnoringCreateOnly(_Forwarding):
    def put_if_absent(self, key: str, data: bytes, *, durable: bool = False) -> None:
        self._inner.put(key, data, durable=durable)


class _LosingResponses(_Forwarding):
    """Does the first create-only puts, and says that they failed."""

    def __init__(self, inner: ObjectStore, num_lost: int) -> None:
        super().__init__(inner)
        self._num_lost = num_lost

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = False) -> None:
        self._inner.put_if_absent(key, data, durable=durable)
        if self._num_lost:
            self._num_lost -= 1
            raise UnavailableError("the answer was lost", reason=Reason.STORE_FAILED)


class _Down(_Forwarding):
    """Fails every create-only put."""

    num_calls = 0

    def put_if_absent(self, key: str, data: bytes, *, durable: bool = False) -> None:
        self.num_calls += 1
        raise UnavailableError("down", reason=Reason.STORE_FAILED)


def test_probe_refuses_a_store_that_ignores_create_only(subject: Subject) -> None:
    with pytest.raises(FailedPreconditionError) as caught:
        probe_create_only(_IgnoringCreateOnly(subject.store))  # type: ignore[arg-type]
    assert caught.value.reason is Reason.STORE_UNSUPPORTED


def test_publish_recognises_its_own_object_after_a_lost_response(subject: Subject) -> None:
    publish(_LosingResponses(subject.store, 1), "p/1", b"nonce 1")  # type: ignore[arg-type]
    assert subject.read_raw("p/1") == b"nonce 1"


def test_publish_does_not_take_anothers_object_for_its_own(subject: Subject) -> None:
    subject.write_raw("p/2", b"nonce of another")
    with pytest.raises(AlreadyExistsError):
        publish(_LosingResponses(subject.store, 1), "p/2", b"nonce 2")  # type: ignore[arg-type]
    assert subject.read_raw("p/2") == b"nonce of another"


def test_publish_gives_up_after_a_bounded_number_of_attempts(subject: Subject) -> None:
    store = _Down(subject.store)
    with pytest.raises(UnavailableError):
        publish(store, "p/3", b"nonce 3")  # type: ignore[arg-type]
    assert 1 < store.num_calls < 10


def test_urls_choose_the_store(tmp_path: Path) -> None:
    assert isinstance(open_objects(str(tmp_path)), LocalObjects)
    assert isinstance(open_objects(f"file://{tmp_path}"), LocalObjects)
    assert isinstance(open_objects("memory://somewhere"), FsspecObjects)
    with pytest.raises(InvalidArgumentError):
        open_objects("nosuchscheme://bucket")
