"""An arena hands out memory once, takes it back by itself, and shows it to peers."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from membank.wire.copying import copy_checked
from membank.wire.crc import crc32c
from membank.wire.shared_memory import MappedSegments, SharedMemory

MIB = 1 << 20


def test_a_peer_reads_what_the_owner_writes() -> None:
    memory, peer = SharedMemory(), MappedSegments()
    array = memory.take(3 * MIB)[1000:].view(np.float32)
    array[:] = 7.5
    place = memory.locate(array)
    assert place is not None
    peer.adopt(place.segment, os.dup(place.descriptor))
    seen = peer.view(place.segment, place.offset, array.nbytes)
    assert (seen.view(np.float32) == 7.5).all()
    assert not seen.flags.writeable
    array[3] = 1.0
    assert seen.view(np.float32)[3] == 1.0


def test_what_lies_elsewhere_is_not_located() -> None:
    memory = SharedMemory()
    assert memory.locate(np.zeros(8)) is None
    taken = memory.take(MIB)
    assert memory.locate(np.zeros(8)) is None
    assert SharedMemory().locate(taken) is None


def test_memory_is_used_again_once_no_view_is_left() -> None:
    memory = SharedMemory()
    array = memory.take(MIB)
    address = array.ctypes.data
    view = array[16:].view(np.float32)
    del array
    other = memory.take(MIB)
    assert other.ctypes.data != address
    del view
    assert memory.take(MIB).ctypes.data == address


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5 * MIB), st.booleans()), max_size=40))
def test_arrays_in_use_never_overlap(steps: list[tuple[int, bool]]) -> None:
    memory = SharedMemory()
    held: list[np.ndarray] = []
    for size, drops in steps:
        if drops and held:
            held.pop(len(held) // 2)
        array = memory.take(size)
        assert array.size == size
        assert array.ctypes.data % 64 == 0
        held.append(array)
    spans = sorted((a.ctypes.data, a.ctypes.data + a.size) for a in held)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_idle_memory_is_given_up_beyond_the_spare() -> None:
    memory = SharedMemory()
    held = [memory.take(40 * MIB + index) for index in range(6)]
    assert memory.num_bytes >= 240 * MIB
    held.clear()
    memory.take(1)
    assert memory.num_bytes <= (64 + 40 + 32 + 1) * MIB


def test_an_owner_says_how_much_idle_memory_is_worth_keeping() -> None:
    memory = SharedMemory(min_spare_bytes=200 * MIB)
    held = [memory.take(40 * MIB) for _ in range(5)]
    addresses = {array.ctypes.data for array in held}
    held.clear()
    assert {memory.take(40 * MIB).ctypes.data} < addresses
    assert memory.num_bytes == 200 * MIB


def test_a_large_array_takes_the_place_of_the_one_before() -> None:
    memory = SharedMemory()
    array = memory.take(200 * MIB)
    address = array.ctypes.data
    del array
    assert memory.take(200 * MIB).ctypes.data == address


def test_memory_that_was_given_up_is_returned_although_a_peer_has_it_mapped() -> None:
    memory, peer = SharedMemory(), MappedSegments()
    array = memory.take(100 * MIB)
    other = memory.take(101 * MIB)
    array[:] = 1
    place = memory.locate(array)
    assert place is not None
    handle = os.dup(place.descriptor)
    peer.adopt(place.segment, os.dup(place.descriptor))
    seen = peer.view(place.segment, place.offset, array.size)
    assert os.fstat(handle).st_blocks * 512 >= array.size
    del array, other  # of which one is kept
    memory.take(1)
    assert os.fstat(handle).st_blocks == 0
    os.close(handle)
    assert not seen.any()  # and no SIGBUS


def test_no_descriptor_leaks() -> None:
    gc.collect()  # arenas of other tests
    before = len(list(Path("/proc/self/fd").iterdir()))
    memory, peer = SharedMemory(), MappedSegments(max_segments=2)
    for size in range(1, 9):
        array = memory.take(33 * MIB * size // 8)
        place = memory.locate(array)
        assert place is not None
        for _ in range(2):
            peer.adopt(place.segment, os.dup(place.descriptor))
        del array
    del memory, peer
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_much_memory_takes_few_descriptors() -> None:
    # None of it is touched, so none is really there.
    before = len(list(Path("/proc/self/fd").iterdir()))
    memory = SharedMemory()
    held = [memory.take(40 * MIB + 64 * (index % 3)) for index in range(1_500)]
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 400
    held.clear()
    memory.take(1)
    assert memory.num_bytes <= (64 + 40 + 32 + 1) * MIB


def test_a_peer_is_told_of_what_it_does_not_have() -> None:
    memory, peer = SharedMemory(), MappedSegments()
    array = memory.take(MIB)
    place = memory.locate(array)
    assert place is not None
    with pytest.raises(LookupError):
        peer.view(place.segment, 0, 1)
    peer.adopt(place.segment, os.dup(place.descriptor))
    with pytest.raises(LookupError):
        peer.view(place.segment, 31 * MIB, 2 * MIB)


@pytest.mark.parametrize("sealed", [False, True])
def test_memory_that_may_shrink_is_not_mapped(tmp_path: Path, sealed: bool) -> None:
    if sealed:
        handle = os.memfd_create("test")  # may not be sealed, and so is not
    else:
        handle = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    os.ftruncate(handle, MIB)
    with pytest.raises(OSError, match=r"shrink|Invalid"):
        MappedSegments().adopt(1, handle)
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(handle)


def test_threads_take_and_drop() -> None:
    memory = SharedMemory()
    faults: list[int] = []

    def work(number: int) -> None:
        for _ in range(300):
            array = memory.take(256 << 10)
            array[:] = number
            if not (array == number).all():
                faults.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert memory.num_bytes <= 32 * MIB


@pytest.mark.parametrize("size", [0, 1, 1000, 2 * MIB - 1, 2 * MIB, 5 * MIB + 3])
def test_a_checked_copy_is_the_bytes_and_their_checksum(size: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    target = np.zeros_like(source)
    assert copy_checked(target, source) == crc32c(source)
    assert (target == source).all()
