"""The pool of landing buffers: memory is used again, but never while anybody can still see it."""

import gc
import platform
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from membank.wire.buffers import ALIGNMENT_BYTES, MIN_POOLED_BYTES, BufferPool
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import Array

SIZE = 1 << 20


def address(array: Array) -> int:
    return array.ctypes.data


def test_memory_is_used_again_once_its_array_is_gone() -> None:
    pool = BufferPool(SIZE)
    array = pool.take(SIZE)
    first = address(array)
    del array
    assert pool.idle_bytes == SIZE
    again = pool.take(SIZE)
    assert address(again) == first
    assert pool.idle_bytes == 0


@pytest.mark.parametrize(
    "derive",
    [
        lambda array: array.view(np.float32).reshape(2, -1),
        lambda array: array[8:16][2:4],
        lambda array: array.data,
        lambda array: memoryview(array)[4:],
        lambda array: np.frombuffer(array[16:], np.uint8),
        lambda array: np.from_dlpack(array[1:]),
        lambda array: np.asarray(array.view(np.uint16)).T,
    ],
)
def test_memory_is_not_used_again_while_anything_made_from_it_lives(
    derive: Callable[[Array], Any],
) -> None:
    pool = BufferPool(4 * SIZE)
    array = pool.take(SIZE)
    array[:] = 7
    derived = derive(array)
    before = bytes(derived)
    del array
    gc.collect()
    assert pool.idle_bytes == 0
    pool.take(SIZE)[:] = 9
    assert bytes(derived) == before
    del derived
    gc.collect()
    assert pool.idle_bytes == 2 * SIZE


def test_a_tensor_keeps_its_memory() -> None:
    torch = pytest.importorskip("torch")
    pool = BufferPool(4 * SIZE)
    array = pool.take(SIZE)
    array[:] = 7
    tensor = torch.from_numpy(array.view(np.float32).reshape(4, -1))[1]
    del array
    pool.take(SIZE)[:] = 9
    assert (tensor.view(torch.uint8) == 7).all()
    del tensor
    gc.collect()
    assert pool.idle_bytes == 2 * SIZE


@pytest.mark.parametrize("num_bytes", [0, 1, MIN_POOLED_BYTES - 1, MIN_POOLED_BYTES, 100_001, SIZE])
def test_an_array_has_the_size_asked_for_and_is_writable(num_bytes: int) -> None:
    for pool in (BufferPool(0), BufferPool(SIZE)):
        array = pool.take(num_bytes)
        assert array.shape == (num_bytes,)
        assert array.dtype == np.uint8
        assert array.flags.writeable
        if num_bytes >= MIN_POOLED_BYTES:
            assert address(array) % ALIGNMENT_BYTES == 0


def test_like_sizes_share_memory_and_unlike_ones_do_not() -> None:
    pool = BufferPool(8 * SIZE)
    first = address(pool.take(SIZE))
    assert address(pool.take(SIZE - 1000)) == first
    small = pool.take(SIZE // 2)
    assert address(small) != first


def test_no_more_is_kept_than_allowed_and_what_was_used_longest_ago_goes_first() -> None:
    pool = BufferPool(3 * SIZE)
    large, small = pool.take(2 * SIZE), pool.take(SIZE)
    small_at = address(small)
    del large, small
    assert pool.idle_bytes == 3 * SIZE
    other = pool.take(SIZE + SIZE // 2)
    del other
    # The large one made room.
    assert pool.idle_bytes == SIZE + SIZE + SIZE // 2
    assert address(pool.take(SIZE)) == small_at


def test_what_exceeds_the_bound_alone_leaves_the_rest_in_place() -> None:
    pool = BufferPool(SIZE)
    kept = address(pool.take(SIZE // 2))
    pool.take(4 * SIZE)
    assert pool.idle_bytes == SIZE // 2
    assert address(pool.take(SIZE // 2)) == kept


def test_nothing_is_kept_where_nothing_may_be() -> None:
    pool = BufferPool(0)
    pool.take(SIZE)
    assert pool.idle_bytes == 0


def test_arrays_outlive_their_pool() -> None:
    pool = BufferPool(SIZE)
    array = pool.take(SIZE)
    array[:] = 3
    del pool
    gc.collect()
    assert (array == 3).all()


def test_a_negative_bound_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="max_bytes is -1"):
        BufferPool(-1)


def test_threads_never_get_the_same_memory_at_one_time() -> None:
    pool = BufferPool(2 * SIZE)
    torn: list[int] = []

    def work(mark: int) -> None:
        held: list[Array] = []
        for turn in range(200):
            array = pool.take(MIN_POOLED_BYTES << (turn % 3))
            array[:] = mark
            held.append(array)
            if len(held) > 3:
                oldest = held.pop(0)
                if not (oldest == mark).all():
                    torn.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not torn
    gc.collect()
    assert 0 < pool.idle_bytes <= 2 * SIZE


def test_memory_that_comes_back_within_a_collection_is_not_lost() -> None:
    pool = BufferPool(64 * SIZE)
    for _ in range(8):
        cycle: list[object] = [pool.take(SIZE)]
        cycle.append(cycle)
        del cycle
    gc.collect()
    assert pool.idle_bytes == 8 * SIZE


_COUNT_FAULTS = """
import resource
import numpy as np
from membank.wire.buffers import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.empty(900_000, np.uint8)[::4096] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
faults()
print(faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_kept_for_the_next_message() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _COUNT_FAULTS], capture_output=True, text=True, check=True
    )
    # Fresh memory would fault on each of its 4,400 pages.
    assert int(run.stdout) < 400
