"""What every object store must do. Each test looks, or writes, behind the store's back too."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import fsspec
import pytest

from membank.bank_service.store import (
    Data,
    FsspecObjects,
    LocalObjects,
    ObjectStore,
    open_objects,
    probe_create_only,
    publish,
)
from membank.bank_service.store.local_objects import offers_unnamed
from membank.bank_service.store.objects import Viewable
from membank.wire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from s3_server import S3Place
from sealed_folder import SealedFolder


@dataclass(frozen=True)
class Subject:
    """A store under test, and a way to its bytes that does not lead through it."""

    store: ObjectStore
    read_raw: Callable[[str], bytes]
    write_raw: Callable[[str, bytes], None]


def _local(tmp_path: Path, *, unnamed: bool) -> Subject:
    root = tmp_path / "bank"
    tmp_path.joinpath("probe").mkdir()
    if unnamed and not offers_unnamed(str(tmp_path / "probe")):
        pytest.skip("this file system makes no files without a name")

    def write_raw(key: str, data: bytes) -> None:
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    store = LocalObjects(root, offers_unnamed=lambda _: unnamed)
    return Subject(store, lambda key: (root / key).read_bytes(), write_raw)


def _memory(name: str) -> Subject:
    fs = fsspec.filesystem("memory")

    def write_raw(key: str, data: bytes) -> None:
        path = f"/{name}/{key}"
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(path, data)

    return Subject(
        FsspecObjects(f"memory://{name}"),
        lambda key: bytes(fs.cat_file(f"/{name}/{key}")),
        write_raw,
    )


def _s3(place: S3Place, kind: str) -> Subject:
    # The way past the store is a third client: neither obstore nor s3fs.
    return Subject(open_objects(f"{PREFIXES[kind]}{place.url}/bank"), *_past(place, "bank/"))


def _past(
    place: S3Place, folder: str
) -> tuple[Callable[[str], bytes], Callable[[str, bytes], None]]:
    return (
        lambda key: place.read(folder + key),
        lambda key, data: place.write(folder + key, data),
    )


def _sealed(bank: ObjectStore, keyring: ObjectStore) -> Subject:
    place = SealedFolder(bank, keyring)
    return Subject(place, place.read_raw, place.write_raw)


PREFIXES = {"obstore": "", "s3fs": "fsspec+"}
# Every s3fs makes a botocore client of its own, which takes longer than a quick test may.
S3_KINDS = [
    pytest.param("obstore", marks=pytest.mark.s3),
    pytest.param("s3fs", marks=[pytest.mark.s3, pytest.mark.slow]),
]


@pytest.fixture(params=["local", "local-scratch", "memory", "sealed", "sealed-memory", *S3_KINDS])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    match request.param:
        case "local" | "local-scratch" as kind:
            yield _local(tmp_path, unnamed=kind == "local")
        case "memory":
            name = uuid.uuid4().hex
            yield _memory(name)
            fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
        case "sealed":
            yield _sealed(LocalObjects(tmp_path / "bank"), LocalObjects(tmp_path / "keyring"))
        case "sealed-memory":
            name = uuid.uuid4().hex
            parts = (FsspecObjects(f"memory://{name}/{part}") for part in ("bank", "keyring"))
            yield _sealed(*parts)
            fsspec.filesystem("memory").rm(f"/{name}", recursive=True)
        case kind:
            yield _s3(request.getfixturevalue("s3_place"), kind)


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


@pytest.mark.parametrize(
    "pieces",
    [
        [],
        [b""],
        [b"one"],
        [memoryview(b"one"), b"", b"two", memoryview(bytearray(b"three"))[1:3]],
        [memoryview(bytes(300_000)), b"end"],
        # More than one call to the system takes.
        [b"%04d" % number for number in range(2000)],
    ],
)
@pytest.mark.parametrize("durable", [False, True])
def test_content_in_pieces(
    subject: Subject, pieces: list[bytes | memoryview], durable: bool
) -> None:
    subject.store.put("pieces/put", pieces, durable=durable)
    subject.store.put_if_absent("pieces/created", tuple(pieces), durable=durable)
    whole = b"".join(pieces)
    assert subject.read_raw("pieces/put") == subject.read_raw("pieces/created") == whole


def test_empty_object(subject: Subject) -> None:
    subject.store.put("empty", b"")
    assert subject.store.get("empty") == b""


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 4, b"0123"),
        (3, 7, b"3456"),
        (8, 99, b"89"),
        (5, 5, b""),
        (0, 10, b"0123456789"),
        (10, 12, b""),
        (99, 100, b""),
    ],
)
def test_get_range(subject: Subject, start: int, end: int, expected: bytes) -> None:
    assert subject.store.get_range("present", start, end) == expected


def test_missing_object(subject: Subject) -> None:
    with pytest.raises(NotFoundError) as caught:
        subject.store.get("no/such")
    assert caught.value.reason is Reason.OBJECT_MISSING


@pytest.mark.parametrize("end", [0, 1])
def test_range_of_a_missing_object(subject: Subject, end: int) -> None:
    with pytest.raises(NotFoundError) as caught:
        subject.store.get_range("no/such", 0, end)
    assert caught.value.reason is Reason.OBJECT_MISSING


def test_a_prefix_is_no_object(subject: Subject) -> None:
    subject.store.put("folder/key", b"1")
    with pytest.raises(NotFoundError):
        subject.store.get("folder")
    with pytest.raises(NotFoundError):
        subject.store.get_range("folder", 0, 0)
    assert subject.store.list("folder/key") == []


@pytest.mark.parametrize(
    "name",
    [
        "with space",
        " space around ",
        "100%",
        "a%20b",
        "a+b&c=d",
        "what?#x",
        "[x]{y}",
        'a:b*c"<>|^`~',
        "back\\slash",
        "o'clock,;@!$()",
        "\u00e4\u4f60\U0001f600",
        "dot.",
        "...",
    ],
)
def test_keys_with_odd_characters(subject: Subject, name: str) -> None:
    key = f"odd/{name}/{name}"
    subject.store.put(key, b"ours")
    assert subject.read_raw(key) == b"ours"
    subject.write_raw(key, b"theirs")
    assert subject.store.get(key) == b"theirs"
    assert subject.store.get_range(key, 1, 3) == b"he"
    assert subject.store.list("odd") == [key]
    assert subject.store.list(f"odd/{name}") == [key]
    with pytest.raises(AlreadyExistsError):
        subject.store.put_if_absent(key, b"again")
    subject.store.delete(key)
    assert subject.store.list("odd") == []


@pytest.mark.slow
def test_large_objects_are_whole(subject: Subject) -> None:
    content = bytes(range(256)) * (32 * 1024 * 1024 // 256) + b"end"
    subject.store.put_if_absent("large/1", content)
    assert subject.read_raw("large/1") == content
    assert subject.store.get("large/1") == content
    assert subject.store.get_range("large/1", len(content) - 4, len(content) + 9) == b"\xffend"
    subject.store.put("large/1", content[1:])
    assert subject.store.get("large/1") == content[1:]


# Around the sizes at which the stores change their way of reading and writing.
@pytest.mark.parametrize("size", [1, 256 * 1024, 256 * 1024 + 1, 1024 * 1024, 1024 * 1024 + 1])
def test_every_size_is_whole(subject: Subject, size: int) -> None:
    content = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    subject.store.put("size/put", content)
    subject.store.put_if_absent("size/created", content)
    assert subject.read_raw("size/put") == subject.read_raw("size/created") == content
    assert subject.store.get("size/put") == content
    assert type(subject.store.get("size/put")) is bytes


@pytest.mark.parametrize("size", [0, 1, 256 * 1024 + 1, 1024 * 1024 + 1])
def test_a_view_is_what_get_returns(subject: Subject, size: int) -> None:
    store = subject.store
    if not isinstance(store, Viewable):
        pytest.skip("this store returns bytes alone")
    content = os.urandom(size)
    subject.write_raw("viewed", content)
    view = store.get_view("viewed")
    assert view.readonly
    assert (view.format, view.contiguous) == ("B", True)
    subject.write_raw("viewed", b"another")
    assert view == content
    for key in ("no/such", ""):
        with pytest.raises(MembankError) as caught:
            store.get_view(key)
        with pytest.raises(type(caught.value)):
            store.get(key)


def test_eight_threads_at_once(subject: Subject) -> None:
    def work(number: int) -> bytes:
        content = bytes([number]) * 1000 * (number + 1)
        for turn in range(3):
            key = f"threads/{number}/{turn}"
            subject.store.put_if_absent(key, content)
            assert subject.store.get(key) == content
            assert subject.store.list(f"threads/{number}")[-1] == key
        subject.store.delete(f"threads/{number}/0")
        return content

    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(work, range(8)))
    assert len(subject.store.list("threads")) == 16
    assert [subject.read_raw(f"threads/{number}/2") for number in range(8)] == contents


@pytest.mark.slow
def test_long_listings_are_complete(subject: Subject) -> None:
    # More than one page of S3, which is 1000 names.
    keys = [f"pages/{number:04}" for number in range(1030)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: subject.store.put(key, b""), keys))
    assert subject.store.list("pages") == keys


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


@pytest.mark.parametrize("key", ["", "/abs", "a//b", "../up", "a/../../b", "a/.", "a/", "n\n"])
def test_keys_stay_inside_and_are_printable(subject: Subject, key: str) -> None:
    with pytest.raises(InvalidArgumentError):
        subject.store.put(key, b"")
    with pytest.raises(InvalidArgumentError):
        subject.store.get(key)
    if key:
        with pytest.raises(InvalidArgumentError):
            subject.store.list(key)


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
    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._inner.put(key, data, durable=durable)


class _LosingResponses(_Forwarding):
    """Does the first create-only puts, and says that they failed."""

    def __init__(self, inner: ObjectStore, num_lost: int) -> None:
        super().__init__(inner)
        self._num_lost = num_lost

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self._inner.put_if_absent(key, data, durable=durable)
        if self._num_lost:
            self._num_lost -= 1
            raise UnavailableError("the answer was lost", reason=Reason.STORE_FAILED)


class _Down(_Forwarding):
    """Fails every create-only put."""

    num_calls = 0

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
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


class _ConflictWithNothing(_Forwarding):
    """Says that the first create-only put met an object, where there is none."""

    num_calls = 0

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        self.num_calls += 1
        if self.num_calls == 1:
            raise AlreadyExistsError("taken")
        self._inner.put_if_absent(key, data, durable=durable)


def test_publish_tries_again_after_a_conflict_with_nothing(subject: Subject) -> None:
    publish(_ConflictWithNothing(subject.store), "p/4", b"nonce 4")  # type: ignore[arg-type]
    assert subject.read_raw("p/4") == b"nonce 4"


class _KeepingVersions(_Forwarding):
    def keeps_versions(self, key: str) -> bool:
        return bool(self._inner.get(key))


class _RememberingDeletes(_Forwarding):
    """Takes the mark of a removal for an object, as a bucket of suspended versioning may."""

    def __init__(self, inner: ObjectStore) -> None:
        super().__init__(inner)
        self._deleted: set[str] = set()

    def delete(self, key: str) -> None:
        self._inner.delete(key)
        self._deleted.add(key)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        if key in self._deleted:
            raise AlreadyExistsError("a marker")
        self._inner.put_if_absent(key, data, durable=durable)


@pytest.mark.parametrize("wrapper", [_KeepingVersions, _RememberingDeletes])
def test_probe_refuses_a_store_that_does_not_forget(
    subject: Subject, wrapper: type[_Forwarding]
) -> None:
    before = subject.store.list("")
    with pytest.raises(FailedPreconditionError) as caught:
        probe_create_only(wrapper(subject.store))  # type: ignore[arg-type]
    assert caught.value.reason is Reason.STORE_UNSUPPORTED
    assert subject.store.list("") == before


def test_probe_bears_with_a_lost_response(subject: Subject) -> None:
    probe_create_only(_LosingResponses(subject.store, 1))  # type: ignore[arg-type]


def test_a_store_pickles_as_its_url(subject: Subject) -> None:
    if isinstance(subject.store, LocalObjects | SealedFolder):
        pytest.skip("a directory's store holds a lock, and what seals is opened with its keyring")
    again: ObjectStore = pickle.loads(pickle.dumps(subject.store))
    assert again.url == subject.store.url
    assert again.get("present") == b"0123456789"
    assert os.environ.get("AWS_SECRET_ACCESS_KEY", "?").encode() not in pickle.dumps(subject.store)


def _in_a_fork(action: Callable[[], object]) -> str:
    """Return what a forked child gets from `action`: its result, or its error's type and reason."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        # A child that hangs ends by itself, and answers nothing: by the kernel, for a call of
        # a library may never come back to a handler.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            answer = repr(action())
        except MembankError as err:
            answer = f"{type(err).__name__} {err.reason}"
        except BaseException as err:  # a forked pytest must not go on
            answer = repr(err)
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    return answer


REFUSED_IN_A_FORK = "FailedPreconditionError STORE_FAILED"


def test_used_after_a_fork_it_answers_or_says_why_not(subject: Subject) -> None:
    subject.store.get("present")
    answer = _in_a_fork(lambda: subject.store.get("present"))
    over_network = "s3://" in subject.store.url
    assert answer == (REFUSED_IN_A_FORK if over_network else repr(b"0123456789"))
    assert subject.store.get("present") == b"0123456789"


@pytest.mark.slow
def test_opened_after_a_fork_it_answers_or_says_why_not(subject: Subject) -> None:
    subject.store.get("present")
    if isinstance(subject.store, SealedFolder):
        pytest.skip("what seals is opened with its keyring")
    answer = _in_a_fork(lambda: open_objects(subject.store.url).get("present"))
    # obstore's threads belong to the first process that uses it.
    over_obstore = subject.store.url.startswith("s3://")
    assert answer == (REFUSED_IN_A_FORK if over_obstore else repr(b"0123456789"))


def test_urls_choose_the_store(tmp_path: Path) -> None:
    assert isinstance(open_objects(str(tmp_path)), LocalObjects)
    assert isinstance(open_objects(f"file://{tmp_path}"), LocalObjects)
    assert isinstance(open_objects("memory://somewhere"), FsspecObjects)
    with pytest.raises(InvalidArgumentError):
        open_objects("nosuchscheme://bucket")
