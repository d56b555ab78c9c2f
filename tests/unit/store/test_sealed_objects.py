"""Objects that are sealed: nobody reads them without their key, and the key goes first."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest

from membank.bank_service.store import (
    Bank,
    LocalObjects,
    SealedObjects,
    open_objects,
    probe_create_only,
)
from membank.bank_service.store.sealed_objects import Halves
from membank.wire.crc import crc32c
from membank.wire.errors import (
    AlreadyExistsError,
    CorruptionError,
    FailedPreconditionError,
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
)
from membank.wire.format import BankDocument, decode_bank, encode_bank
from membank.wire.format.layout import (
    log_key,
    manifest_key,
    pack_key,
    pack_record_key,
    public_key_key,
    receipt_key,
    revision_key,
    slot_key,
    snapshot_key,
    tree_key,
)
from membank.wire.format.sealed import SealedReader, is_sealed_key, may_hold_sealed
from membank.wire.spec import Role
from s3_server import S3Place
from storage_faults import Crash, FaultPlan, FaultyObjects, Interleaved, StorageFault
from tiny_bank import UnsyncedObjects, file_bytes, tiny_spec

SLOT = slot_key(0, 1, Role.WEIGHT, 7)
ANOTHER = slot_key(0, 1, Role.WEIGHT, 8)
LOG = log_key(0, 3)
TREE = tree_key(2)
SEALED = (SLOT, LOG, TREE, pack_key("p"), pack_record_key("p"))
PLAIN = (
    "bank.json",
    revision_key(1),
    snapshot_key("s"),
    receipt_key(1),
    public_key_key("0123456789abcdef"),
    manifest_key(0, 1),
    "claims/0000000001.json",
    ".probes/x",
    "partitions/0000/level-1/weight/zarr.json",
    "partitions/0000/journal/lock",
)
SECRET = b"the elements of a topic"


class Place:
    """A bank's directory and its keyring's."""

    def __init__(self, root: Path, bank_id: str = "bank-1") -> None:
        self.bank = UnsyncedObjects(root / "bank")
        self.keyring = UnsyncedObjects(root / "keyring")
        self.store = SealedObjects(self.bank, self.keyring)
        self.store.begin_keyring(bank_id)

    def faulty(self, plan: FaultPlan) -> SealedObjects:
        """Return the store as a process reaches it whose calls follow `plan`."""
        return SealedObjects(FaultyObjects(self.bank, plan), FaultyObjects(self.keyring, plan))

    def damage(self, key: str, change: Callable[[bytes], bytes]) -> None:
        """Change the bytes of an object behind the store's back."""
        self.bank.put(key, change(self.bank.get(key)))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("key", SEALED)
def test_content_is_nowhere_in_the_clear(place: Place, tmp_path: Path, key: str) -> None:
    place.store.put(key, SECRET)
    assert place.store.get(key) == SECRET
    assert place.store.get_range(key, 4, 12) == b"elements"
    assert place.store.get_range(key, 9, 4) == b""
    assert not [name for name, data in file_bytes(tmp_path).items() if SECRET[:8] in data]
    assert is_sealed_key(key)
    # Wherever a listing may begin that leads there.
    parts = key.split("/")
    assert all(may_hold_sealed("/".join(parts[:n])) for n in range(len(parts)))


@pytest.mark.parametrize("key", PLAIN)
def test_what_every_reader_needs_is_not_sealed(place: Place, key: str) -> None:
    place.store.put_if_absent(key, SECRET)
    assert place.bank.get(key) == place.store.get(key) == SECRET
    assert place.store.get_range(key, 4, 12) == b"elements"
    assert place.keyring.list("") == ["keyring.json"]
    place.store.delete(key)
    assert place.store.list("") == []


@pytest.mark.parametrize("size", [0, 3, 100_000])
def test_a_checked_read_is_the_content_and_its_crc(place: Place, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    place.store.put_if_absent(SLOT, [memoryview(content)[:size], b"crc!"])
    data, crc = place.store.get_checked(SLOT, size)
    assert (bytes(data), data.readonly) == (content[:size] + b"crc!", True)
    assert crc == crc32c(content[:size])


def test_every_byte_counts(place: Place) -> None:
    place.store.put(SLOT, SECRET)
    sealed = place.bank.get(SLOT)
    for offset in range(len(sealed)):
        changed = bytearray(sealed)
        changed[offset] ^= 1
        place.bank.put(SLOT, bytes(changed))
        with pytest.raises(CorruptionError) as caught:
            place.store.get(SLOT)
        assert caught.value.reason is Reason.SLOT_CORRUPT
        assert SLOT in caught.value.message
    for length in (0, 7, 8, 35, len(sealed) - 1):
        place.bank.put(SLOT, sealed[:length])
        with pytest.raises(CorruptionError):
            place.store.get(SLOT)
        with pytest.raises(CorruptionError):
            place.store.get_checked(SLOT, 4)


def test_objects_are_not_exchanged(place: Place, tmp_path: Path) -> None:
    place.store.put(SLOT, SECRET)
    place.store.put(ANOTHER, b"other content")
    # With its key or without, under another name it is not what that name says.
    place.bank.put(ANOTHER, place.bank.get(SLOT))
    with pytest.raises(CorruptionError):
        place.store.get(ANOTHER)
    place.keyring.put(ANOTHER, place.keyring.get(SLOT))
    with pytest.raises(CorruptionError):
        place.store.get(ANOTHER)
    # Nor is it an object of another bank.
    twin = Place(tmp_path / "twin", bank_id="bank-2")
    twin.bank.put(SLOT, place.bank.get(SLOT))
    twin.keyring.put(SLOT, place.keyring.get(SLOT))
    with pytest.raises(CorruptionError):
        twin.store.get(SLOT)


def test_a_key_serves_one_object_and_a_nonce_one_put(place: Place) -> None:
    for key in (SLOT, ANOTHER, TREE):
        place.store.put(key, SECRET)
    assert len({place.keyring.get(key) for key in (SLOT, ANOTHER, TREE)}) == 3
    before, record = place.bank.get(TREE), place.keyring.get(TREE)
    place.store.put(TREE, SECRET)
    assert place.keyring.get(TREE) == record
    assert place.bank.get(TREE)[8:20] != before[8:20]


def test_no_copy_is_readable_after_the_removal(place: Place) -> None:
    place.store.put(SLOT, SECRET)
    place.store.put(ANOTHER, b"other content")
    copies = {key: place.bank.get(key) for key in (SLOT, ANOTHER)}
    place.store.delete(SLOT)
    assert place.keyring.list("partitions") == [ANOTHER]
    # Whoever puts the copy back has an object that does not exist.
    for key, data in copies.items():
        place.bank.put(key, data)
    with pytest.raises(NotFoundError) as caught:
        place.store.get(SLOT)
    assert caught.value.reason is Reason.OBJECT_MISSING
    assert place.store.get(ANOTHER) == b"other content"
    # Nor does the key that a later object of this name gets open it.
    place.store.put_if_absent(SLOT, b"later")
    assert place.store.get(SLOT) == b"later"
    place.bank.put(SLOT, copies[SLOT])
    with pytest.raises(CorruptionError):
        place.store.get(SLOT)


def test_the_key_goes_first_and_comes_first(tmp_path: Path) -> None:
    bank, keyring = (Interleaved(UnsyncedObjects(tmp_path / name)) for name in ("bank", "keyring"))
    store = SealedObjects(bank, keyring)
    store.begin_keyring("bank-1")
    seen: list[bool] = []

    def look() -> None:
        seen.append(SLOT in keyring.list("partitions"))

    bank.before("put_if_absent", SLOT, look)
    store.put_if_absent(SLOT, SECRET)
    bank.before("delete", SLOT, look)
    store.delete(SLOT)
    assert seen == [True, False]


Action = Callable[[SealedObjects], None]
ACTIONS: dict[str, tuple[bytes | None, Action, bytes | None]] = {
    "create": (None, lambda store: store.put_if_absent(SLOT, b"new"), b"new"),
    "put": (None, lambda store: store.put(SLOT, b"new", durable=True), b"new"),
    "put again": (b"old", lambda store: store.put(SLOT, b"new"), b"new"),
    "delete": (b"old", lambda store: store.delete(SLOT), None),
}


def read_or_none(store: SealedObjects) -> bytes | None:
    try:
        return store.get(SLOT)
    except NotFoundError:
        return None


@pytest.mark.parametrize("fault", [StorageFault.CRASH_BEFORE, StorageFault.CRASH_AFTER])
@pytest.mark.parametrize("name", ACTIONS)
def test_a_crash_anywhere_leaves_the_old_or_the_new(
    tmp_path: Path, name: str, fault: StorageFault
) -> None:
    before, action, after = ACTIONS[name]
    for at in itertools.count(1):
        place = Place(tmp_path / str(at))
        if before is not None:
            place.store.put(SLOT, before)
        plan = FaultPlan(fault, at)
        with suppress(Crash):
            action(place.faulty(plan))
        assert read_or_none(place.store) in {before, after}
        # Whoever comes next can do the same, or remove what is there.
        if after is None or read_or_none(place.store) != after:
            action(place.store)
        assert read_or_none(place.store) == after
        place.store.delete(SLOT)
        assert (place.store.list(""), place.store.halves("")) == ([], Halves())
        if not plan.happened:
            assert at > 2
            return


@pytest.mark.parametrize("at", [1, 2])
def test_a_lost_answer_is_no_second_object(place: Place, at: int) -> None:
    plan = FaultPlan(StorageFault.LOST_RESPONSE, at)
    with pytest.raises(MembankError):
        place.faulty(plan).put_if_absent(SLOT, SECRET)
    with pytest.raises(AlreadyExistsError) if at == 2 else nullcontext():
        place.store.put_if_absent(SLOT, SECRET)
    assert place.store.get(SLOT) == SECRET


def test_halves_are_listed_for_whoever_removes_what_nothing_names(place: Place) -> None:
    for key in SEALED:
        place.store.put(key, SECRET)
    keyless, orphans = (SLOT, LOG, TREE), (ANOTHER, log_key(0, 4), tree_key(9))
    for key in keyless:
        place.keyring.delete(key)
    for key in orphans:
        place.store.put(key, SECRET)
        place.bank.delete(key)
    halves = Halves(without_key=frozenset(keyless), without_object=frozenset(orphans))
    assert place.store.halves("") == halves
    whole = {pack_key("p"), pack_record_key("p")}
    # A reader of a journal takes whatever is listed for a part of it.
    assert set(place.store.list("")) == whole | {SLOT, TREE, ANOTHER, tree_key(9)}
    assert place.store.list("partitions/0000/log") == []
    for key in (*keyless, *orphans):
        with pytest.raises(NotFoundError):
            place.store.get(key)
        place.store.delete(key)
    assert place.store.halves("") == Halves()
    assert set(place.store.list("")) == whole


def test_what_a_removal_left_is_not_in_the_way(place: Place) -> None:
    place.store.put(SLOT, b"old")
    place.keyring.delete(SLOT)
    place.store.put_if_absent(SLOT, b"new")
    assert place.store.get(SLOT) == b"new"
    with pytest.raises(AlreadyExistsError):
        place.store.put_if_absent(SLOT, b"newer")
    assert place.store.get(SLOT) == b"new"


@pytest.mark.parametrize("torn", [b"", bytes(44)])
def test_a_key_that_a_loss_of_power_tore_is_replaced(place: Place, torn: bytes) -> None:
    place.keyring.put(SLOT, torn)
    place.store.put_if_absent(SLOT, SECRET)
    assert place.store.get(SLOT) == SECRET


def test_a_key_that_was_damaged_is_kept_and_named(place: Place) -> None:
    place.store.put(SLOT, SECRET)
    record = place.keyring.get(SLOT)
    for offset in (0, 8, 40):
        changed = bytearray(record)
        changed[offset] ^= 1
        place.keyring.put(SLOT, bytes(changed))
        for call in (lambda: place.store.get(SLOT), lambda: place.store.put(SLOT, b"x")):
            with pytest.raises(CorruptionError) as caught:
                call()
            assert place.keyring.url in caught.value.message
        assert place.keyring.get(SLOT) == bytes(changed)


@pytest.mark.s3
def test_bank_and_keyring_in_buckets(s3_place: S3Place) -> None:
    bank, keyring = f"{s3_place.url}/bank", f"fsspec+{s3_place.url}/keyring"
    made = Bank.create(bank, tiny_spec(), keyring=keyring)
    store = Bank.open(bank, keyring=keyring).objects
    assert isinstance(store, SealedObjects)
    content = SECRET * 20_000
    store.put_if_absent(SLOT, content)
    assert SECRET[:8] not in s3_place.read(f"bank/{SLOT}")
    data, crc = store.get_checked(SLOT, 1000)
    assert (bytes(data), crc) == (content, crc32c(content[:1000]))
    store.delete(SLOT)
    with pytest.raises(NotFoundError):
        store.get(SLOT)
    assert refusal(lambda: Bank.open(bank)) is Reason.KEYRING_NEEDED
    assert made.is_sealed


# ---- whose keyring it is


def refusal(call: Callable[[], object]) -> Reason | None:
    with pytest.raises((FailedPreconditionError, InvalidArgumentError)) as caught:
        call()
    return caught.value.reason


def test_a_sealed_bank_opens_with_its_own_keyring_only(tmp_path: Path) -> None:
    bank, keyring, other = (str(tmp_path / name) for name in ("bank", "keyring", "other"))
    made = Bank.create(bank, tiny_spec(), keyring=keyring)
    Bank.create(str(tmp_path / "bank-2"), tiny_spec(), keyring=other)
    Bank.create(str(tmp_path / "plain"), tiny_spec())
    again = Bank.open(bank, keyring=keyring)
    assert (again.spec, again.is_sealed) == (made.spec, True)
    needed = refusal(lambda: Bank.open(bank))
    assert needed is Reason.KEYRING_NEEDED
    assert refusal(lambda: Bank.open(bank, keyring=other)) is Reason.KEYRING_MISMATCH
    nothing = str(tmp_path / "nothing")
    assert refusal(lambda: Bank.open(bank, keyring=nothing)) is Reason.KEYRING_MISMATCH
    plain = str(tmp_path / "plain")
    assert refusal(lambda: Bank.open(plain, keyring=keyring)) is Reason.BANK_NOT_SEALED
    # Nor is it made the keyring of another bank.
    third = str(tmp_path / "bank-3")
    taken = refusal(lambda: Bank.create(third, tiny_spec(), keyring=keyring))
    assert taken is Reason.KEYRING_MISMATCH
    assert LocalObjects(third).list("") == []
    store = LocalObjects(third)
    assert refusal(lambda: Bank.create(store, tiny_spec(), keyring=other)) is Reason.BAD_CONFIG
    for inside in (f"{bank}/keys", str(tmp_path), bank):
        assert refusal(lambda at=inside: open_objects(bank, keyring=at)) is Reason.BAD_CONFIG  # type: ignore[misc]


def test_a_damaged_keyring_document_is_named(tmp_path: Path) -> None:
    place = Place(tmp_path)
    data = place.keyring.get("keyring.json")
    place.keyring.put("keyring.json", data.replace(b"bank-1", b"bank-2"))
    with pytest.raises(CorruptionError, match=r"keyring\.json"):
        place.store.require_bank("bank-1")
    place.keyring.put("keyring.json", data.replace(b'"format": 1', b'"format": 9'))
    assert refusal(lambda: place.store.require_bank("bank-1")) is Reason.FORMAT_TOO_NEW


def test_older_software_refuses_a_sealed_bank_and_no_other_changes() -> None:
    sealed = encode_bank(BankDocument(spec=tiny_spec(), is_sealed=True))
    assert decode_bank(sealed, where="w").is_sealed
    document = json.loads(sealed)
    # What a reader of format 1 looks at first.
    assert document["format"] == 2
    plain = json.loads(encode_bank(BankDocument(spec=tiny_spec())))
    assert plain == {"format": 1, **{name: document[name] for name in ("spec", "crc32c")}}
    for changed in (
        {**document, "format": 1},
        {**document, "seal": "rot13"},
        {**plain, "format": 2},
    ):
        with pytest.raises(CorruptionError):
            decode_bank(json.dumps(changed).encode(), where="w")


def test_both_places_must_forget_what_is_removed(tmp_path: Path) -> None:
    class Versioned(LocalObjects):
        def keeps_versions(self, key: str) -> bool:
            return bool(self.get(key))

    for bank, keyring in ((Versioned, LocalObjects), (LocalObjects, Versioned)):
        store = SealedObjects(bank(tmp_path / "bank"), keyring(tmp_path / "keyring"))
        assert refusal(lambda at=store: probe_create_only(at)) is Reason.STORE_UNSUPPORTED  # type: ignore[misc]
    store = SealedObjects(LocalObjects(tmp_path / "bank"), LocalObjects(tmp_path / "keyring"))
    probe_create_only(store)
    assert [part.list("") for part in store.stores] == [[], []]


def test_a_reader_alone_opens_the_same(place: Place) -> None:
    place.store.put(SLOT, SECRET)
    place.store.put("bank.json", b"{}")
    reader = SealedReader(place.bank, place.keyring)
    reader.require_bank("bank-1")
    assert (reader.get(SLOT), reader.get("bank.json")) == (SECRET, b"{}")
    place.keyring.delete(SLOT)
    with pytest.raises(NotFoundError):
        reader.get(SLOT)
    assert refusal(lambda: reader.require_bank("bank-2")) is Reason.KEYRING_MISMATCH
