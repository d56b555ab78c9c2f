"""A journal in the bank's own storage: every batch is one object, created once.

The objects of a partition are numbered. Each holds a head (whose it is, what it continues) and the
frames of one batch; an object is there whole or not at all, so that nothing can be torn.

**How an older owner is kept out.** It knows one number that it will write to next, and that is the
one where the next owner created an object without frames, a *fence*. A create-only put finds it
taken. So the fence has to stay when the log is trimmed: an owner that was paused for an hour would
otherwise find its number free. A few of the newest fences are kept, which is enough for an owner
that sleeps through as many takeovers; the objects are of some 250 bytes.

**When the answer to a put was lost** the object may be there, or may still appear. The next call
first creates a fence under the same number: that succeeds, and then the batch is not in the log
and never will be, or it finds the batch, or it finds another owner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

from membank.bank_service.store.journal.contract import Frame, FrameKind, Ownership, Payload
from membank.bank_service.store.journal.frames import (
    SegmentHead,
    SegmentScan,
    check_chain,
    content_frames,
    corrupt,
    encode_batch,
    encode_frame,
    encode_head,
    scan,
)
from membank.bank_service.store.journal.object_chain import check_object_chain, require_object
from membank.bank_service.store.objects import ObjectStore, publish
from membank.wire.errors import (
    AlreadyExistsError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format.layout import log_key, log_prefix, number_in

_OPEN_ATTEMPTS = 4
_BEGIN_ATTEMPTS = 16
_FENCES_KEPT = 16


@dataclass(frozen=True, slots=True)
class _Stored:
    """One object of the log."""

    number: int
    head: SegmentHead
    last: int
    """LSN of its last frame; that of `head.base` where it has none."""
    num_bytes: int

    @property
    def has_frames(self) -> bool:
        return self.last > self.head.base

    @classmethod
    def of(cls, found: SegmentScan) -> _Stored:
        head = require_object(found)
        return cls(head.number, head, found.last, found.num_bytes)

    def as_scan(self, name: str) -> SegmentScan:
        return SegmentScan(name, self.head, self.last, self.num_bytes, False, None)


class ObjectJournal:
    """A `Journal` in an object store; it outlives the machine of its owner.

    `append` returns once its object is durable. Make one with `ObjectJournal.open`.
    """

    # Threads: `_lock` is held while an object is created under the next number, and never while
    # objects are removed. The tuples are replaced, never changed in place, so that the properties
    # read them without the lock.

    def __init__(
        self, objects: ObjectStore, partition: int, identity: str, *, reads_ahead: int
    ) -> None:
        self._objects = objects
        self._reads_ahead = reads_ahead
        self._partition = partition
        self._identity = identity
        self._lock = Lock()
        self._live: tuple[_Stored, ...] = ()
        self._given_up: tuple[_Stored, ...] = ()
        self._fences: tuple[int, ...] = ()
        self._next = 1
        self._mine: Ownership | None = None
        self._is_in_doubt = False
        self._failure: UnavailableError | None = None

    @classmethod
    def open(
        cls, objects: ObjectStore, partition: int, identity: str, *, reads_ahead: int = 8
    ) -> ObjectJournal:
        """Open the journal of `partition`, checking every byte; changes nothing.

        Parameters
        ----------
        objects
            The storage of the bank.
        partition
            The partition.
        identity
            Names bank and partition; a journal of another is refused.
        reads_ahead
            How many objects are read at the same time, at least 1.

        Raises
        ------
        CorruptionError
            If an object was changed, or objects are missing (JOURNAL_CORRUPT; metadata `file` and
            `offset`).
        FailedPreconditionError
            If the journal belongs to another bank or partition.
        """
        journal = cls(objects, partition, identity, reads_ahead=reads_ahead)
        for attempt in range(1, _OPEN_ATTEMPTS + 1):
            try:
                journal._load()
                break
            except NotFoundError:
                # An owner that is still at work trims what was just listed.
                if attempt == _OPEN_ATTEMPTS:
                    raise
        return journal

    @property
    def last_lsn(self) -> int:
        # docstring inherited
        return self._live[-1].last if self._live else 0

    @property
    def base(self) -> int:
        # docstring inherited
        return self._live[0].head.base if self._live else 0

    @property
    def num_bytes(self) -> int:
        # docstring inherited
        return sum(stored.num_bytes for stored in self._live)

    @property
    def ownership(self) -> Ownership | None:
        # docstring inherited
        return self._live[-1].head.ownership if self._live else None

    def replay(self, after_lsn: int) -> Iterator[Frame]:
        # docstring inherited
        wanted = [stored for stored in self._live if stored.last > after_lsn]
        contents = self._read_all(stored.number for stored in wanted)
        for stored, data in zip(wanted, contents, strict=True):
            if len(data) != stored.num_bytes:
                raise corrupt(self._name(stored.number), len(data), "the object changed its size")
            yield from content_frames(self._name(stored.number), data, after_lsn=after_lsn)

    def begin(self, ownership: Ownership, after_lsn: int) -> None:
        # docstring inherited
        with self._lock:
            self._mine = ownership
            try:
                self._create_fence(after_lsn)
            except BaseException:
                self._mine = None
                raise
        self.trim(after_lsn)

    def append(self, kind: FrameKind, payloads: Sequence[Payload]) -> int:
        # docstring inherited
        with self._lock:
            self._require_settled()
            if payloads:
                frames = encode_batch(kind, self.last_lsn, payloads)
                self._create_or_seal(self.last_lsn, frames, num_frames=len(payloads))
            return self.last_lsn

    def copy(self, frames: Sequence[Frame]) -> None:
        """Add frames of another journal as one batch.

        Parameters
        ----------
        frames
            At least one; they continue the log.
        """
        with self._lock:
            self._require_settled()
            assert frames[0].lsn == self.last_lsn + 1
            buffers = [b for f in frames for b in encode_frame(f.kind, f.lsn, [f.payload])]
            self._create_or_seal(self.last_lsn, buffers, num_frames=len(frames))

    def skip(self, lsn: int) -> None:
        """Go on after `lsn`, which is later than the log; what is stored is removed.

        Frames up to `lsn` must not be needed any more.
        """
        with self._lock:
            self._require_settled()
            self._create_or_seal(lsn, follows=self.last_lsn)
        self.trim(lsn)

    def settle(self) -> None:
        """Find out what became of a batch whose outcome is unknown.

        Unlike `append`, which seals the journal in that case, this takes it for good if it is in
        the log: `last_lsn` tells. For a caller that is about to add the same frames again.
        """
        with self._lock:
            self.require_usable()
            self._settle()

    def trim(self, lsn: int) -> None:
        # docstring inherited
        with self._lock:
            newest = self._live[-1] if self._live else None
            is_mine = self._mine is not None and self._failure is None
            if is_mine and newest is not None and newest.has_frames and newest.last <= lsn:
                # The newest object stays, so it must be one that holds nothing.
                self._require_settled()
                self._create_or_seal(self.last_lsn)
            covered = tuple(stored for stored in self._live[:-1] if stored.last <= lsn)
            # What was given up is the log until something replaces it.
            given_up = self._given_up if self._live else ()
        self._remove(given_up)
        self._remove(covered)
        self._remove_fences()

    def erase(self) -> None:
        # docstring inherited
        return  # objects that are removed are gone

    def discard(self) -> None:
        # docstring inherited
        with self._lock:
            self._mine = None
            self._give_up()

    def close(self) -> None:
        # docstring inherited
        self._failure = self._failure or self._unusable("it is closed")

    def require_usable(self) -> None:
        # docstring inherited
        if self._failure is not None:
            raise self._failure
        if self._mine is None:
            raise self._unusable("it was not begun")

    # ---- creating objects; the lock is held

    def _create(
        self,
        base: int,
        frames: Sequence[bytes | memoryview] = (),
        *,
        follows: int | None = None,
        num_frames: int = 0,
        is_fence: bool = False,
    ) -> None:
        """Create the next object.

        Raises
        ------
        AlreadyExistsError
            If there is one under that number that does not hold the same.
        """
        assert self._mine is not None
        before = (*self._given_up, *self._live)
        follows = (before[-1].last if before else base) if follows is None else follows
        last = base + num_frames
        head = SegmentHead(
            self._identity, self._mine, base, follows, self._next, last, is_fence=is_fence
        )
        data = b"".join([encode_head(head), *frames])
        # Whatever goes wrong below, only an answer that says so tells that it is not there.
        self._is_in_doubt = True
        publish(self._objects, self._key(self._next), data)
        self._take(_Stored(self._next, head, last, len(data)))

    def _create_fence(self, after_lsn: int) -> None:
        is_discarded = not self._live
        for _ in range(_BEGIN_ATTEMPTS):
            try:
                self._create(max(after_lsn, self.last_lsn), is_fence=True)
            except AlreadyExistsError:
                self._catch_up()
                if is_discarded:
                    self._give_up()
            else:
                return
        raise UnavailableError(
            f"another owner keeps on writing to {self._name()}; stop it and try again",
            reason=Reason.BANK_IN_USE,
            metadata={"object": self._name()},
        )

    def _create_or_seal(
        self,
        base: int,
        frames: Sequence[bytes | memoryview] = (),
        *,
        follows: int | None = None,
        num_frames: int = 0,
    ) -> None:
        try:
            self._create(base, frames, follows=follows, num_frames=num_frames)
        except AlreadyExistsError as err:
            raise self._seal_fenced() from err

    def _take(self, stored: _Stored) -> None:
        """Take note of an object that is in the log."""
        if stored.head.base != stored.head.follows:
            self._give_up()
        self._live += (stored,)
        self._next = stored.number + 1
        self._is_in_doubt = False

    def _give_up(self) -> None:
        self._given_up += self._live
        self._live = ()

    def _settle(self) -> None:
        if not self._is_in_doubt:
            return
        try:
            self._create(self.last_lsn, is_fence=True)
        except AlreadyExistsError as err:
            found = self._read(self._next)
            if found.head.ownership != self._mine:
                raise self._seal_fenced() from err
            self._take(found)

    def _require_settled(self) -> None:
        """Raise unless it is certain that the log ends where this journal believes."""
        self.require_usable()
        before = self.last_lsn
        self._settle()
        if self.last_lsn != before:
            # Whoever appended it was told that it failed, and has built on that.
            self._failure = self._unusable(
                f"frames {before + 1} to {self.last_lsn} were reported as failed, and are stored"
            )
            raise self._failure

    def _seal_fenced(self) -> UnavailableError:
        self._failure = UnavailableError(
            f"another owner has taken the partition over and continued {self._name()}; this one "
            "accepts nothing any more",
            reason=Reason.FENCED,
            metadata={"partition": str(self._partition), "object": self._name(self._next)},
        )
        return self._failure

    def _catch_up(self) -> None:
        """Take note of what another owner wrote since the log was read."""
        while True:
            try:
                found = self._read(self._next)
            except NotFoundError:
                return
            newest = [*self._live[-1:], found]
            check_chain([s.as_scan(self._name(s.number)) for s in newest], self._identity)
            self._take(found)

    # ---- removing

    def _remove(self, stored: Iterable[_Stored]) -> None:
        # Oldest first: a crash in between leaves a gap at the start, never one in the middle.
        for gone in stored:
            if gone.head.is_fence:
                self._fences = tuple(sorted({*self._fences, gone.number}))
            else:
                self._objects.delete(self._key(gone.number))
            with self._lock:
                self._live = tuple(kept for kept in self._live if kept is not gone)
                self._given_up = tuple(kept for kept in self._given_up if kept is not gone)

    def _remove_fences(self) -> None:
        for number in self._fences[:-_FENCES_KEPT]:
            self._objects.delete(self._key(number))
            self._fences = tuple(kept for kept in self._fences if kept != number)

    # ---- reading

    def _load(self) -> None:
        numbers = [self._number(key) for key in self._objects.list(log_prefix(self._partition))]
        numbers.sort()
        scans = [
            scan(self._name(number), data)
            for number, data in zip(numbers, self._read_all(numbers), strict=True)
        ]
        start = check_object_chain(scans, self._identity)
        found = tuple(_Stored.of(segment) for segment in scans)
        self._given_up = found[:start]
        self._live = found[start:]
        self._next = numbers[-1] + 1 if numbers else 1

    def _read(self, number: int) -> _Stored:
        return _Stored.of(scan(self._name(number), self._objects.get(self._key(number))))

    def _read_all(self, numbers: Iterable[int]) -> Iterator[bytes]:
        """Yield the objects in order, a few of them being on their way at any time."""
        if self._reads_ahead == 1:
            yield from (self._objects.get(self._key(number)) for number in numbers)
            return
        ahead: deque[Future[bytes]] = deque()
        with ThreadPoolExecutor(self._reads_ahead) as pool:
            for number in numbers:
                ahead.append(pool.submit(self._objects.get, self._key(number)))
                if len(ahead) >= self._reads_ahead:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()

    def _number(self, key: str) -> int:
        number = number_in(key, self._key)
        if not number:
            raise corrupt(f"{self._objects.url}/{key}", 0, "its name is not that of a log object")
        return number

    def _key(self, number: int) -> str:
        return log_key(self._partition, number)

    def _name(self, number: int | None = None) -> str:
        key = log_prefix(self._partition) if number is None else self._key(number)
        return f"{self._objects.url}/{key}"

    def _unusable(self, why: str) -> UnavailableError:
        return UnavailableError(
            f"the journal at {self._name()} accepts nothing: {why}; restart the shard",
            reason=Reason.STORE_FAILED,
            metadata={"object": self._name()},
        )
