"""The process that is killed: a whole bank, its shards and its coordinator, that serves pipes."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

import campaign_bank as asked
from campaign_bank import MARKED, NUM_SHARDS, SPEC, Answer, Phase, Request
from campaign_board import ArmedKill, Board, ShownMaintenance
from membank.bank_service.knowledge import (
    AdminRequest,
    BankOperations,
    Coordinator,
    RevisionLog,
    ShardGroup,
    ShardMember,
    TreeStore,
)
from membank.bank_service.shard import Durability, Shard, ShardConfig
from membank.bank_service.shard.contract import FetchResult, SetContent
from membank.bank_service.shard.maintenance import ThreadMaintenance
from membank.bank_service.store import Bank, ObjectStore
from membank.bank_service.store.journal import LogFile
from membank.bank_service.store.open_objects import open_objects
from membank.wire.errors import InternalError, MembankError
from membank.wire.records import Block, GarbageReport, TransactionReport, UpdateResult
from membank.wire.spec import BlockRef, Role
from storage_faults import FaultPlan, FaultyLogFile, FaultyObjects
from tiny_bank import UnsyncedObjects

_SWITCH_S = 1e-5

PRINCIPAL = "operator"
"""Who changes the bank."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What an acknowledged update survives."""

    durability: Durability
    """The level."""
    ship_every_s: float = 0.0
    """Seconds between two copies of the journals to the bank's storage; 0 = none."""

    def __str__(self) -> str:
        return f"{self.durability}{', shipped' if self.ship_every_s else ''}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where a bank is, and how it is served."""

    url: str
    """Directory, or URL of a bucket."""
    journal_dir: Path
    """Directory of its journals."""
    folder: Path
    """Directory for the board and for what the process has to say."""
    promise: Promise = Promise(Durability.PROCESS)
    """What an acknowledged update survives."""
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    """What leads to the bucket."""

    @property
    def is_directory(self) -> bool:
        """Whether the bank is on the local disk."""
        return "://" not in self.url

    def objects(self) -> ObjectStore:
        """Open the bank's storage."""
        # A directory need not survive a loss of power here, and is much quicker so.
        return UnsyncedObjects(self.url) if self.is_directory else open_objects(self.url)

    def open_log_file(self, path: Path, plan: FaultPlan) -> LogFile:
        """Make a file of a journal."""
        return FaultyLogFile(path, plan)

    def config(self) -> ShardConfig:
        """Return settings under which a bank of this size never rests."""
        return ShardConfig(
            durability=self.promise.durability,
            ship_every_s=self.promise.ship_every_s,
            journal_dir=str(self.journal_dir),
            consolidate_bytes=1500,
            segment_bytes=1000,
            resident_bytes=20_000,
            retained_revisions=3,
            lease_s=0.3,
        )


class BankService:
    """All of a bank in this process: two shards, the coordinator, the operations."""

    def __init__(self, setting: Setting, board: Board, plan: ArmedKill) -> None:
        self._setting = setting
        self._board = board
        self._plan = plan
        self._shards = [self._open_shard(index) for index in range(NUM_SHARDS)]
        bank = Bank.open(self._objects())
        group = ShardGroup(bank.spec, self)
        log, trees = RevisionLog(bank), TreeStore(bank)
        coordinator = Coordinator(bank, group, log=log, trees=trees)
        coordinator.recover()
        self._operations = BankOperations(bank, group, coordinator, log=log, trees=trees)

    def _objects(self) -> ObjectStore:
        return FaultyObjects(self._setting.objects(), self._plan)

    def _open_shard(self, index: int) -> Shard:
        return Shard.open(
            self._objects(),
            shard_id=f"shard-{index}",
            partitions=range(index, SPEC.num_partitions, NUM_SHARDS),
            config=self._setting.config(),
            maintenance=ShownMaintenance(ThreadMaintenance(), self._board),
            open_log_file=lambda path: self._setting.open_log_file(path, self._plan),
        )

    def members(self) -> tuple[ShardMember, ...]:
        # docstring inherited
        return tuple(
            ShardMember(shard_id=f"shard-{index}", partitions=shard.partitions, handle=shard)
            for index, shard in enumerate(self._shards)
        )

    def answer(self, request: Request) -> Answer:
        """Do what is asked."""
        with self._board.at(request.phase):
            match request:
                case asked.Push():
                    return self._push(request)
                case asked.Fetch():
                    return self._fetch(request)
                case asked.Survey():
                    return self._survey()
                case asked.ArmKill():
                    self._plan.arm(request.calls, after=request.after)
                case asked.Stop():
                    for shard in self._shards:
                        shard.close()
                case _:
                    return self._change(request)
        return None

    def _push(self, push: asked.Push) -> asked.Pushed:
        results: list[UpdateResult] = []
        duplicates = []
        for shard, refs in self._by_shard(list(push.bases)):
            found = shard.push(push.update(refs))
            results += found.results
            duplicates.append(found.duplicate)
        return asked.Pushed(results=tuple(results), duplicate=all(duplicates))

    def _by_shard(self, refs: Sequence[BlockRef]) -> list[tuple[Shard, list[BlockRef]]]:
        split: dict[int, list[BlockRef]] = {}
        for ref in refs:
            split.setdefault(SPEC.partition_of(ref) % NUM_SHARDS, []).append(ref)
        return [(self._shards[index], found) for index, found in sorted(split.items())]

    def _fetch(self, fetch: asked.Fetch) -> tuple[asked.Fetched, ...]:
        # One right after the other: what a swap shows of itself in between is over at once.
        looks = [self._fetched(fetch.refs) for _ in range(fetch.times)]
        return tuple(_told([block for part in found for block in part.blocks]) for found in looks)

    def _fetched(self, refs: Sequence[BlockRef]) -> list[FetchResult]:
        """Return blocks of one revision, as a client puts them together."""
        split = self._by_shard(refs)
        found = [shard.fetch(mine) for shard, mine in split]
        while len({part.revision for part in found}) > 1:
            newest = max(part.revision for part in found)
            found = [
                part if part.revision == newest else shard.fetch(mine, min_revision=newest)
                for part, (shard, mine) in zip(found, split, strict=True)
            ]
        return found

    def _survey(self) -> asked.Surveyed:
        images, versions = {}, {}
        for shard, refs in self._by_shard(list(SPEC.blocks())):
            arrays = {
                content.ref: {Role.WEIGHT: content.weight, **content.optimizer_state}
                for content in shard.read(refs)
            }
            for status in shard.describe(refs):
                kept = arrays.get(status.ref)
                versions[status.ref] = status.version
                images[status.ref] = asked.Image(
                    state=status.state,
                    step=status.step,
                    arrays=() if kept is None else tuple(kept[r].tobytes() for r in SPEC.roles),
                )
        served = {
            block.ref: block.weight.tobytes()
            for found in self._fetched(list(SPEC.blocks()))
            for block in found.blocks
            if block.weight is not None
        }
        return asked.Surveyed(versions=versions, images=images, served=served)

    def _change(self, operation: asked.AdminOperation) -> TransactionReport | GarbageReport:
        operations = self._operations
        request = AdminRequest(request_id=operation.request_id, principal=PRINCIPAL)
        match operation:
            case asked.Swap(value=value):
                contents = [
                    SetContent(ref=ref, weight=asked.marked_content(ref, value)) for ref in MARKED
                ]
                return operations.swap_blocks(request, contents)
            case asked.Replace(refs=refs, number=number):
                return operations.swap_blocks(request, _numbered(refs, number))
            case asked.Withhold():
                return operations.withhold_topic(request, asked.HIDDEN_TOPIC)
            case asked.Restore():
                return operations.restore_topic(request, asked.HIDDEN_TOPIC)
            case asked.TakeSnapshot(name=name):
                revision = operations.create_snapshot(request, name).revision
                return TransactionReport(revision=revision, changes=())
            case asked.DropSnapshot(name=name):
                _, revision = operations.delete_snapshot(request, name)
                return TransactionReport(revision=revision, changes=())
            case asked.RollBack(target=target, topic=topic, only_block=only_block):
                return operations.rollback(request, target, topic, only_block=only_block)
            case asked.Delete():
                return operations.delete_topic(request, asked.DOOMED_TOPIC)
            case asked.Recreate(number=number, packed=True):
                return operations.import_topic(request, asked.doomed_pack(number))[0]
            case asked.Recreate(number=number):
                return operations.swap_blocks(request, _numbered(asked.DOOMED, number))
            case asked.Collect(keep_revisions=keep_revisions):
                return operations.collect_garbage(request, keep_revisions=keep_revisions)


def _told(blocks: Sequence[Block]) -> asked.Fetched:
    return asked.Fetched(
        versions={block.ref: block.version for block in blocks},
        values={
            block.ref: tuple(np.unique(block.weight).tolist())
            for block in blocks
            if block.weight is not None
        },
    )


def _numbered(refs: Sequence[BlockRef], number: int) -> list[SetContent]:
    return [SetContent(ref=ref, weight=asked.numbered_content(ref, number)) for ref in refs]


def serve(
    setting: Setting,
    control: Connection,
    clients: Sequence[Connection],
    kill: asked.ArmKill | None,
) -> None:
    """Open a bank and serve it until killed or stopped; the body of the child.

    Parameters
    ----------
    setting
        Which bank.
    control
        Is told when the bank is open, or why not; then served like a client.
    clients
        Each is served by a thread, one request after the other.
    kill
        When the process is to kill itself, counted from its very start; None = never.
    """
    os.environ.update(setting.environment)
    # Threads that change places this often meet in ways in which they seldom do otherwise.
    sys.setswitchinterval(_SWITCH_S)
    log = (setting.folder / "service.log").open("a")
    faulthandler.register(signal.SIGUSR1, file=log)
    logging.basicConfig(stream=log, format="%(asctime)s %(message)s", force=True)
    board = Board(setting.folder / "board")
    plan = ArmedKill(board)
    if kill is not None:
        plan.arm(kill.calls, after=kill.after)
    try:
        with board.at(Phase.OPENING):
            service = BankService(setting, board, plan)
    except Exception as err:  # the parent judges it
        control.send(_portable(err))
        return
    control.send(None)
    for connection in clients:
        threading.Thread(target=_serve_one, args=(service, connection), daemon=True).start()
    _serve_one(service, control)


def _serve_one(service: BankService, connection: Connection) -> None:
    while True:
        try:
            request: Request = connection.recv()
        except EOFError:
            return
        try:
            answer: Answer | MembankError = service.answer(request)
        except Exception as err:  # as a servicer: whatever happens is the answer
            answer = _portable(err)
        connection.send(answer)
        if isinstance(request, asked.Stop):
            return


def _portable(err: Exception) -> MembankError:
    logging.getLogger(__name__).warning("%s", "".join(traceback.format_exception(err)))
    return err if isinstance(err, MembankError) else InternalError(repr(err))
