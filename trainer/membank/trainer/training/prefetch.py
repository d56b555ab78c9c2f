"""Fetches the blocks of the next batches, and sends gradients, while the present batch computes.

A block may only be fetched ahead if no own push that comes before its use is still to be made or
to be acknowledged. So what a batch sees is exactly what it would see without prefetch, as far as
this worker's own updates go; the blocks that two successive batches share are fetched in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from torch import Tensor

from membank.trainer.training.source import Acknowledged, Fetched, MemorySource
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BankSpec, BlockRef

_NEVER = -1


class PrefetchingMemory:
    """A memory source that knows the next batches.

    Parameters
    ----------
    source
        Source to fetch from and to push to; used from two threads of its own besides the
        caller's. It stays the caller's to close.
    upcoming
        Blocks of each batch, in the order in which they will be fetched; read ahead by `depth`.
    depth
        Batches that may be held fetched ahead of the present one, at least 1.

    Notes
    -----
    For one caller: each `fetch` is the next batch, and a `push` belongs to the last one fetched.
    At most one push is under way. An error of a push surfaces at the next call; the steps after it
    were computed without it.
    """

    def __init__(
        self, source: MemorySource, upcoming: Iterable[Sequence[BlockRef]], *, depth: int = 2
    ) -> None:
        if depth < 1:
            raise InvalidArgumentError(f"depth is {depth}; it must be at least 1")
        self._source = source
        self._upcoming: Iterator[Sequence[BlockRef]] = iter(upcoming)
        self._depth = depth
        self._planned: deque[_Planned] = deque()
        self._num_planned = 0
        self._last_use: dict[BlockRef, int] = {}
        # Batches up to this one have pushed, and their pushes are acknowledged.
        self._settled = _NEVER
        self._present = _NEVER
        self._push: Future[tuple[Acknowledged, ...]] | None = None
        self._unreported: list[Acknowledged] = []
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="membank-fetch")
        self._pusher = ThreadPoolExecutor(1, thread_name_prefix="membank-push")

    @property
    def spec(self) -> BankSpec:
        # docstring inherited
        return self._source.spec

    def fetch(self, refs: Sequence[BlockRef]) -> Fetched:
        # docstring inherited
        self._plan_up_to(self._present + 1)
        if not self._planned or set(self._planned[0].writer) != set(refs):
            raise InvalidArgumentError(
                "the blocks fetched are not those of the next planned batch; give the batches to "
                "PrefetchingMemory in the order in which they are trained on"
            )
        batch = self._planned.popleft()
        self._present += 1
        if self._push is not None and self._push.done():
            self._await_push()
        late = [ref for ref in refs if ref not in batch.asked]
        if any(batch.writer[ref] > self._settled for ref in late):
            # The batch before writes them too: its push must be through.
            self._await_push()
        if self._push is None:
            self._settled = self._present - 1
        parts = [future.result() for future in batch.early]
        if late:
            parts.append(self._source.fetch(late))
        self._fetch_ahead()
        return Fetched.merge(parts)

    def push(
        self,
        gradients: Mapping[BlockRef, Tensor],
        versions: Mapping[BlockRef, int],
        *,
        step: int,
        learning_rate_scale: float = 1.0,
    ) -> tuple[Acknowledged, ...]:
        # docstring inherited
        self._await_push()
        self._settled = self._present - 1
        self._push = self._pusher.submit(
            self._source.push,
            gradients,
            versions,
            step=step,
            learning_rate_scale=learning_rate_scale,
        )
        return self._report()

    def flush(self) -> tuple[Acknowledged, ...]:
        # docstring inherited
        self._await_push()
        self._unreported.extend(self._source.flush())
        return self._report()

    def close(self) -> None:
        """Stop fetching ahead; waits for the calls that are under way, reports nothing."""
        self._fetcher.shutdown(cancel_futures=True)
        self._pusher.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _plan_up_to(self, number: int) -> None:
        while self._num_planned <= number:
            refs = next(self._upcoming, None)
            if refs is None:
                return
            writer = {ref: self._last_use.get(ref, _NEVER) for ref in refs}
            self._last_use.update(dict.fromkeys(refs, self._num_planned))
            self._planned.append(_Planned(writer=writer))
            self._num_planned += 1

    def _fetch_ahead(self) -> None:
        self._plan_up_to(self._present + self._depth)
        for batch in self._planned:
            ready = [
                ref
                for ref, writer in batch.writer.items()
                if ref not in batch.asked and writer <= self._settled
            ]
            if ready:
                batch.asked.update(ready)
                batch.early.append(self._fetcher.submit(self._source.fetch, ready))

    def _await_push(self) -> None:
        if self._push is not None:
            # Cleared first: an error is raised once, and a later call may go on.
            push, self._push = self._push, None
            self._unreported.extend(push.result())

    def _report(self) -> tuple[Acknowledged, ...]:
        reported = tuple(self._unreported)
        self._unreported.clear()
        return reported


@dataclass(slots=True)
class _Planned:
    writer: dict[BlockRef, int]
    asked: set[BlockRef] = field(default_factory=set)
    early: list[Future[Fetched]] = field(default_factory=list)
