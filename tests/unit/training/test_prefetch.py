"""Prefetch: the same losses as without it, bounds, order of own updates, errors where they belong."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from membank.trainer.corpus import PackedSequences
from membank.trainer.model import Anchor
from membank.trainer.training import (
    Acknowledged,
    Fetched,
    InProcessMemory,
    MemorySource,
    MemoryStageConfig,
    PrefetchConfig,
    PrefetchingMemory,
    train_memories,
)
from membank.wire.errors import InvalidArgumentError, UnavailableError
from membank.wire.records import UpdateResult
from membank.wire.spec import BankSpec, BlockRef
from wrapped_memory import WrappedMemory

PLAN = [(0, 1), (1, 2), (3, 4), (0, 3), (5,), (5, 1), (2, 4), (0, 1), (0, 1), (3,)]
WAIT_S = 10


def _refs(clusters: Sequence[int]) -> list[BlockRef]:
    return [BlockRef(2, cluster) for cluster in clusters]


class Recording(WrappedMemory):
    """Tells what was asked; sends the awaited gradients first; can hold back either part, or fail."""

    def __init__(self, source: MemorySource) -> None:
        super().__init__(source)
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.called = threading.Semaphore(0)
        self.may_push = threading.Event()
        self.may_push_others = threading.Event()
        self.may_push.set()
        self.may_push_others.set()
        self.push_failure: Exception | None = None
        self.fetch_failures: dict[int, Exception] = {}

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        self._note("fetch", refs)
        for ref in refs:
            if ref.cluster in self.fetch_failures:
                raise self.fetch_failures[ref.cluster]
        return super().fetch(refs)

    def push(
        self,
        gradients: Mapping[BlockRef, Tensor],
        versions: Mapping[BlockRef, int],
        *,
        step: int,
        learning_rate_scale: float = 1.0,
        first: Sequence[BlockRef] = (),
        then: Callable[[], None] | None = None,
    ) -> tuple[Acknowledged, ...]:
        awaited = {ref: gradients[ref] for ref in first}
        others = {ref: values for ref, values in gradients.items() if ref not in awaited}
        results: list[UpdateResult] = []
        for part, may, call in (
            (awaited, self.may_push, then),
            (others, self.may_push_others, None),
        ):
            assert may.wait(WAIT_S)
            if self.push_failure is not None:
                raise self.push_failure
            self._note("push", list(part))
            (sent,) = super().push(
                part, versions, step=step, learning_rate_scale=learning_rate_scale
            )
            results += sent.results
            if call is not None:
                call()
        return (Acknowledged(step=step, results=tuple(results)),)

    def wait_for_calls(self, count: int) -> None:
        for _ in range(count):
            assert self.called.acquire(timeout=WAIT_S)

    def _note(self, what: str, refs: Sequence[BlockRef]) -> None:
        if refs:
            self.calls.append((what, tuple(ref.cluster for ref in refs)))
            self.called.release()


@pytest.fixture
def source(spec: BankSpec) -> Recording:
    return Recording(InProcessMemory(spec))


def _depth(depth: int) -> PrefetchConfig:
    return PrefetchConfig(depth=depth)


def _gradients(fetched: Fetched, step: int) -> dict[BlockRef, Tensor]:
    """Depends on what was fetched, so that a block fetched too early shows in the end."""
    return {ref: torch.sin(weight * 9 + step) for ref, weight in fetched.weights.items()}


def _push(memory: MemorySource, fetched: Fetched, step: int = 0) -> tuple[Acknowledged, ...]:
    return memory.push(_gradients(fetched, step), fetched.versions, step=step)


@pytest.mark.parametrize("depth", [1, 2, 3, 20])
@pytest.mark.parametrize("max_blocks", [1, 3, 100])
@pytest.mark.parametrize("in_parts", [False, True])
def test_every_fetch_sees_what_it_would_see_without_prefetch(
    spec: BankSpec, depth: int, max_blocks: int, in_parts: bool
) -> None:
    plain, behind = InProcessMemory(spec), InProcessMemory(spec)
    source = Recording(behind) if in_parts else behind
    config = PrefetchConfig(depth=depth, max_bytes=max_blocks * spec.block_params(2) * 4)
    plan = [_refs(clusters) for clusters in PLAN] * 3
    acknowledged: list[Acknowledged] = []
    with PrefetchingMemory(source, plan, config) as prefetching:
        for step, refs in enumerate(plan):
            expected, found = plain.fetch(refs), prefetching.fetch(refs)
            assert found.versions == expected.versions
            assert all(torch.equal(found.weights[r], expected.weights[r]) for r in refs)
            _push(plain, expected, step)
            acknowledged += _push(prefetching, found, step)
        acknowledged += prefetching.flush()
    assert [push.step for push in acknowledged] == list(range(len(plan)))
    assert all(result.accepted for push in acknowledged for result in push.results)


def test_blocks_that_nobody_writes_are_fetched_while_the_batch_computes(source: Recording) -> None:
    with PrefetchingMemory(source, [_refs(c) for c in PLAN], _depth(2)) as prefetching:
        prefetching.fetch(_refs(PLAN[0]))
        source.wait_for_calls(3)
        # Batch 1 shares block 1 with the present batch; batch 2 shares nothing.
        assert source.calls == [("fetch", (0, 1)), ("fetch", (2,)), ("fetch", (3, 4))]


def test_what_the_next_batch_waits_for_is_pushed_and_fetched_before_the_rest(
    source: Recording,
) -> None:
    with PrefetchingMemory(source, [_refs(c) for c in PLAN[:2]]) as prefetching:
        fetched = prefetching.fetch(_refs(PLAN[0]))
        source.may_push_others.clear()
        assert _push(prefetching, fetched) == ()
        # It begins although the gradient of block 0 is still to be sent.
        found = prefetching.fetch(_refs(PLAN[1]))
        assert found.versions == {BlockRef(2, 1): 1, BlockRef(2, 2): 0}
        assert source.calls[2:] == [("push", (1,)), ("fetch", (1,))]
        source.may_push_others.set()
        (push,) = prefetching.flush()
        assert source.calls[4:] == [("push", (0,))]
        assert [result.ref for result in push.results] == _refs((1, 0))


def test_a_block_of_a_push_under_way_is_fetched_behind_it(source: Recording) -> None:
    with PrefetchingMemory(source, [_refs(c) for c in ((0,), (1,), (0,))]) as prefetching:
        fetched = prefetching.fetch(_refs((0,)))
        source.may_push_others.clear()
        _push(prefetching, fetched)
        prefetching.fetch(_refs((1,)))  # plans the batch that block 0 is needed for
        source.wait_for_calls(2)
        assert source.calls == [("fetch", (0,)), ("fetch", (1,))]
        source.may_push_others.set()
        source.wait_for_calls(2)
        assert source.calls[2:] == [("push", (0,)), ("fetch", (0,))]
        assert prefetching.fetch(_refs((0,))).versions == {BlockRef(2, 0): 1}


def test_no_more_than_depth_batches_are_read_ahead(source: Recording) -> None:
    given: list[int] = []

    def plan() -> Iterator[list[BlockRef]]:
        for number, clusters in enumerate(PLAN):
            given.append(number)
            yield _refs(clusters)

    with PrefetchingMemory(source, plan(), _depth(2)) as prefetching:
        prefetching.fetch(_refs(PLAN[0]))
        assert given == [0, 1, 2]
        prefetching.fetch(_refs(PLAN[1]))
        assert given == [0, 1, 2, 3]


def test_no_more_than_max_bytes_are_held_ahead(source: Recording) -> None:
    config = PrefetchConfig(depth=2, max_bytes=3 * source.spec.block_params(2) * 4)
    plan = [_refs(c) for c in ((0,), (1, 2), (3, 4), (5,))]
    with PrefetchingMemory(source, plan, config) as prefetching:
        prefetching.fetch(_refs((0,)))
        source.wait_for_calls(3)
        assert source.calls == [("fetch", (0,)), ("fetch", (1, 2)), ("fetch", (3,))]
        prefetching.fetch(_refs((1, 2)))
        source.wait_for_calls(2)
        assert source.calls[3:] == [("fetch", (4,)), ("fetch", (5,))]
    tight = PrefetchConfig(max_bytes=1)
    with PrefetchingMemory(source, plan, tight) as prefetching:
        del source.calls[:]
        for clusters in ((0,), (1, 2), (3, 4), (5,)):
            prefetching.fetch(_refs(clusters))
            assert source.calls.pop() == ("fetch", clusters)
            assert not source.calls


def test_an_error_of_a_push_surfaces_once_at_the_next_call(source: Recording) -> None:
    with PrefetchingMemory(source, [_refs((0,)), _refs((0,)), _refs((0,))]) as prefetching:
        fetched = prefetching.fetch(_refs((0,)))
        source.push_failure = UnavailableError("shard is gone")
        _push(prefetching, fetched)
        with pytest.raises(UnavailableError, match="gone"):
            prefetching.flush()
        assert prefetching.flush() == ()


def test_a_batch_that_waits_for_a_failed_push_gets_its_error_and_can_be_fetched_again(
    source: Recording,
) -> None:
    with PrefetchingMemory(source, [_refs(c) for c in PLAN[:2]]) as prefetching:
        fetched = prefetching.fetch(_refs(PLAN[0]))
        source.push_failure = UnavailableError("shard is gone")
        _push(prefetching, fetched)
        with pytest.raises(UnavailableError, match="gone"):
            prefetching.fetch(_refs(PLAN[1]))
        assert set(prefetching.fetch(_refs(PLAN[1])).versions) == set(_refs(PLAN[1]))


@pytest.mark.parametrize("cluster", [1, 2], ids=["awaited", "ahead"])
def test_an_error_of_a_fetch_surfaces_at_its_batch_and_not_at_the_push(
    source: Recording, cluster: int
) -> None:
    with PrefetchingMemory(source, [_refs(c) for c in PLAN[:3]], _depth(2)) as prefetching:
        fetched = prefetching.fetch(_refs(PLAN[0])) if cluster == 1 else None
        source.fetch_failures[cluster] = UnavailableError("shard is gone")
        fetched = fetched or prefetching.fetch(_refs(PLAN[0]))
        _push(prefetching, fetched)
        (push,) = prefetching.flush()
        assert all(result.accepted for result in push.results)
        with pytest.raises(UnavailableError, match="gone"):
            prefetching.fetch(_refs(PLAN[1]))


def test_closing_waits_for_the_push_under_way(source: Recording) -> None:
    with PrefetchingMemory(source, [_refs(c) for c in ((0,), (0,), (0,))]) as prefetching:
        fetched = prefetching.fetch(_refs((0,)))
        source.may_push.clear()
        _push(prefetching, fetched)
        closing = threading.Thread(target=prefetching.close)
        closing.start()
        source.may_push.set()
        closing.join(WAIT_S)
        assert not closing.is_alive()
        assert source.source.fetch(_refs((0,))).versions == {BlockRef(2, 0): 1}


class Interrupting(WrappedMemory):
    """Raises Ctrl-C in the main thread while a push is under way in another."""

    def push(
        self,
        gradients: Mapping[BlockRef, Tensor],
        versions: Mapping[BlockRef, int],
        *,
        step: int,
        learning_rate_scale: float = 1.0,
        first: Sequence[BlockRef] = (),
        then: Callable[[], None] | None = None,
    ) -> tuple[Acknowledged, ...]:
        if step == 3:
            _thread.interrupt_main()
        return super().push(
            gradients,
            versions,
            step=step,
            learning_rate_scale=learning_rate_scale,
            first=first,
            then=then,
        )


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """Have Ctrl-C raise, also in a run that was started in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_ends_the_stage_with_no_thread_left(
    anchor: Anchor, sequences: PackedSequences, spec: BankSpec
) -> None:
    memory = InProcessMemory(spec)
    config = MemoryStageConfig(num_tokens=30 * 6 * 12, batch_size=6, run_length=2)
    with pytest.raises(KeyboardInterrupt):
        train_memories(anchor, Interrupting(memory), sequences, config)
    assert memory.num_steps >= 4  # the push that was interrupted is whole
    assert not [t for t in threading.enumerate() if t.name.startswith(("membank-f", "membank-p"))]


def test_another_batch_than_the_planned_one_is_refused(source: Recording) -> None:
    with (
        PrefetchingMemory(source, [_refs((0,))]) as prefetching,
        pytest.raises(InvalidArgumentError, match="planned"),
    ):
        prefetching.fetch(_refs((1,)))
    with pytest.raises(InvalidArgumentError, match="depth"):
        PrefetchingMemory(source, [], _depth(0))


@pytest.mark.parametrize(("field", "value"), [("depth", -1), ("max_bytes", 0)])
def test_settings_out_of_range_name_the_field(field: str, value: int) -> None:
    with pytest.raises(InvalidArgumentError, match=field):
        PrefetchConfig(**{field: value})
