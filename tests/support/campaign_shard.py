"""A shard in a process of its own, and how the coordinator calls it from another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from campaign_bank import NUM_SHARDS, SPEC, Fetched, Image, Phase, Surveyed
from campaign_board import ArmedKill, Board, ShownMaintenance
from campaign_calls import Caller, ServiceGone
from campaign_setting import SHARDS, Setting
from membank.bank_service.shard import Shard
from membank.bank_service.shard.contract import (
    BlockContent,
    BlockOperation,
    BlockStatus,
    PartitionGarbage,
    PartitionHistory,
    Prepared,
)
from membank.bank_service.shard.maintenance import ThreadMaintenance
from membank.wire.errors import Reason, UnavailableError
from membank.wire.format import RevisionRecord
from membank.wire.format.receipt import ProcessLife
from membank.wire.records import ShardStats
from membank.wire.spec import Array, BlockRef, Role
from storage_faults import FaultyObjects


class ShardDesk:
    """One shard, as others call it.

    Parameters
    ----------
    setting
        Which bank.
    index
        Which shard.
    board
        Shows what is done.
    plan
        Kills at a call of the storage.
    """

    def __init__(self, setting: Setting, index: int, board: Board, plan: ArmedKill) -> None:
        self._folds_at_stop = setting.folds_at_stop
        self._shard = Shard.open(
            FaultyObjects(setting.objects(), plan),
            shard_id=SHARDS[index],
            partitions=range(index, SPEC.num_partitions, NUM_SHARDS),
            config=setting.config(),
            maintenance=ShownMaintenance(ThreadMaintenance(), board),
            open_log_file=lambda path: setting.open_log_file(path, plan),
        )

    def phase(self, method: str, args: Sequence[Any]) -> Phase:
        # docstring inherited
        del args
        return _PHASES.get(method, Phase.IDLE)

    def answer(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        # docstring inherited
        match method:
            case "fetch":
                return self._fetch(*args)
            case "survey":
                return self._survey()
            case "revision":
                return self._shard.revision
            case "process":
                return self._shard.process
            case "read":
                return list(self._shard.read(*args))
            case _:
                return getattr(self._shard, method)(*args, **kwargs)

    def stop(self) -> None:
        # docstring inherited
        self._shard.close(consolidate=self._folds_at_stop)

    def _fetch(self, refs: Sequence[BlockRef], times: int) -> list[Fetched]:
        # One right after the other: what a swap shows of itself in between is over at once.
        looks = [self._shard.fetch(refs) for _ in range(times)]
        return [
            Fetched(
                revision=found.revision,
                versions={block.ref: block.version for block in found.blocks},
                weights={
                    block.ref: block.weight.tobytes()
                    for block in found.blocks
                    if block.weight is not None
                },
            )
            for found in looks
        ]

    def _survey(self) -> Surveyed:
        shard = self._shard
        refs = [ref for ref in SPEC.blocks() if SPEC.partition_of(ref) in shard.partitions]
        arrays = {
            content.ref: {Role.WEIGHT: content.weight, **content.optimizer_state}
            for content in shard.read(refs)
        }
        statuses = shard.describe(refs)
        return Surveyed(
            versions={status.ref: status.version for status in statuses},
            images={
                status.ref: Image(
                    state=status.state,
                    step=status.step,
                    arrays=tuple(a.tobytes() for a in _in_order(arrays.get(status.ref, {}))),
                )
                for status in statuses
            },
            served={
                block.ref: block.weight.tobytes()
                for block in shard.fetch(refs).blocks
                if block.weight is not None
            },
        )


def _in_order(arrays: Mapping[Role, Array]) -> list[Array]:
    return [arrays[role] for role in SPEC.roles if role in arrays]


_PHASES = {
    "push": Phase.UPDATE,
    "fetch": Phase.FETCH,
    "survey": Phase.SURVEY,
    "prepare": Phase.PREPARE,
    "commit": Phase.COMMIT,
    "abort": Phase.COMMIT,
    "collect": Phase.GC,
}


class RemoteShard:
    """A `ShardHandle` on a shard in another process.

    Parameters
    ----------
    address
        Where the shard listens.
    """

    def __init__(self, address: str) -> None:
        self._caller = Caller(address)

    @property
    def revision(self) -> int:
        # docstring inherited
        found: int = self._call("revision")
        return found

    @property
    def process(self) -> ProcessLife:
        # docstring inherited
        found: ProcessLife = self._call("process")
        return found

    def prepare(
        self,
        revision: int,
        operations: Sequence[BlockOperation],
        *,
        all_partitions: bool = False,
        dry_run: bool = False,
    ) -> Prepared:
        # docstring inherited
        prepared: Prepared = self._call(
            "prepare", revision, operations, all_partitions=all_partitions, dry_run=dry_run
        )
        return prepared

    def commit(self, record: RevisionRecord) -> None:
        # docstring inherited
        self._call("commit", record)

    def abort(self, revision: int) -> None:
        # docstring inherited
        self._call("abort", revision)

    def describe(self, refs: Sequence[BlockRef]) -> tuple[BlockStatus, ...]:
        # docstring inherited
        found: tuple[BlockStatus, ...] = self._call("describe", refs)
        return found

    def read(self, refs: Sequence[BlockRef]) -> Iterator[BlockContent]:
        # docstring inherited
        yield from self._call("read", refs)

    def history(self) -> tuple[PartitionHistory, ...]:
        # docstring inherited
        found: tuple[PartitionHistory, ...] = self._call("history")
        return found

    def collect(
        self, partition: int, *, history_from: int = 0, dry_run: bool = False
    ) -> PartitionGarbage:
        # docstring inherited
        found: PartitionGarbage = self._call(
            "collect", partition, history_from=history_from, dry_run=dry_run
        )
        return found

    def stats(self) -> ShardStats:
        # docstring inherited
        found: ShardStats = self._call("stats")
        return found

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._caller(method, *args, **kwargs)
        except ServiceGone as err:
            raise UnavailableError(
                "the shard does not answer; retry", reason=Reason.SHARD_UNAVAILABLE
            ) from err
