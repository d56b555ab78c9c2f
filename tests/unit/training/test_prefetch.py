"""Prefetch: the same losses as without it, a bound, order of own updates, errors at the next call."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from membank.trainer.training import Acknowledged, Fetched, InProcessMemory, PrefetchingMemory
from membank.wire.errors import InvalidArgumentError, UnavailableError
from membank.wire.spec import BankSpec, BlockRef

PLAN = [(0, 1), (1, 2), (3, 4), (0, 3), (5,), (5, 1), (2, 4), (0, 1), (0, 1), (3,)]
WAIT_S = 10


def _refs(clusters: Sequence[int]) -> list[BlockRef]:
    return [BlockRef(2, cluster) for cluster in clusters]


class Recording:
    """Tells what was asked, and can hold a push back or let it fail."""

    def __init__(self, source: InProcessMemory) -> None:
        self._source = source
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.may_push = threading.Event()
        self.may_push.set()
        self.fetched = threading.Semaphore(0)
        self.failure: Exception | None = None

    @property
    def spec(self) -> BankSpec:
        return self._source.spec

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        self.calls.append(("fetch", tuple(ref.cluster for ref in refs)))
        fetched = self._source.fetch(refs)
        self.fetched.release()
        return fetched

    def push(
        self,
        gradients: Mapping[BlockRef, Tensor],
        versions: Mapping[BlockRef, int],
        *,
        step: int,
        learning_rate_scale: float = 1.0,
    ) -> tuple[Acknowledged, ...]:
        assert self.may_push.wait(WAIT_S)
        if self.failure is not None:
            raise self.failure
        self.calls.append(("push", tuple(ref.cluster for ref in gradients)))
        return self._source.push(
            gradients, versions, step=step, learning_rate_scale=learning_rate_scale
        )

    def flush(self) -> tuple[Acknowledged, ...]:
        return self._source.flush()


@pytest.fixture
def source(spec: BankSpec) -> Recording:
    return Recording(InProcessMemory(spec))


def _gradients(fetched: Fetched, step: int) -> dict[BlockRef, Tensor]:
    """Depends on what was fetched, so that a block fetched too early shows in the end."""
    return {ref: torch.sin(weight * 9 + step) for ref, weight in fetched.weights.items()}


@pytest.mark.parametrize("depth", [1, 2, 3, 20])
def test_every_fetch_sees_what_it_would_see_without_prefetch(spec: BankSpec, depth: int) -> None:
    plain = InProcessMemory(spec)
    behind = InProcessMemory(spec)
    plan = [_refs(clusters) for clusters in PLAN] * 3
    acknowledged: list[Acknowledged] = []
    with PrefetchingMemory(behind, plan, depth=depth) as prefetching:
        for step, refs in enumerate(plan):
            expected, found = plain.fetch(refs), prefetching.fetch(refs)
            assert found.versions == expected.versions
            assert all(torch.equal(found.weights[r], expected.weights[r]) for r in refs)
            gradients = _gradients(expected, step)
            plain.push(gradients, expected.versions, step=step)
            acknowledged += prefetching.push(gradients, found.versions, step=step)
        acknowledged += prefetching.flush()
    assert [push.step for push in acknowledged] == list(range(len(plan)))
    assert all(result.accepted for push in acknowledged for result in push.results)


def test_blocks_that_nobody_writes_are_fetched_while_the_batch_computes(source: Recording) -> None:
    with PrefetchingMemory(source, [_refs(c) for c in PLAN], depth=2) as prefetching:
        prefetching.fetch(_refs(PLAN[0]))
        for _ in range(3):
            assert source.fetched.acquire(timeout=WAIT_S)
        # Batch 1 shares block 1 with the present batch; batch 2 shares nothing.
        assert source.calls == [("fetch", (0, 1)), ("fetch", (2,)), ("fetch", (3, 4))]


def test_no_more_than_depth_batches_are_read_ahead(source: Recording) -> None:
    given: list[int] = []

    def plan() -> Iterator[list[BlockRef]]:
        for number, clusters in enumerate(PLAN):
            given.append(number)
            yield _refs(clusters)

    with PrefetchingMemory(source, plan(), depth=2) as prefetching:
        prefetching.fetch(_refs(PLAN[0]))
        assert given == [0, 1, 2]
        prefetching.fetch(_refs(PLAN[1]))
        assert given == [0, 1, 2, 3]


def test_a_block_of_a_push_under_way_waits_for_its_acknowledgement(source: Recording) -> None:
    with PrefetchingMemory(source, [_refs((0, 1)), _refs((1,))], depth=1) as prefetching:
        fetched = prefetching.fetch(_refs((0, 1)))
        source.may_push.clear()
        assert prefetching.push(_gradients(fetched, 0), fetched.versions, step=0) == ()
        later: list[Fetched] = []
        thread = threading.Thread(target=lambda: later.append(prefetching.fetch(_refs((1,)))))
        thread.start()
        assert source.calls == [("fetch", (0, 1))]
        source.may_push.set()
        thread.join(WAIT_S)
        assert source.calls == [("fetch", (0, 1)), ("push", (0, 1)), ("fetch", (1,))]
        assert later[0].versions == {BlockRef(2, 1): 1}


def test_an_error_of_a_push_surfaces_once_at_the_next_call(source: Recording) -> None:
    with PrefetchingMemory(source, [_refs((0,)), _refs((0,)), _refs((0,))]) as prefetching:
        fetched = prefetching.fetch(_refs((0,)))
        source.failure = UnavailableError("shard is gone")
        prefetching.push(_gradients(fetched, 0), fetched.versions, step=0)
        with pytest.raises(UnavailableError, match="gone"):
            prefetching.flush()
        assert prefetching.flush() == ()


def test_another_batch_than_the_planned_one_is_refused(source: Recording) -> None:
    with (
        PrefetchingMemory(source, [_refs((0,))]) as prefetching,
        pytest.raises(InvalidArgumentError, match="planned"),
    ):
        prefetching.fetch(_refs((1,)))
    with pytest.raises(InvalidArgumentError, match="depth"):
        PrefetchingMemory(source, [], depth=0)
