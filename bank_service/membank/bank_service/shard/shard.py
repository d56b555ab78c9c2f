"""A shard: some partitions of a bank, served to readers and trainers and to transactions."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

from membank.bank_service.shard.answers import described, exported, fetched
from membank.bank_service.shard.config import Durability, ShardConfig
from membank.bank_service.shard.context import ShardContext
from membank.bank_service.shard.contract import (
    BlockContent,
    BlockOperation,
    BlockStatus,
    FetchResult,
    PartitionGarbage,
    PartitionHistory,
    Prepared,
    PushResult,
    Subscription,
)
from membank.bank_service.shard.draft import check_array
from membank.bank_service.shard.lease import boot_clock
from membank.bank_service.shard.maintenance import InlineMaintenance, Maintenance
from membank.bank_service.shard.participant import Participant, owned
from membank.bank_service.shard.partition import Partition
from membank.bank_service.shard.pinned import PinnedReader
from membank.bank_service.shard.process import this_process
from membank.bank_service.shard.reader import BlockReader
from membank.bank_service.shard.recovery import lock_partitions, open_partitions
from membank.bank_service.shard.residency import Residency
from membank.bank_service.shard.update_rule import UpdateRule
from membank.bank_service.shard.watch import WatchHub
from membank.bank_service.store.bank import Bank
from membank.bank_service.store.journal import LogFile, PosixLogFile
from membank.bank_service.store.objects import ObjectStore, probe_create_only
from membank.wire.codec import fetch_codec
from membank.wire.errors import (
    InvalidArgumentError,
    MembankError,
    NotFoundError,
    Reason,
    UnavailableError,
)
from membank.wire.format import Entry, RevisionRecord
from membank.wire.format.receipt import ProcessLife
from membank.wire.loaders import Loaders
from membank.wire.records import (
    Gradient,
    ShardStats,
    Update,
    UpdateResult,
)
from membank.wire.spec import DTYPES, BankSpec, BlockRef, BlockState, Role

_LOG = logging.getLogger(__name__)

_LEASE_RENEWALS = 3
"""Renewals in the length of a lease: two may fail before an owner has to ask in a call."""

_DESCRIBED_AT_ONCE = 512
"""Blocks that are described as of one moment."""

_SIDE_BY_SIDE_BYTES = 1 << 20
"""Bytes of gradients from which on partitions that journal into memory push side by side."""


@dataclass(slots=True)
class _Counters:
    num_blocks_fetched: int = 0
    num_bytes_fetched: int = 0
    num_updates_applied: int = 0
    num_updates_refused: int = 0
    num_bytes_pushed: int = 0


class Shard:
    """A `ShardApi` in this process; make one with `Shard.open`.

    Notes
    -----
    A fetch shows every update that was acknowledged before it began, all blocks as of one moment.
    An acknowledged update survives what `ShardConfig.durability` says.
    """

    # Lock order: see Participant and Partition. `_counting` guards the counters and is taken last.

    def __init__(
        self,
        context: ShardContext,
        shard_id: str,
        partitions: Mapping[int, Partition],
        participant: Participant,
        locks: ExitStack,
    ) -> None:
        self._context = context
        self._shard_id = shard_id
        self._partitions = partitions
        self._participant = participant
        self._locks = locks
        self._reader = BlockReader(context, self._owner)
        self._pinned = PinnedReader(context, self._owner, lambda: participant.revision)
        # Not the threads that load: a push may wait for seconds, for a transaction to end.
        self._pushers = Loaders(name="membank-push")
        self._counting = Lock()
        self._counters = _Counters()
        self._closed = False

    @classmethod
    def open(
        cls,
        where: str | ObjectStore | Bank,
        *,
        shard_id: str = "shard-0",
        partitions: Sequence[int] | None = None,
        config: ShardConfig | None = None,
        maintenance: Maintenance | None = None,
        clock: Callable[[], float] = boot_clock,
        wall_clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
        open_log_file: Callable[[Path], LogFile] = PosixLogFile,
    ) -> Shard:
        """Take partitions of a bank over, with every update that was acknowledged.

        Parameters
        ----------
        where
            The bank: its URL, its storage, or the opened bank.
        shard_id
            Identity of the shard, for statistics.
        partitions
            Partitions to own; None = all.
        config
            Settings; None = the defaults.
        maintenance
            Runs what nobody waits for; closed with the shard. None = in the calls that cause it.
        clock
            Monotonic seconds, the time that the machine slept included.
        wall_clock
            Seconds since 1970-01-01 UTC, for the age of revisions.
        sleep
            Waits for some seconds: for the lease of an owner that may still be alive.
        open_log_file
            Makes the files of journals.

        Raises
        ------
        NotFoundError
            If there is no bank (NOT_A_BANK) or no such partition (UNKNOWN_PARTITION).
        FailedPreconditionError
            If another process owns a partition (BANK_IN_USE), the bank is of a newer format, or
            its storage does not keep two owners apart (STORE_UNSUPPORTED).
        CorruptionError
            If something that was acknowledged is missing or damaged.
        """
        bank = where if isinstance(where, Bank) else Bank.open(where)
        probe_create_only(bank.objects)
        config = config or ShardConfig()
        numbers = _checked_partitions(bank.spec, partitions)
        context = ShardContext(
            bank=bank,
            config=config,
            rule=UpdateRule(bank.spec),
            residency=Residency(config.resident_bytes),
            hub=WatchHub(config.watch_queue_events),
            num_partitions=len(numbers),
            maintenance=maintenance or InlineMaintenance(),
            clock=clock,
            sleep=sleep,
            wall_clock=wall_clock,
            open_log_file=open_log_file,
        )
        with ExitStack() as undo:
            undo.callback(context.maintenance.close)
            locks = lock_partitions(context, numbers, undo)
            latest = bank.latest_number()
            revision = bank.latest_commit().revision
            opened = open_partitions(context, locks, revision, undo)
            participant = Participant(context, opened, revision=revision, last_record=latest)
            # A revision that was decided meanwhile may be in force in some partitions only.
            participant.catch_up()
            shard = cls(context, shard_id, opened, participant, undo.pop_all())
        shard._start_duties()
        return shard

    @property
    def spec(self) -> BankSpec:
        # docstring inherited
        return self._context.bank.spec

    @property
    def process(self) -> ProcessLife:
        # docstring inherited
        return this_process()

    @property
    def revision(self) -> int:
        # docstring inherited
        return self._participant.revision

    @property
    def partitions(self) -> tuple[int, ...]:
        """Partitions that the shard owns, ascending."""
        return tuple(self._partitions)

    @property
    def fenced(self) -> UnavailableError | None:
        """Why a partition is not served any more: another owner has it; None = all are."""
        return next((p.fenced for p in self._partitions.values() if p.fenced is not None), None)

    @property
    def is_folded(self) -> bool:
        """Whether, after `close`, no acknowledged update is left in a journal."""
        return all(partition.is_folded for partition in self._partitions.values())

    def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held_versions: Sequence[int | None] | None = None,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
    ) -> FetchResult:
        # docstring inherited
        held = [None] * len(refs) if held_versions is None else list(held_versions)
        if len(held) != len(refs):
            raise InvalidArgumentError(f"{len(held)} held versions for {len(refs)} blocks")
        name = self.spec.dtype if dtype is None else dtype
        fetch_codec(name)
        self._check_owned(refs)
        self._require_revision(min_revision)

        def wanted(position: int, entry: Entry) -> bool:
            return entry.state is BlockState.ACTIVE and entry.version != held[position]

        if snapshot:
            revision, loaded = self._pinned.read(snapshot, refs, wanted=wanted)
        else:
            revision, loaded = self._reader.read(
                refs, (Role.WEIGHT,), wanted=wanted, revision=lambda: self._participant.revision
            )
        blocks = tuple(
            fetched(
                ref,
                block,
                name,
                kept_dtype=self.spec.dtype,
                unchanged=block.entry.version == version,
            )
            for ref, block, version in zip(refs, loaded, held, strict=True)
        )
        self._require_leases(refs)
        with self._counting:
            self._counters.num_blocks_fetched += len(blocks)
            self._counters.num_bytes_fetched += sum(block.header.num_bytes for block in blocks)
        return FetchResult(revision=revision, blocks=blocks)

    def push(self, update: Update) -> PushResult:
        # docstring inherited
        by_partition = self._checked_gradients(update)

        def push(number: int) -> tuple[tuple[UpdateResult, ...], bool]:
            found, repeat = self._partitions[number].push(update, by_partition[number])
            if not repeat:
                self._count_push(found, by_partition[number])
            return found, repeat

        numbers = sorted(by_partition)
        if self._pays_side_by_side(by_partition):
            answers = self._pushers.map(push, numbers)
        else:
            answers = [push(number) for number in numbers]
        results = {result.ref: result for found, _ in answers for result in found}
        repeats = [repeat for _, repeat in answers]
        return PushResult(
            results=tuple(results[gradient.ref] for gradient in update.gradients),
            duplicate=bool(repeats) and all(repeats),
        )

    def subscribe(self, refs: Sequence[BlockRef] = (), *, admin_only: bool = False) -> Subscription:
        # docstring inherited
        self._check_owned(refs)
        return self._context.hub.subscribe(refs, admin_only=admin_only)

    def prepare(
        self,
        revision: int,
        operations: Sequence[BlockOperation],
        *,
        all_partitions: bool = False,
        dry_run: bool = False,
    ) -> Prepared:
        # docstring inherited
        self._require_open()
        return self._participant.prepare(
            revision, operations, all_partitions=all_partitions, dry_run=dry_run
        )

    def commit(self, record: RevisionRecord) -> None:
        # docstring inherited
        self._require_open()
        self._participant.commit(record)

    def abort(self, revision: int) -> None:
        # docstring inherited
        self._participant.abort(revision)

    def settle(self, now: float = math.inf) -> tuple[int, ...]:
        # docstring inherited
        return self._participant.settle(now)

    def describe(self, refs: Sequence[BlockRef]) -> tuple[BlockStatus, ...]:
        # docstring inherited
        self._check_owned(refs)
        found: list[BlockStatus] = []
        for start in range(0, len(refs), _DESCRIBED_AT_ONCE):
            owners = [(ref, self._owner(ref)) for ref in refs[start : start + _DESCRIBED_AT_ONCE]]
            # Not for all of a large bank at once: fetches wait meanwhile.
            with self._context.state_lock:
                entries = [(ref, owner.record(ref).entry) for ref, owner in owners]
            found += itertools.starmap(described, entries)
        return tuple(found)

    def read(self, refs: Sequence[BlockRef]) -> Iterator[BlockContent]:
        # docstring inherited
        self._check_owned(refs)
        return self._read(tuple(refs))

    def history(self) -> tuple[PartitionHistory, ...]:
        # docstring inherited
        self._require_open()
        return tuple(partition.history() for partition in self._partitions.values())

    def collect(
        self, partition: int, *, history_from: int = 0, dry_run: bool = False
    ) -> PartitionGarbage:
        # docstring inherited
        self._require_open()
        found = owned(self._partitions, partition)
        return found.collect(history_from=history_from, dry_run=dry_run)

    def consolidate(self) -> None:
        # docstring inherited
        for partition in self._partitions.values():
            partition.consolidate()

    def stats(self) -> ShardStats:
        # docstring inherited
        with self._counting:
            counters = dataclasses.asdict(self._counters)
        with self._context.state_lock:
            resident_bytes = self._context.residency.num_bytes
        return ShardStats(
            shard_id=self._shard_id,
            endpoint="",
            pid=os.getpid(),
            partitions=self.partitions,
            resident_bytes=resident_bytes,
            journal_bytes=sum(p.journal_bytes for p in self._partitions.values()),
            unshipped_s=max((p.unshipped_s for p in self._partitions.values()), default=0.0),
            **counters,
        )

    def close(self, *, consolidate: bool = True) -> None:
        # docstring inherited
        if self._closed:
            return
        self._closed = True
        self._context.hub.close()
        self._context.maintenance.close()
        with self._locks:
            for partition in self._partitions.values():
                self._locks.callback(partition.close, consolidate=consolidate)
        self._pushers.close()
        self._context.loaders.close()

    def _read(self, refs: tuple[BlockRef, ...]) -> Iterator[BlockContent]:
        for ref in refs:
            # One at a time: a topic may be larger than memory.
            _, (block,) = self._reader.read(
                [ref],
                self.spec.roles,
                wanted=lambda _, entry: entry.state is not BlockState.DELETED,
                revision=lambda: self._participant.revision,
            )
            if block.arrays:
                yield exported(ref, block)

    def _start_duties(self) -> None:
        config, maintenance = self._context.config, self._context.maintenance
        if config.lease_s:
            renew_s = config.lease_s / _LEASE_RENEWALS
            maintenance.every(renew_s, partial(self._for_each, "renewing", Partition.renew_lease))
        if config.ship_every_s:
            ship = partial(self._for_each, "shipping", Partition.ship)
            maintenance.every(config.ship_every_s, ship)

    def _for_each(self, what: str, duty: Callable[[Partition], None]) -> None:
        for partition in self._partitions.values():
            try:
                duty(partition)
            except MembankError as err:
                # Of this partition only, and found again by the next call or the next turn.
                _LOG.warning("partition %d: %s failed: %s", partition.number, what, err)

    def _require_leases(self, refs: Sequence[BlockRef]) -> None:
        for number in {self.spec.partition_of(ref) for ref in refs}:
            self._partitions[number].require_lease()

    def _owner(self, ref: BlockRef) -> Partition:
        return owned(self._partitions, self.spec.partition_of(ref))

    def _check_owned(self, refs: Sequence[BlockRef]) -> None:
        self._require_open()
        for ref in refs:
            self.spec.check_ref(ref)
            self._owner(ref)

    def _require_open(self) -> None:
        if self._closed:
            raise UnavailableError(f"shard {self._shard_id} is stopped; retry")

    def _require_revision(self, min_revision: int) -> None:
        if self.revision >= min_revision:
            return
        self._participant.catch_up(min_revision)
        if self.revision < min_revision:
            raise UnavailableError(
                f"shard {self._shard_id} is at revision {self.revision}, "
                f"and {min_revision} was asked for; retry",
                reason=Reason.BEHIND_REVISION,
                metadata={"revision": str(self.revision)},
            )

    def _checked_gradients(self, update: Update) -> dict[int, list[Gradient]]:
        if not update.request_id:
            raise InvalidArgumentError("an update needs a request id")
        scale = update.learning_rate_scale
        if not (math.isfinite(scale) and scale >= 0):
            raise InvalidArgumentError(f"learning_rate_scale is {scale}; accepted: finite and >= 0")
        self._check_owned([gradient.ref for gradient in update.gradients])
        by_partition: dict[int, list[Gradient]] = {}
        seen: set[BlockRef] = set()
        for gradient in update.gradients:
            ref = gradient.ref
            if ref in seen:
                raise InvalidArgumentError(f"block {ref} occurs twice in one update; add them up")
            seen.add(ref)
            shape = self.spec.block_shape(ref.level)
            check_array(gradient.values, shape, DTYPES, f"gradient of block {ref}")
            if not gradient.values.flags.c_contiguous:
                raise InvalidArgumentError(
                    f"gradient of block {ref} is not C-contiguous", reason=Reason.BAD_SHAPE
                )
            by_partition.setdefault(self.spec.partition_of(ref), []).append(gradient)
        return by_partition

    def _pays_side_by_side(self, by_partition: Mapping[int, Sequence[Gradient]]) -> bool:
        """Say whether an update's partitions have more to wait for than a helper takes to begin.

        While one of them writes its journal, another one computes.
        """
        if len(by_partition) == 1 or self._context.config.durability is not Durability.PROCESS:
            return len(by_partition) > 1
        num_bytes = sum(g.values.nbytes for some in by_partition.values() for g in some)
        return num_bytes >= _SIDE_BY_SIDE_BYTES

    def _count_push(self, results: Sequence[UpdateResult], gradients: Sequence[Gradient]) -> None:
        accepted = sum(result.accepted for result in results)
        with self._counting:
            self._counters.num_updates_applied += accepted
            self._counters.num_updates_refused += len(results) - accepted
            self._counters.num_bytes_pushed += sum(g.values.nbytes for g in gradients)


def _checked_partitions(spec: BankSpec, partitions: Sequence[int] | None) -> list[int]:
    numbers = sorted(set(range(spec.num_partitions) if partitions is None else partitions))
    for number in numbers:
        if not 0 <= number < spec.num_partitions:
            raise NotFoundError(
                f"bank {spec.name} has no partition {number}; "
                f"its partitions are 0..{spec.num_partitions - 1}",
                reason=Reason.UNKNOWN_PARTITION,
                metadata={"partition": str(number)},
            )
    return numbers
