"""Journals of every kind under one handle: opened again and again, over storage that may fail."""

from __future__ import annotations

import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from membank.bank_service.store import Data, ObjectStore
from membank.bank_service.store.journal import (
    FrameKind,
    Journal,
    LocalJournal,
    ObjectJournal,
    Ownership,
    ShippedJournal,
)
from membank.bank_service.store.objects import storage_error, whole
from membank.wire.errors import MembankError
from membank.wire.format.layout import log_prefix
from storage_faults import FaultPlan, FaultyLogFile, FaultyObjects, Outage, faulty_remove

PARTITION = 3
IDENTITY = "bank/3"


class JournalRig(ABC):
    """Where a journal is kept, and how its owners come and go."""

    fences = True
    """Whether a new owner keeps an old one out; on one disk a lock does that."""
    appends_whole_batches = True
    """Whether the death of the process leaves a batch whole or not at all."""

    def __init__(self) -> None:
        self.manifest = Ownership(0, "", "")
        self.nonce = ""

    @abstractmethod
    def open(self, plan: FaultPlan | None = None, *, identity: str = IDENTITY) -> Journal:
        """Open the journal, over storage that follows `plan`."""

    @abstractmethod
    def stored(self) -> bytes:
        """Return every byte at rest, one after the other."""

    def next_owner(self) -> Ownership:
        """Return the owner that an opening would make."""
        return Ownership(self.manifest.epoch + 1, uuid.uuid4().hex, self.nonce)

    def publish(self, owner: Ownership) -> None:
        """Do as if `owner` had published a manifest."""
        self.manifest, self.nonce = owner, uuid.uuid4().hex

    def start(self, after_lsn: int = 0, plan: FaultPlan | None = None) -> Journal:
        """Open the journal and begin it as the next owner, as a shard does."""
        journal = self.open(plan)
        owner = self.next_owner()
        journal.begin(owner, after_lsn)
        self.publish(owner)
        return journal

    def housekeep(self, journal: Journal) -> None:
        """Do what a shard does now and then."""
        journal.require_usable()

    def is_current(self, owner: Ownership) -> bool:
        """Say whether `owner` is that of the newest manifest, or began onto it."""
        return owner.is_current(self.manifest.epoch, self.manifest.owner, self.nonce)


class LocalRig(JournalRig):
    """A journal on a local disk."""

    fences = False
    appends_whole_batches = False

    def __init__(
        self,
        folder: Path,
        *,
        sync: bool = False,
        segment_bytes: int = 400,
        spare_bytes: int = 3000,
    ) -> None:
        super().__init__()
        self.folder = folder
        self.sync = sync
        self.segment_bytes = segment_bytes
        self.spare_bytes = spare_bytes
        self.faults = FaultPlan()
        """Those of the latest opening."""

    def open(self, plan: FaultPlan | None = None, *, identity: str = IDENTITY) -> LocalJournal:
        self.faults = faults = plan or FaultPlan()
        return LocalJournal.open(
            self.folder,
            identity,
            sync=self.sync,
            segment_bytes=self.segment_bytes,
            spare_bytes=self.spare_bytes,
            open_file=lambda path: FaultyLogFile(path, faults),
            remove_file=faulty_remove(faults),
        )

    def stored(self) -> bytes:
        return b"".join(path.read_bytes() for path in sorted(self.folder.iterdir()))


class ObjectRig(JournalRig):
    """A journal in an object store, which may fail."""

    def __init__(self, make_store: Callable[[], ObjectStore]) -> None:
        super().__init__()
        self.make_store = make_store
        self.store = make_store()

    def open(self, plan: FaultPlan | None = None, *, identity: str = IDENTITY) -> ObjectJournal:
        objects = FaultyObjects(self.make_store(), plan or FaultPlan())
        return ObjectJournal.open(objects, PARTITION, identity)

    def keys(self) -> list[str]:
        """Return the keys of the log's objects."""
        return self.store.list(log_prefix(PARTITION))

    def stored(self) -> bytes:
        return b"".join(self.store.get(key) for key in self.keys())


class ShippedRig(JournalRig):
    """A journal on a local disk, and its copy in an object store."""

    appends_whole_batches = False

    def __init__(self, folder: Path, make_store: Callable[[], ObjectStore]) -> None:
        super().__init__()
        self.local = LocalRig(folder)
        self.remote = ObjectRig(make_store)

    def open(self, plan: FaultPlan | None = None, *, identity: str = IDENTITY) -> ShippedJournal:
        faults = plan or FaultPlan()
        return ShippedJournal(
            self.local.open(faults, identity=identity),
            self.remote.open(faults, identity=identity),
            self.is_current,
            batch_bytes=100,
        )

    def stored(self) -> bytes:
        return self.local.stored() + self.remote.stored()

    def housekeep(self, journal: Journal) -> None:
        assert isinstance(journal, ShippedJournal)
        journal.ship()


def frame_starts(path: Path) -> list[int]:
    """Return where frames of a segment begin, if no payload looks like one."""
    return [found.start() for found in re.finditer(b"MBJF", path.read_bytes())]


def append(journal: Journal, *payloads: bytes) -> int:
    """Append one batch of updates."""
    return journal.append(FrameKind.UPDATE, [[p[:3], memoryview(p)[3:]] for p in payloads])


def payloads_of(journal: Journal, after_lsn: int = 0) -> list[bytes]:
    """Return the payloads after `after_lsn`, having checked that their LSNs have no gap."""
    frames = list(journal.replay(after_lsn))
    first = frames[0].lsn if frames else 0
    assert [frame.lsn for frame in frames] == list(range(first, first + len(frames)))
    return [bytes(frame.payload) for frame in frames]


def numbered(numbers: Sequence[int]) -> Iterator[bytes]:
    """Yield a payload for each number, each of another length."""
    for number in numbers:
        yield f"update {number}".encode() * (1 + number % 5)


class Story:
    """What was appended, and what may be in the log at the next opening.

    Parameters
    ----------
    rig
        The journal.
    """

    def __init__(self, rig: JournalRig) -> None:
        self.rig = rig
        self.acknowledged: list[bytes] = []
        self.in_doubt: list[bytes] = []
        """The last batch, where it was reported as failed."""
        self.trimmed = 0

    def append(self, journal: Journal, payloads: Sequence[bytes]) -> None:
        """Append a batch; a failure is told, and remembered."""
        try:
            lsn = append(journal, *payloads)
        except MembankError:
            # At most once in a life: after a failure the journal knows, or accepts nothing.
            assert not self.in_doubt or not _is_usable(journal)
            self.in_doubt = self.in_doubt or list(payloads)
            raise
        except BaseException:
            self.in_doubt = list(payloads)
            raise
        # A journal that goes on after a failure has made sure that the batch is not in the log.
        self.in_doubt = []
        self.acknowledged += payloads
        assert lsn == len(self.acknowledged)

    def trim(self, journal: Journal, lsn: int) -> None:
        """Trim the journal, as after a manifest up to `lsn`."""
        self.trimmed = lsn
        journal.trim(lsn)

    def begin_life(self, plan: FaultPlan | None = None) -> Journal:
        """Open the journal, begin it, and check what it holds."""
        journal = self.rig.start(self.trimmed, plan)
        found = payloads_of(journal, self.trimmed)
        known = self.acknowledged[self.trimmed :]
        assert found[: len(known)] == known
        extra = found[len(known) :]
        assert extra == self.in_doubt[: len(extra)]
        if self.rig.appends_whole_batches:
            assert extra in ([], self.in_doubt)
        self.acknowledged += extra
        self.in_doubt = []
        assert journal.last_lsn == len(self.acknowledged)
        return journal


def _is_usable(journal: Journal) -> bool:
    try:
        journal.require_usable()
    except MembankError:
        return False
    return True


class MemoryObjects:
    """Objects in a dictionary, for tests of one thread that make thousands of stores."""

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content = content

    @property
    def url(self) -> str:
        return "dict://bank"

    def get(self, key: str) -> bytes:
        try:
            return self.content[key]
        except KeyError as err:
            raise storage_error(FileNotFoundError(key), key) from err

    def get_range(self, key: str, start: int, end: int) -> bytes:
        return self.get(key)[start:end]

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        del durable
        self.content[key] = whole(data)

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        del durable
        if key in self.content:
            raise storage_error(FileExistsError(key), key)
        self.content[key] = whole(data)

    def sync(self, keys: Sequence[str]) -> None:
        del keys

    def list(self, prefix: str) -> list[str]:
        return sorted(key for key in self.content if key.startswith(f"{prefix}/"))

    def delete(self, key: str) -> None:
        self.content.pop(key, None)


class MachineRig(ShippedRig):
    """A machine with a disk, and the bank's storage, which can be cut off; time stands still."""

    def __init__(self, folder: Path, content: dict[str, bytes], *, batch_bytes: int = 100) -> None:
        self.outage = Outage(MemoryObjects(content))
        super().__init__(folder, lambda: self.outage)
        self.batch_bytes = batch_bytes
        self.now = 0.0

    def open(self, plan: FaultPlan | None = None, *, identity: str = IDENTITY) -> ShippedJournal:
        return ShippedJournal(
            self.local.open(plan, identity=identity),
            self.remote.open(plan, identity=identity),
            self.is_current,
            batch_bytes=self.batch_bytes,
            clock=lambda: self.now,
        )

    def start(self, after_lsn: int = 0, plan: FaultPlan | None = None) -> ShippedJournal:
        journal = super().start(after_lsn, plan)
        assert isinstance(journal, ShippedJournal)
        return journal

    def shipped(self) -> list[bytes]:
        """Return what is in the remote journal."""
        return payloads_of(self.remote.open())
