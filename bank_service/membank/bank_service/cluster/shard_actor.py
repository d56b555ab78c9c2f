"""The Ray actor of a shard, and the controller's end of the line to it."""

from __future__ import annotations

import dataclasses
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import ray

from membank.bank_service.cluster.actors import ShardActors
from membank.bank_service.cluster.identity import ShardIdentity, ShardSettings
from membank.bank_service.cluster.shard_keeper import ShardKeeper
from membank.bank_service.cluster.staging import (
    StagedOperations,
    batches,
    carried_content,
    carried_operation,
    operation_bytes,
    own_content,
)
from membank.bank_service.shard.contract import (
    BlockContent,
    BlockOperation,
    BlockStatus,
    PartitionGarbage,
    PartitionHistory,
    Prepared,
)
from membank.wire.format import RevisionRecord
from membank.wire.format.receipt import ProcessLife
from membank.wire.records import Placement, ShardStats
from membank.wire.spec import BankSpec, BlockRef

if TYPE_CHECKING:
    from membank.bank_service.cluster.shard_server import ShardServer

T = TypeVar("T")

_LOG = logging.getLogger(__name__)


class ShardActor:
    """Lifecycle of a `ShardServer` inside an actor; made remote by the controller.

    Ray runs methods on several threads. The constructor never fails: an actor whose constructor
    fails is not started again by Ray, and its error would reach the controller as text.
    """

    # `_staged` is used by the one coordinator alone.

    def __init__(
        self,
        settings: ShardSettings,
        start: Callable[[ShardSettings], ShardServer] | None = None,
    ) -> None:
        logging.basicConfig(level=logging.INFO)
        begin = start or _start_here
        self._keeper = ShardKeeper(
            settings.shard_id, lambda: begin(settings), returns=bool(settings.service)
        )
        self._staged = StagedOperations()
        self.open()

    def open(self) -> None:
        """Open the shard unless it is open; what went wrong is told by `identity`."""
        self._keeper.open()

    def identity(self) -> ShardIdentity:
        """Return where the shard is found, or raise why it is not."""
        return self._keeper.identity()

    def set_placement(self, placement: Placement) -> None:
        """Pass the placement on to the server."""
        self._open_server().set_placement(placement)

    def revision(self) -> int:
        """Return the newest revision that is installed."""
        return self._open_server().shard.revision

    def process(self) -> ProcessLife:
        """Return the process that the shard lives in."""
        return self._open_server().shard.process

    def stage(self, attempt: str, operations: Sequence[BlockOperation]) -> None:
        """Keep a piece of the operations of a transaction for `prepare`."""
        self._staged.add(attempt, operations)

    def prepare(
        self,
        revision: int,
        operations: Sequence[BlockOperation],
        *,
        attempt: str,
        num_operations: int,
        all_partitions: bool,
        dry_run: bool,
    ) -> Prepared:
        """Prepare what was staged for `attempt`, and `operations`, `num_operations` in all."""
        everything = self._staged.take(attempt, operations, num_operations=num_operations)
        return self._open_server().shard.prepare(
            revision, everything, all_partitions=all_partitions, dry_run=dry_run
        )

    def commit(self, record: RevisionRecord) -> None:
        """Commit a prepared transaction."""
        self._open_server().shard.commit(record)

    def abort(self, revision: int) -> None:
        """Give up a prepared transaction."""
        self._staged.clear()
        self._open_server().shard.abort(revision)

    def describe(self, refs: Sequence[BlockRef]) -> tuple[BlockStatus, ...]:
        """Describe blocks."""
        return self._open_server().shard.describe(refs)

    def read(self, refs: Sequence[BlockRef]) -> tuple[BlockContent, ...]:
        """Read blocks with their optimizer state."""
        return tuple(map(carried_content, self._open_server().shard.read(refs)))

    def history(self) -> tuple[PartitionHistory, ...]:
        """Return what each partition can be returned to."""
        return self._open_server().shard.history()

    def collect(self, partition: int, *, history_from: int, dry_run: bool) -> PartitionGarbage:
        """Remove what nothing retained of a partition needs."""
        return self._open_server().shard.collect(
            partition, history_from=history_from, dry_run=dry_run
        )

    def consolidate(self) -> None:
        """Fold the journals into slots."""
        self._open_server().shard.consolidate()

    def stats(self) -> ShardStats:
        """Return counters and sizes."""
        return self._open_server().stats()

    def stop(self) -> bool:
        """Drain and close; return whether nothing is left in a journal (see `ShardKeeper`)."""
        return self._keeper.stop()

    def _open_server(self) -> ShardServer:
        return self._keeper.server()


def _start_here(settings: ShardSettings) -> ShardServer:
    # Here and not above: the controller imports this module and has no use for torch.
    import torch

    from membank.bank_service.cluster.shard_server import ShardServer

    # Several shards share the cores of a machine; a thread pool in each only thrashes.
    torch.set_num_threads(1)
    return ShardServer(
        settings,
        node=ray.util.get_node_ip_address(),
        node_id=ray.get_runtime_context().get_node_id(),
    )


class ShardActorHandle:
    """A `ShardHandle` whose shard lives in an actor.

    Parameters
    ----------
    shard_id
        Identity of the shard, for errors.
    actor
        Returns the actor; asked for every call, as an actor may be replaced.
    spec
        Spec of the bank.
    actors
        Where it runs.
    num_restarts
        Returns how often the shard came back, which it does not know itself.
    timeout_s
        Longest wait for one call.
    """

    def __init__(
        self,
        shard_id: str,
        actor: Callable[[], object],
        spec: BankSpec,
        *,
        actors: ShardActors,
        num_restarts: Callable[[], int] = lambda: 0,
        timeout_s: float = 120.0,
    ) -> None:
        self._shard_id = shard_id
        self._actor = actor
        self._spec = spec
        self._actors = actors
        self._num_restarts = num_restarts
        self._timeout_s = timeout_s

    @property
    def revision(self) -> int:
        # docstring inherited
        return cast("int", self._call("revision"))

    @property
    def process(self) -> ProcessLife:
        # docstring inherited
        return cast("ProcessLife", self._call("process"))

    def prepare(
        self,
        revision: int,
        operations: Sequence[BlockOperation],
        *,
        all_partitions: bool = False,
        dry_run: bool = False,
    ) -> Prepared:
        # docstring inherited
        attempt = uuid.uuid4().hex
        travelling = [carried_operation(operation) for operation in operations]
        *pieces, last = batches(travelling, operation_bytes) or [()]
        for piece in pieces:
            self._call("stage", attempt, piece)
        answer = self._call(
            "prepare",
            revision,
            last,
            attempt=attempt,
            num_operations=len(operations),
            all_partitions=all_partitions,
            dry_run=dry_run,
        )
        return cast("Prepared", answer)

    def commit(self, record: RevisionRecord) -> None:
        # docstring inherited
        self._call("commit", record)

    def abort(self, revision: int) -> None:
        # docstring inherited
        self._call("abort", revision)

    def describe(self, refs: Sequence[BlockRef]) -> tuple[BlockStatus, ...]:
        # docstring inherited
        return cast("tuple[BlockStatus, ...]", self._call("describe", tuple(refs)))

    def read(self, refs: Sequence[BlockRef]) -> Iterator[BlockContent]:
        # docstring inherited
        def size(ref: BlockRef) -> int:
            return self._spec.weight_bytes(ref.level) + self._spec.optimizer_bytes(ref.level)

        for batch in batches(refs, size):
            for content in cast("tuple[BlockContent, ...]", self._call("read", batch)):
                yield own_content(content)

    def history(self) -> tuple[PartitionHistory, ...]:
        # docstring inherited
        return cast("tuple[PartitionHistory, ...]", self._call("history"))

    def collect(
        self, partition: int, *, history_from: int = 0, dry_run: bool = False
    ) -> PartitionGarbage:
        # docstring inherited
        answer = self._call("collect", partition, history_from=history_from, dry_run=dry_run)
        return cast("PartitionGarbage", answer)

    def stats(self) -> ShardStats:
        # docstring inherited
        stats = cast("ShardStats", self._call("stats"))
        return dataclasses.replace(stats, num_restarts=self._num_restarts())

    def _call(self, method: str, *arguments: object, **options: object) -> object:
        return self._actors.call(
            self._actor(),
            method,
            *arguments,
            options=options,
            timeout_s=self._timeout_s,
            who=f"shard {self._shard_id}",
        )
