"""The shards of a bank as the coordinator sees them, whatever carries the calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol, TypeVar

from membank.bank_service.shard.contract import (
    BlockContent,
    BlockOperation,
    BlockStatus,
    PartitionGarbage,
    PartitionHistory,
    Prepared,
)
from membank.wire.errors import Reason, UnavailableError
from membank.wire.format import RevisionRecord
from membank.wire.format.receipt import ProcessLife
from membank.wire.records import ShardStats
from membank.wire.spec import BankSpec, BlockRef

T = TypeVar("T")

_PARALLEL_CALLS = 8


class ShardHandle(Protocol):
    """What transactions need of a shard: the shard itself, or a proxy to its process.

    A call that does not reach the shard raises `UnavailableError`; whether it took effect is
    unknown then, and every call may be repeated.
    """

    @property
    def revision(self) -> int:
        """Newest revision that the shard has installed."""

    @property
    def process(self) -> ProcessLife:
        """Process that the shard lives in."""

    def prepare(
        self,
        revision: int,
        operations: Sequence[BlockOperation],
        *,
        all_partitions: bool = False,
        dry_run: bool = False,
    ) -> Prepared:
        """Prepare a transaction."""

    def commit(self, record: RevisionRecord) -> None:
        """Install what was prepared, or note the number."""

    def abort(self, revision: int) -> None:
        """Give up what was prepared."""

    def describe(self, refs: Sequence[BlockRef]) -> tuple[BlockStatus, ...]:
        """Return version, state, step and CRC of blocks."""

    def read(self, refs: Sequence[BlockRef]) -> Iterator[BlockContent]:
        """Yield blocks with their optimizer state."""

    def history(self) -> tuple[PartitionHistory, ...]:
        """Return what each partition can be returned to."""

    def collect(
        self, partition: int, *, history_from: int = 0, dry_run: bool = False
    ) -> PartitionGarbage:
        """Remove what nothing retained of a partition needs."""

    def stats(self) -> ShardStats:
        """Return counters and sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMember:
    """One shard of the service."""

    shard_id: str
    """Its identity."""
    partitions: tuple[int, ...]
    """Partitions it owns."""
    handle: ShardHandle
    """How to call it."""


class ShardDirectory(Protocol):
    """Who is in the service now."""

    def members(self) -> tuple[ShardMember, ...]:
        """Return the shards; together they own every partition."""


class ShardGroup:
    """All shards as one: splits work by owner, calls in parallel, puts answers together.

    Parameters
    ----------
    spec
        Spec of the bank.
    directory
        Who is in the service; asked anew for every call.
    """

    def __init__(self, spec: BankSpec, directory: ShardDirectory) -> None:
        self._spec = spec
        self._directory = directory
        self._pool = ThreadPoolExecutor(_PARALLEL_CALLS, thread_name_prefix="membank-shards")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False)

    def members(self) -> tuple[ShardMember, ...]:
        """Return the shards."""
        return self._directory.members()

    def owner_of(self, ref: BlockRef) -> ShardMember:
        """Return the shard that owns `ref`; `UnavailableError` while nobody does."""
        return self._owner(self._spec.partition_of(ref))

    def by_owner(self, refs: Iterable[BlockRef]) -> dict[str, list[BlockRef]]:
        """Return refs by shard id, in the order given."""
        owner = {p: member.shard_id for member in self.members() for p in member.partitions}
        split: dict[str, list[BlockRef]] = {}
        for ref in refs:
            partition = self._spec.partition_of(ref)
            if partition not in owner:
                raise UnavailableError(f"partition {partition} has no owner at present; retry")
            split.setdefault(owner[partition], []).append(ref)
        return split

    def call(
        self, members: Sequence[ShardMember], function: Callable[[ShardMember], T]
    ) -> list[T | Exception]:
        """Call `function` for each member in parallel; return results or errors in their order.

        All calls have ended when it returns, so that no late one can cross what follows.
        """
        futures = [self._pool.submit(function, member) for member in members]
        # Before any result is looked at: what is no `Exception` leaves the loop below early.
        wait(futures)
        results: list[T | Exception] = []
        for future in futures:
            error = future.exception()
            if isinstance(error, Exception):
                # A member's failure must not hide what became of the others.
                results.append(error)
            else:
                results.append(future.result())
        return results

    def describe(self, refs: Sequence[BlockRef]) -> dict[BlockRef, BlockStatus]:
        """Return the status of blocks, asking their owners."""
        split = self.by_owner(refs)
        members = [member for member in self.members() if member.shard_id in split]
        answers = self.call(members, lambda member: member.handle.describe(split[member.shard_id]))
        return {status.ref: status for answer in raise_first(answers) for status in answer}

    def read(self, refs: Sequence[BlockRef]) -> Iterator[BlockContent]:
        """Yield blocks with their optimizer state, shard by shard."""
        split = self.by_owner(refs)
        for member in self.members():
            if member.shard_id in split:
                yield from member.handle.read(split[member.shard_id])

    def history(self) -> tuple[PartitionHistory, ...]:
        """Return what each partition of the bank can be returned to."""
        answers = self.call(self.members(), lambda member: member.handle.history())
        return tuple(history for answer in raise_first(answers) for history in answer)

    def collect(self, partition: int, *, history_from: int, dry_run: bool) -> PartitionGarbage:
        """Remove what nothing retained of a partition needs, as much as one call removes."""
        handle = self._owner(partition).handle
        return handle.collect(partition, history_from=history_from, dry_run=dry_run)

    def stats(self) -> tuple[ShardStats, ...]:
        """Return the statistics of all shards."""
        return tuple(raise_first(self.call(self.members(), lambda m: m.handle.stats())))

    def _owner(self, partition: int) -> ShardMember:
        for member in self.members():
            if partition in member.partitions:
                return member
        raise UnavailableError(f"partition {partition} has no owner at present; retry")


def raise_first(results: Sequence[T | Exception]) -> list[T]:
    """Return `results`, or raise the first error among them, one of the caller's own first.

    An answer that says what is wrong with the request is worth more than one that says that some
    other shard did not answer.
    """
    errors = [result for result in results if isinstance(result, Exception)]
    final = [error for error in errors if not isinstance(error, UnavailableError)]
    for error in (*final, *errors):
        raise error
    return [result for result in results if not isinstance(result, Exception)]


def unreachable(shard_ids: Sequence[str], revision: int) -> UnavailableError:
    """Return the error for shards that have not confirmed a committed revision."""
    return UnavailableError(
        f"{', '.join(shard_ids)} {'has' if len(shard_ids) == 1 else 'have'} not confirmed revision "
        f"{revision} yet",
        reason=Reason.SHARD_UNAVAILABLE,
        metadata={"revision": str(revision), "shards": ",".join(shard_ids)},
    )
