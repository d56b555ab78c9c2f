"""What waits for storage waits together."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from membank.bank_service.shard import Shard
from membank.bank_service.store import Bank
from membank.wire.errors import CorruptionError
from membank.wire.loaders import Loaders
from tiny_bank import UnsyncedObjects, create_bank, file_bytes, make_update


@given(st.lists(st.integers(), max_size=40))
def test_results_are_in_the_order_of_the_items(items: list[int]) -> None:
    assert Loaders().map(lambda item: item + 1, items) == [item + 1 for item in items]


def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(ZeroDivisionError):
        Loaders().map(lambda item: 1 // item, [1, 0, 2])


def test_a_call_that_finds_all_threads_at_work_does_not_wait_for_them() -> None:
    loaders = Loaders()
    at_work, go = threading.Semaphore(0), threading.Event()

    def load(item: int) -> int:
        at_work.release()
        assert go.wait(30)
        return item

    large = threading.Thread(target=lambda: loaders.map(load, range(100)))
    large.start()
    for _ in range(8):
        assert at_work.acquire(timeout=30)
    assert loaders.map(lambda item: -item, range(3)) == [0, -1, -2]
    go.set()
    large.join()
    loaders.close()
    assert loaders.map(lambda item: -item, range(3)) == [0, -1, -2]


def test_help_that_comes_although_no_thread_could_be_started_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaders = Loaders(2)
    at_work, go, begun = threading.Semaphore(0), threading.Event(), threading.Event()

    def keep_busy(item: int) -> int:
        at_work.release()
        assert go.wait(30)
        return item

    other = threading.Thread(target=lambda: loaders.map(keep_busy, range(2)))
    other.start()
    for _ in range(2):
        assert at_work.acquire(timeout=30)

    def refuse(thread: threading.Thread) -> None:
        del thread
        raise RuntimeError("can't start new thread")

    def load(item: int) -> int:
        if item == 0:
            go.set()
            # The pool's only thread is free now, and finds what was handed to another one.
            begun.wait(1)
        else:
            begun.set()
            other.join(30)
        return item

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert loaders.map(load, range(2)) == [0, 1]
    loaders.close()


class _Rendezvous(UnsyncedObjects):
    """Answers a read of a slot only while another one is under way."""

    barrier = threading.Barrier(2, timeout=30)

    def get_checked(self, key: str, num_bytes: int) -> tuple[memoryview, int]:
        self.barrier.wait()
        return super().get_checked(key, num_bytes)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    create_bank(tmp_path)
    shard = Shard.open(UnsyncedObjects(tmp_path))
    shard.push(make_update(shard, list(shard.spec.blocks())[:2], "u"))
    shard.close()
    return tmp_path


def test_blocks_of_one_fetch_are_read_side_by_side(root: Path) -> None:
    shard = Shard.open(Bank.open(_Rendezvous(root)))
    fetched = shard.fetch(list(shard.spec.blocks())[:2])
    assert [block.header.version for block in fetched.blocks] == [1, 1]
    shard.close()


def test_a_damaged_block_fails_the_fetch(root: Path) -> None:
    shard = Shard.open(UnsyncedObjects(root))
    name = next(name for name in file_bytes(root) if name.endswith("weight/c.0.0.0.0.0"))
    (root / name).write_bytes(b"x")
    with pytest.raises(CorruptionError):
        shard.fetch(list(shard.spec.blocks()))
    shard.close()
