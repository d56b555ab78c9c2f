"""Memory that another process of this machine may read: an arena of anonymous files.

An owner takes arrays out of a `SharedMemory`, fills them and says where they lie (`locate`); a peer
that is handed the segment's file descriptor maps it read-only (`MappedSegments`) and reads there.
Nothing has a name in any file system: what both sides have let go of, also by dying, is gone.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import threading
import weakref
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from membank.wire.buffers import rounded
from membank.wire.spec import Array
from membank.wire.wiping import register

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 64
"""A cache line. Copies between addresses that differ by 16 modulo the page size, as malloc's and
mmap's do, take 15 times as long on some processors (``rep movsb`` of glibc)."""
_MIN_SEGMENT_BYTES = 32 << 20
"""Bytes of a segment, but for a larger array, which has a segment of its own."""
_SEGMENT_SHARE = 32
"""Segments grow with the memory that is used, of which each new one is such a part: each takes a
pair of descriptors, of which a process often has no more than 1024, sockets and files included."""
_MIN_SLOT_BYTES = 4 << 10
_SPARE_SHARE = 8


@dataclass(frozen=True, slots=True)
class Place:
    """Where an array lies."""

    segment: int
    """Number of the segment, of this process and never used again."""
    offset: int
    """Bytes from the segment's beginning."""
    descriptor: int
    """File descriptor of the segment; valid as long as an array of it is alive."""


class _Segment:
    """One anonymous file, cut into slots of one size."""

    def __init__(self, number: int, slot_bytes: int, num_slots: int) -> None:
        self.number = number
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self.num_bytes = self.num_slots * slot_bytes
        self.free = list(range(self.num_slots))
        self.stale: set[int] = set()
        """Free slots that hold what was there before."""
        self.descriptor = os.memfd_create("membank", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        os.ftruncate(self.descriptor, self.num_bytes)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.mapping = mmap.mmap(self.descriptor, self.num_bytes)
        self.address = np.frombuffer(self.mapping, np.uint8).ctypes.data

    @property
    def is_empty(self) -> bool:
        return len(self.free) == self.num_slots

    def wipe(self, slot: int) -> None:
        """Overwrite a slot with zeros, for whoever has the segment mapped."""
        start = slot * self.slot_bytes
        np.frombuffer(self.mapping, np.uint8, self.slot_bytes, start).fill(0)

    def give_up(self) -> None:
        """Return the memory, also where a peer has the segment mapped still."""
        # Not by truncating: a peer that reads there would die of it, and so finds zeros.
        self.mapping.madvise(mmap.MADV_REMOVE)
        self._close()


class _Loan(weakref.ref[Bytes]):
    """An array that is in use: where it lies, and since when."""

    __slots__ = ("is_wiped", "num_wipes", "segment", "slot")

    segment: _Segment
    slot: int
    num_wipes: int
    """How often the memory had been wiped by then."""
    is_wiped: bool
    """True once nothing of what was in it is left."""

    def wipe(self) -> None:
        self.segment.wipe(self.slot)
        self.is_wiped = True


class _Returned:
    """Slots whose arrays have died, until the next `take` looks after them.

    Filled as arrays die, which may be anywhere, also in a thread that holds the lock of the memory: a
    deque takes an item without one.
    """

    # Apart from the memory, which an array that is in use would keep alive else.

    def __init__(self) -> None:
        self.loans: deque[_Loan] = deque()
        self.num_wipes = 0

    def add(self, loan: weakref.ref[Bytes]) -> None:
        assert isinstance(loan, _Loan)
        if loan.num_wipes != self.num_wipes:
            # It was in use when the others were wiped.
            loan.wipe()
        self.loans.append(loan)


class SharedMemory:
    """Hands out arrays that peers can be shown, and takes their memory back by itself.

    An array's memory is used again when nobody refers to it or to a view of it any more, and is
    warm then: memory fresh from the system takes four times as long to fill. Arrays of one size lie
    together, so that each fits exactly where another one was. Safe to use from threads.

    Memory that nobody uses is kept up to an eighth of what is used, and at least `min_spare_bytes` or
    the size of the array that was dropped last.

    Parameters
    ----------
    min_spare_bytes
        Bytes that nobody uses and that are kept in any case, >= 0.
    """

    def __init__(self, *, min_spare_bytes: int = 64 << 20) -> None:
        self._min_spare_bytes = min_spare_bytes
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._segments: dict[int, _Segment] = {}
        self._by_size: dict[int, dict[int, _Segment]] = {}
        self._addresses: list[int] = []
        self._by_address: list[_Segment] = []
        self._returned = _Returned()
        self._taken: dict[int, _Loan] = {}
        self._used_bytes = 0
        register(self)

    @property
    def num_bytes(self) -> int:
        """Bytes of all segments, used or not."""
        with self._lock:
            return sum(segment.num_bytes for segment in self._segments.values())

    def take(self, num_bytes: int) -> Bytes:
        """Return an array of `num_bytes` bytes of any content, aligned to 64 bytes.

        Parameters
        ----------
        num_bytes
            Its length, > 0.
        """
        slot_bytes = max(_MIN_SLOT_BYTES, aligned(num_bytes))
        with self._lock:
            self._collect()
            segment = self._with_room(slot_bytes)
            num_wipes = self._returned.num_wipes
            slot = segment.free.pop()
            segment.stale.discard(slot)
            self._used_bytes += slot_bytes
            if not segment.free:
                del self._by_size[slot_bytes][segment.number]
        memory = np.frombuffer(segment.mapping, np.uint8, num_bytes, slot * slot_bytes)
        # Views of it refer to it, and not to the mapping: numpy stops where an array's base is
        # no array. So it dies with the last of them.
        # No `weakref.finalize`, which takes longer than all the rest.
        loan = _Loan(memory, self._returned.add)
        loan.segment, loan.slot = segment, slot
        loan.num_wipes, loan.is_wiped = num_wipes, False
        self._taken[id(loan)] = loan
        return memory

    def wipe(self) -> None:
        """Overwrite with zeros all that nobody uses, now; and all that somebody uses, as it returns."""
        with self._lock:
            # First: what comes back from here on is wiped as it does.
            self._returned.num_wipes += 1
            self._collect()
            for segment in self._segments.values():
                for slot in segment.stale:
                    segment.wipe(slot)
                segment.stale.clear()

    def locate(self, array: Array) -> Place | None:
        """Return where a C-contiguous `array` lies; None = not in this memory."""
        address = array.ctypes.data
        with self._lock:
            index = bisect_right(self._addresses, address) - 1
            if index < 0:
                return None
            segment = self._by_address[index]
        offset = address - segment.address
        if offset >= segment.num_bytes:
            return None
        return Place(segment.number, offset, segment.descriptor)

    def place_of(self, array: Array) -> Place:
        """Return where an array of this memory lies."""
        place = self.locate(array)
        assert place is not None
        return place

    def _with_room(self, slot_bytes: int) -> _Segment:
        open_ones = self._by_size.setdefault(slot_bytes, {})
        if open_ones:
            return next(iter(open_ones.values()))
        segment_bytes = max(_MIN_SEGMENT_BYTES, self._used_bytes // _SEGMENT_SHARE)
        num_slots = max(1, segment_bytes // slot_bytes)
        segment = _Segment(next(self._numbers), slot_bytes, num_slots)
        self._segments[segment.number] = segment
        open_ones[segment.number] = segment
        self._index()
        return segment

    def _collect(self) -> None:
        """Take over what finalizers returned, and give up segments that are too many."""
        emptied = []
        while self._returned.loans:
            loan = self._taken.pop(id(self._returned.loans.popleft()))
            segment = loan.segment
            if not loan.is_wiped and loan.num_wipes != self._returned.num_wipes:
                # It came back while the others were wiped, too early to know and too late for that.
                loan.wipe()
            segment.free.append(loan.slot)
            if not loan.is_wiped:
                segment.stale.add(loan.slot)
            self._used_bytes -= segment.slot_bytes
            self._by_size[segment.slot_bytes][segment.number] = segment
            if segment.is_empty:
                emptied.append(segment)
        if not emptied:
            return
        # A large array's own segment stays for the next one of its size.
        largest = max((s.num_bytes for s in emptied if s.num_slots == 1), default=0)
        spare = max(self._min_spare_bytes, self._used_bytes // _SPARE_SHARE, largest)
        idle = [segment for segment in self._segments.values() if segment.is_empty]
        excess = sum(segment.num_bytes for segment in idle) - spare
        for segment in idle:
            if excess <= 0:
                break
            excess -= segment.num_bytes
            del self._segments[segment.number], self._by_size[segment.slot_bytes][segment.number]
            segment.give_up()
        self._index()

    def _index(self) -> None:
        self._by_address = sorted(self._segments.values(), key=lambda segment: segment.address)
        self._addresses = [segment.address for segment in self._by_address]


def aligned(num_bytes: int) -> int:
    """Round up to whole cache lines."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def pack(sizes: Sequence[int], memory: SharedMemory) -> tuple[list[Bytes], Bytes]:
    """Take one array and cut it into parts of `sizes` bytes; return the parts and the array.

    Its length is rounded up by less than an eighth, so that arrays of many lengths share memory.
    """
    total = max(1, sum(map(aligned, sizes)))
    whole = memory.take(rounded(total))
    ends = itertools.accumulate(map(aligned, sizes))
    return [
        whole[end - aligned(size) :][:size] for size, end in zip(sizes, ends, strict=True)
    ], whole


class MappedSegments:
    """Segments of a peer, mapped read-only; those that were used last are kept.

    Belongs to one connection to the peer, whose segment numbers it knows. Not safe for threads.

    Parameters
    ----------
    max_segments
        Most mappings that are kept.
    """

    def __init__(self, max_segments: int = 256) -> None:
        self._max_segments = max_segments
        self._mapped: OrderedDict[int, Bytes] = OrderedDict()

    def adopt(self, number: int, descriptor: int) -> None:
        """Map a segment unless that is done, and close `descriptor`.

        Raises
        ------
        OSError
            If it is no memory whose size is fixed.
        """
        try:
            if number not in self._mapped:
                _require_fixed_size(descriptor)
                size = os.fstat(descriptor).st_size
                mapping = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
                self._mapped[number] = np.frombuffer(mapping, np.uint8)
        finally:
            os.close(descriptor)
        self._mapped.move_to_end(number)
        while len(self._mapped) > self._max_segments:
            # Whoever still reads there holds the mapping.
            self._mapped.popitem(last=False)

    def view(self, number: int, offset: int, num_bytes: int) -> Bytes:
        """Return bytes of a segment, read-only; they may change at any time.

        Raises
        ------
        LookupError
            If there is no such segment, or it does not hold those bytes.
        """
        segment = self._mapped[number]
        view = segment[offset : offset + num_bytes]
        if view.size != num_bytes:
            raise LookupError(f"segment {number} has no {num_bytes} bytes from {offset} on")
        return view


def _require_fixed_size(descriptor: int) -> None:
    # Who reads where a file was cut off is killed by SIGBUS; what is no memfd has no seals (EINVAL).
    if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise PermissionError("the memory that the peer shows may shrink while it is read")
