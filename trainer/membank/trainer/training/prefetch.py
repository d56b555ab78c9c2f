"""Fetches the blocks of the next batches, and sends gradients, while the present batch computes.

What a batch sees is exactly what it would see without prefetch, as far as this worker's own updates
go: no block is fetched for a batch before the pushes of all earlier batches that use it are
acknowledged. So nothing is ever fetched twice, and every gradient is of the version that is sent
along with it. Holding earlier versions (`ClientConfig.cache`) would not spare a byte: every block of a
batch is pushed, so it has another version when it comes again. A block's turn comes in one of three
ways:

- nobody writes it before its batch does: it is fetched at once, by a thread of its own;
- a push that writes it is under way: it is fetched by the thread that pushes, which does one thing
  after the other;
- the present batch will write it: it is fetched as soon as that gradient is acknowledged. This is
  what the next batch waits for, so these gradients are sent first, and the others while it computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Self

from torch import Tensor

from membank.trainer.training.schedule import check_range
from membank.trainer.training.source import Acknowledged, Fetched, MemorySource
from membank.wire.errors import InvalidArgumentError
from membank.wire.spec import BankSpec, BlockRef

_NEVER = -1
_FLOAT_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefetchConfig:
    """How far a worker fetches ahead of the batch that it computes."""

    depth: int = 1
    """Batches whose blocks are fetched ahead, >= 0. 0 fetches and pushes in turn, without threads;
    more than 1 is for fetches that take longer than a step."""
    max_bytes: int = 1 << 30
    """Most bytes of weights that are held or under way for batches to come, >= 1. Blocks that
    exceed them are fetched when their batch begins."""

    def __post_init__(self) -> None:
        check_range("depth", self.depth, 0, float("inf"), open_high=True)
        check_range("max_bytes", self.max_bytes, 1, float("inf"), open_high=True)


class PrefetchingMemory:
    """A memory source that knows the next batches.

    Parameters
    ----------
    source
        Source to fetch from and to push to; used from two threads of its own besides the
        caller's. It stays the caller's to close.
    upcoming
        Blocks of each batch, in the order in which they will be fetched; read ahead by
        ``config.depth``.
    config
        How far to fetch ahead; a depth of at least 1. None = the defaults.

    Raises
    ------
    InvalidArgumentError
        The depth is 0: use `source` itself.

    Notes
    -----
    For one caller: each `fetch` is the next batch, and a `push` belongs to the last one fetched.
    At most one push is under way. An error of a push surfaces at the next call, once; the steps
    after it were computed without it. An error of a fetch surfaces where its batch is fetched.
    """

    def __init__(
        self,
        source: MemorySource,
        upcoming: Iterable[Sequence[BlockRef]],
        config: PrefetchConfig | None = None,
    ) -> None:
        config = config or PrefetchConfig()
        if config.depth < 1:
            raise InvalidArgumentError(
                f"depth is {config.depth}; it must be at least 1 to fetch ahead"
            )
        self._source = source
        self._upcoming: Iterator[Sequence[BlockRef]] = iter(upcoming)
        self._config = config
        self._planned: deque[_Batch] = deque()
        self._num_planned = 0
        self._last_user: dict[BlockRef, int] = {}
        self._present = _NEVER
        # Batches up to this one will push nothing more.
        self._pushed = _NEVER
        # Batches up to this one have pushed, and their pushes are acknowledged.
        self._settled = _NEVER
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
        if self._push is not None and self._push.done():
            self._await_push()
        batch = self._planned[0]
        parts = batch.collect()
        late = [ref for ref in refs if ref not in batch.asked]
        if any(batch.writer[ref] > self._settled for ref in late):
            # The batch before writes them too: its push must be through.
            self._await_push()
        if late:
            parts.append(self._source.fetch(late))
        # Only now: a call that failed can be made again.
        self._planned.popleft()
        self._pushed = self._present
        self._present += 1
        if self._push is None:
            self._settled = self._pushed
        self._ask_ahead()
        return Fetched.merge(parts)

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
        # docstring inherited
        del first, then  # what comes first follows from the next batch
        self._await_push()
        self._settled, self._pushed = self._present - 1, self._present
        awaited, fetching = self._awaited_by_the_next()
        send = partial(
            self._source.push,
            gradients,
            versions,
            step=step,
            learning_rate_scale=learning_rate_scale,
            first=awaited,
            then=None if fetching is None else partial(self._fetch_into, fetching, awaited),
        )
        self._push = self._pusher.submit(_send, send, fetching)
        self._ask_ahead()
        return self._report()

    def flush(self) -> tuple[Acknowledged, ...]:
        # docstring inherited
        self._await_push()
        self._unreported.extend(self._source.flush())
        return self._report()

    def close(self) -> None:
        """Fetch no further; waits for the calls that are under way, reports nothing.

        They take no longer than the source's own deadline; Ctrl-C ends the wait.
        """
        for batch in self._planned:
            batch.cancel()
        self._fetcher.shutdown()
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
            writer = {ref: self._last_user.get(ref, _NEVER) for ref in refs}
            self._last_user.update(dict.fromkeys(refs, self._num_planned))
            num_bytes = {ref: self.spec.block_params(ref.level) * _FLOAT_BYTES for ref in refs}
            self._planned.append(_Batch(writer=writer, num_bytes=num_bytes))
            self._num_planned += 1

    def _ask_ahead(self) -> None:
        """Ask for the blocks of the planned batches whose turn has come."""
        self._plan_up_to(self._present + self._config.depth)
        for batch, room in self._with_room():
            settled = batch.not_asked(up_to=self._settled, room=room)
            if settled:
                batch.ask(settled, self._fetcher.submit(self._source.fetch, settled))
            # The push that they wait for has been handed to the thread that now gets them.
            pushed = batch.not_asked(after=self._settled, up_to=self._pushed, room=room)
            if pushed:
                batch.ask(pushed, self._pusher.submit(self._source.fetch, pushed))

    def _awaited_by_the_next(self) -> tuple[list[BlockRef], Future[Fetched] | None]:
        """Return what the next batch needs of the present one's push, and a promise to fetch it."""
        batch, room = next(self._with_room(), (None, 0))
        if batch is None:
            return [], None
        awaited = [ref for ref, writer in batch.writer.items() if writer == self._present]
        if not awaited or not batch.fits(awaited, room):
            return awaited, None
        fetching: Future[Fetched] = Future()
        batch.ask(awaited, fetching)
        return awaited, fetching

    def _with_room(self) -> Iterator[tuple[_Batch, int]]:
        """Yield the planned batches, with the bytes that those before them leave for each."""
        room = self._config.max_bytes
        for batch in self._planned:
            yield batch, room
            room -= sum(batch.num_bytes.values())

    def _fetch_into(self, fetching: Future[Fetched], refs: Sequence[BlockRef]) -> None:
        if not fetching.set_running_or_notify_cancel():
            return
        try:
            fetching.set_result(self._source.fetch(refs))
        except BaseException as err:
            # Not the push's error: it is raised where the next batch is fetched.
            fetching.set_exception(err)

    def _await_push(self) -> None:
        if self._push is not None:
            # Cleared first: an error is raised once, and a later call may go on.
            push, self._push = self._push, None
            self._settled = self._pushed
            self._unreported.extend(push.result())

    def _report(self) -> tuple[Acknowledged, ...]:
        reported = tuple(self._unreported)
        self._unreported.clear()
        return reported


def _send(
    send: Callable[[], tuple[Acknowledged, ...]], fetching: Future[Fetched] | None
) -> tuple[Acknowledged, ...]:
    try:
        return send()
    finally:
        if fetching is not None:
            # Without effect unless the push failed: then nobody would ever keep the promise.
            fetching.cancel()


@dataclass(slots=True)
class _Batch:
    """A batch to come, and how far its blocks are."""

    writer: dict[BlockRef, int]
    """For each of its blocks, the last batch before it that uses the block too."""
    num_bytes: dict[BlockRef, int]
    """Bytes of each block's weights."""
    asked: dict[BlockRef, Future[Fetched]] = field(default_factory=dict)
    """What brings each block that was asked for."""

    def ask(self, refs: Iterable[BlockRef], fetching: Future[Fetched]) -> None:
        self.asked.update(dict.fromkeys(refs, fetching))

    def fits(self, refs: Iterable[BlockRef], room: int) -> bool:
        return sum(self.num_bytes[ref] for ref in (*self.asked, *refs)) <= room

    def not_asked(self, *, after: int = _NEVER - 1, up_to: int, room: int) -> list[BlockRef]:
        """Return blocks whose writer is in a range, from the first on, that there is room for."""
        taken: list[BlockRef] = []
        for ref, writer in self.writer.items():
            if ref in self.asked or not after < writer <= up_to:
                continue
            if not self.fits((*taken, ref), room):
                break
            taken.append(ref)
        return taken

    def collect(self) -> list[Fetched]:
        """Wait for what was asked for and return it; what was cancelled counts as not asked."""
        parts: list[Fetched] = []
        for fetching in list(dict.fromkeys(self.asked.values())):
            try:
                parts.append(fetching.result())
            except CancelledError:
                self.asked = {ref: f for ref, f in self.asked.items() if f is not fetching}
        return parts

    def cancel(self) -> None:
        for fetching in self.asked.values():
            fetching.cancel()
