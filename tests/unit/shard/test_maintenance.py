"""Work beside answering: in the caller, or in threads that survive what they run."""

from __future__ import annotations

import threading

import pytest

from membank.bank_service.shard.maintenance import InlineMaintenance, ThreadMaintenance

WAIT_S = 20.0


class _Partition:
    """Counts consolidations; blocks in them while told to."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.num_consolidations = 0
        self.thread: threading.Thread | None = None
        self.may_end = threading.Event()
        self.may_end.set()
        self.begun = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)
        self.error: Exception | None = None

    def try_consolidate(self) -> None:
        self.thread = threading.current_thread()
        self.begun.release()
        assert self.may_end.wait(WAIT_S)
        self.num_consolidations += 1
        self.ended.release()
        if self.error is not None:
            raise self.error


def test_inline_consolidates_in_the_call() -> None:
    partition = _Partition()
    maintenance = InlineMaintenance()
    maintenance.request(partition)
    assert partition.thread is threading.current_thread()
    maintenance.close()


def test_a_thread_consolidates_and_requests_meanwhile_are_one() -> None:
    partition = _Partition()
    partition.may_end.clear()
    maintenance = ThreadMaintenance()
    maintenance.request(partition)
    assert partition.begun.acquire(timeout=WAIT_S)
    for _ in range(5):
        maintenance.request(partition)
    partition.may_end.set()
    assert partition.ended.acquire(timeout=WAIT_S)
    assert partition.ended.acquire(timeout=WAIT_S)
    maintenance.close()
    assert partition.num_consolidations == 2
    assert partition.thread is not threading.current_thread()


@pytest.mark.filterwarnings("default")
def test_a_failure_does_not_end_the_thread() -> None:
    bad, good = _Partition(1), _Partition(2)
    bad.error = RuntimeError("broken")
    maintenance = ThreadMaintenance()
    maintenance.request(bad)
    assert bad.ended.acquire(timeout=WAIT_S)
    maintenance.request(good)
    assert good.ended.acquire(timeout=WAIT_S)
    maintenance.close()


def test_a_duty_is_repeated_whatever_it_raises_until_the_end() -> None:
    maintenance = ThreadMaintenance()
    calls = threading.Semaphore(0)

    def duty() -> None:
        calls.release()
        raise RuntimeError("broken")

    maintenance.every(0.001, duty)
    for _ in range(3):
        assert calls.acquire(timeout=WAIT_S)
    maintenance.close()
    maintenance.close()


def test_closing_waits_for_what_is_under_way() -> None:
    partition = _Partition()
    partition.may_end.clear()
    maintenance = ThreadMaintenance()
    maintenance.request(partition)
    assert partition.begun.acquire(timeout=WAIT_S)
    closer = threading.Thread(target=maintenance.close)
    closer.start()
    partition.may_end.set()
    closer.join(WAIT_S)
    assert partition.num_consolidations == 1
