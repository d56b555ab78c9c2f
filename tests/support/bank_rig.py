"""A bank with two shards and a coordinator that die and fail like processes of their own.

Each of the three reaches the storage through its own wrapper and its own `FaultPlan`, so that one of them can
be killed at any mutating call while the others go on, and hear only that it does not answer.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import fsspec

from membank.bank_service.knowledge import (
    BankOperations,
    Coordinator,
    CoordinatorConfig,
    ReceiptDesk,
    RevisionLog,
    ShardGroup,
    ShardMember,
    TreeStore,
)
from membank.bank_service.knowledge.shards import ShardHandle
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.shard.config import Durability
from membank.bank_service.store import Bank, FsspecObjects, ObjectStore, SealedObjects
from membank.bank_service.store.objects import Data
from membank.wire.errors import MembankError, UnavailableError
from membank.wire.format import TreeDocument
from membank.wire.signing import Signer
from membank.wire.spec import BankSpec, BlockRef
from storage_faults import Crash, FaultPlan, FaultyLogFile, FaultyObjects, StorageFault
from tiny_bank import UnsyncedObjects, file_bytes

COORDINATOR = "coordinator"
SHARDS = ("shard-0", "shard-1")
PROCESSES = (*SHARDS, COORDINATOR)


class Place(Protocol):
    """Where a bank is kept."""

    @property
    def journals(self) -> Path | None:
        """Directory of the shards' journals; None = beside the blocks."""

    def objects(self, plan: FaultPlan) -> ObjectStore:
        """Return the storage as a process reaches it whose calls follow `plan`."""

    def files(self) -> dict[str, bytes]:
        """Return every file, journals included."""

    def remove(self) -> None:
        """Remove everything."""


class _FaultyDirectory(UnsyncedObjects):
    """A directory whose mutating calls follow a `FaultPlan`: still one that may hold journals."""

    def __init__(self, root: Path, plan: FaultPlan) -> None:
        super().__init__(root)
        self._plan = plan

    def put(self, key: str, data: Data, *, durable: bool = False) -> None:
        put = super().put
        self._plan.run(lambda: put(key, data, durable=durable), what=f"put {key}")

    def put_if_absent(self, key: str, data: Data, *, durable: bool = False) -> None:
        put = super().put_if_absent
        self._plan.run(lambda: put(key, data, durable=durable), what=f"create {key}")

    def sync(self, keys: Sequence[str]) -> None:
        sync = super().sync
        self._plan.run(lambda: sync(keys), what=f"sync {len(keys)}")

    def delete(self, key: str) -> None:
        delete = super().delete
        self._plan.run(lambda: delete(key), what=f"delete {key}")


class LocalPlace:
    """A bank in a directory, journals and all."""

    journals: Path | None = None

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="membank-machine-"))

    def objects(self, plan: FaultPlan) -> ObjectStore:
        return _FaultyDirectory(self._root, plan)

    def files(self) -> dict[str, bytes]:
        return file_bytes(self._root)

    def remove(self) -> None:
        shutil.rmtree(self._root)


class SealedPlace:
    """A sealed bank in a directory, and its keyring in another: both fail by one plan.

    Shards need `Durability.STORE`.
    """

    journals: Path | None = None

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or Path(tempfile.mkdtemp(prefix="membank-machine-"))
        """Holds both."""
        self.bank = self.root / "bank"
        """Directory of the bank."""
        self.keyring = self.root / "keyring"
        """Directory of the keyring."""

    def objects(self, plan: FaultPlan) -> ObjectStore:
        return SealedObjects(
            _FaultyDirectory(self.bank, plan), _FaultyDirectory(self.keyring, plan)
        )

    def files(self) -> dict[str, bytes]:
        return file_bytes(self.root)

    def remove(self) -> None:
        shutil.rmtree(self.root)


class MemoryPlace:
    """A bank in an object storage; journals that are not kept there lie in a directory."""

    def __init__(self) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="membank-machine-"))
        self._bucket = f"/{self._root.name}"
        self._objects = FsspecObjects(f"memory:/{self._bucket}")

    @property
    def journals(self) -> Path | None:
        return self._root

    def objects(self, plan: FaultPlan) -> ObjectStore:
        return FaultyObjects(self._objects, plan)

    def files(self) -> dict[str, bytes]:
        bucket = fsspec.filesystem("memory")
        stored = {path: bytes(bucket.store[path].getbuffer()) for path in bucket.find(self._bucket)}
        return file_bytes(self._root) | stored

    def remove(self) -> None:
        shutil.rmtree(self._root)
        fsspec.filesystem("memory").rm(self._bucket, recursive=True)


@dataclass(frozen=True)
class Disturbance:
    """A fault that hits one process."""

    victim: str
    """The process."""
    fault: StorageFault
    """What happens to it."""
    at: int
    """At which of its mutating calls from now on, from 1."""


class _Remote:
    """A shard as another process sees it: when it dies, it does not answer."""

    def __init__(self, rig: BankRig, name: str) -> None:
        self._rig = rig
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._rig.shard(self._name), attribute)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return found(*args, **kwargs)
            except Crash as err:
                raise UnavailableError(f"{self._name} has died") from err

        return call


class BankRig:
    """A new bank, its shards and its coordinator.

    Parameters
    ----------
    place
        Where it is made.
    spec
        What it is; partitions go to the shards in turn.
    tree
        Its tree document.
    config
        Settings of the shards; `journal_dir` is added.
    """

    def __init__(
        self, place: Place, spec: BankSpec, *, tree: TreeDocument, config: ShardConfig
    ) -> None:
        self.place = place
        self.objects = place.objects(FaultPlan())
        """The bank's storage as no fault touches it."""
        self.bank = Bank.create(self.objects, spec, tree=tree)
        self.spec = self.bank.spec
        journals = place.journals
        self._config = replace(config, journal_dir=None if journals is None else str(journals))
        self._durability = dict.fromkeys(SHARDS, config.durability)
        # Every look at the clock takes a second, so that leases run out all the time.
        self._seconds = itertools.count(1.0)
        self._shards: dict[str, Shard] = {}
        self._group: ShardGroup | None = None
        self._coordinator: Coordinator | None = None
        self._operations: BankOperations | None = None
        self._plans = {name: FaultPlan() for name in PROCESSES}
        # Shards that hold something that is nowhere but on their machine.
        self._needs_machine: set[str] = set()
        self._signer = Signer.generate()
        self._armed: Disturbance | None = None
        self._was_hit = False
        self.start()

    # ---- who is there

    def is_up(self, name: str) -> bool:
        """Say whether a process runs."""
        return self._operations is not None if name == COORDINATOR else name in self._shards

    def down(self) -> list[str]:
        """Return the processes that do not run."""
        return [name for name in PROCESSES if not self.is_up(name)]

    def shard(self, name: str) -> Shard:
        """Return a shard that runs."""
        if name not in self._shards or self._plans[name].is_dead:
            raise UnavailableError(f"{name} is down")
        return self._shards[name]

    @property
    def shards(self) -> dict[str, Shard]:
        """The shards that run."""
        return dict(self._shards)

    @property
    def operations(self) -> BankOperations:
        """The operations of the coordinator."""
        if self._operations is None:
            raise UnavailableError("the coordinator is down")
        return self._operations

    def owner_of(self, ref: BlockRef) -> str:
        """Return the name of the shard that owns `ref`."""
        return SHARDS[self.spec.partition_of(ref) % len(SHARDS)]

    def partitions_of(self, name: str) -> tuple[int, ...]:
        """Return the partitions of a shard."""
        return tuple(range(SHARDS.index(name), self.spec.num_partitions, len(SHARDS)))

    def committed_by(self, request_id: str) -> int | None:
        """Return the revision that this request made; None = it made none."""
        for number in range(self.bank.latest_number(), 0, -1):
            record = self.bank.require_record(number)
            if record.committed and record.request_id == request_id:
                return number
        return None

    # ---- life and death

    def start(self) -> None:
        """Start what does not run; the coordinator then settles what its predecessor left."""
        for name in SHARDS:
            self.start_shard(name)
        if self._operations is None:
            self._start_coordinator()

    def start_shard(self, name: str) -> None:
        """Start a shard, unless it runs."""
        if name in self._shards:
            return
        plan = self._new_plan(name)
        self._needs_machine.add(name)
        self._shards[name] = Shard.open(
            Bank.open(self.place.objects(plan)),
            shard_id=name,
            partitions=self.partitions_of(name),
            config=replace(self._config, durability=self._durability[name]),
            clock=lambda: next(self._seconds),
            # Whoever was here before is dead: the rig has seen to it.
            sleep=lambda seconds: None,
            open_log_file=lambda path: FaultyLogFile(path, plan),
        )
        if self._durability[name] is Durability.STORE:
            self._needs_machine.discard(name)

    def stop(self, name: str, *, consolidate: bool) -> None:
        """Stop a shard as it should be stopped."""
        shard = self._shards.pop(name)
        shard.close(consolidate=consolidate)

    def set_durability(self, name: str, durability: Durability) -> None:
        """Let a shard keep its journal elsewhere from its next start on."""
        self._durability[name] = durability

    def can_lose_machine_of(self, name: str) -> bool:
        """Say whether all that a shard acknowledged is in the bank's own storage."""
        return self.place.journals is not None and name not in self._needs_machine

    def lose_machine_of(self, name: str) -> None:
        """Kill a shard, and take away what its machine held."""
        assert self.place.journals is not None
        self.kill(name)
        for number in self.partitions_of(name):
            shutil.rmtree(self.place.journals / self.spec.bank_id / f"{number:04d}")

    def kill(self, *names: str) -> None:
        """End processes where they stand."""
        for name in names:
            self._plans[name].is_dead = True
        self._bury()

    def recover(self) -> None:
        """Let the coordinator settle whatever is unsettled."""
        assert self._coordinator is not None
        self._coordinator.recover()

    def members(self) -> tuple[ShardMember, ...]:
        """Return the shards as the coordinator calls them."""
        return tuple(
            ShardMember(
                shard_id=name,
                partitions=self.partitions_of(name),
                handle=cast("ShardHandle", _Remote(self, name)),
            )
            for name in SHARDS
        )

    def close(self) -> None:
        """Stop everything and remove the bank."""
        for name in list(self._shards):
            self.stop(name, consolidate=True)
        self.kill(COORDINATOR)
        self.place.remove()

    def _start_coordinator(self) -> None:
        plan = self._new_plan(COORDINATOR)
        bank = Bank.open(self.place.objects(plan))
        log, trees, group = RevisionLog(bank), TreeStore(bank), ShardGroup(self.spec, self)
        self._group = group
        config = CoordinatorConfig(lock_wait_s=0.0, commit_patience_s=0.0, commit_pause_s=0.0)
        receipts = ReceiptDesk(bank, group, log=log, signer=self._signer)
        coordinator = Coordinator(
            bank, group, log=log, trees=trees, receipts=receipts, config=config
        )
        coordinator.recover()
        self._coordinator = coordinator
        self._operations = BankOperations(bank, group, coordinator, log=log, trees=trees)

    def _bury(self) -> None:
        for name in SHARDS:
            if self._plans[name].is_dead and name in self._shards:
                # The kernel takes locks and files back; nothing else of the process runs.
                with suppress(Crash, MembankError):
                    self._shards.pop(name).close(consolidate=False)
        if self._plans[COORDINATOR].is_dead or self._operations is None:
            self._operations = None
            if self._group is not None:
                self._group.close()
                self._group = None

    # ---- faults

    @contextmanager
    def disturbed(self, disturbance: Disturbance | None) -> Iterator[None]:
        """Let a fault happen to one process meanwhile, at most; then bury whoever died."""
        self._armed, self._was_hit = disturbance, False
        for plan in self._plans.values():
            plan.happened = False
        if disturbance is not None and self.is_up(disturbance.victim):
            self._arm(self._plans[disturbance.victim], disturbance)
        try:
            yield
        finally:
            self._armed = None
            for plan in self._plans.values():
                plan.at = 0
            self._bury()

    @property
    def was_disturbed(self) -> bool:
        """Whether the fault has happened."""
        return self._was_hit or any(plan.happened for plan in self._plans.values())

    def _new_plan(self, name: str) -> FaultPlan:
        self._was_hit = self.was_disturbed
        plan = self._plans[name] = FaultPlan()
        if self._armed is not None and self._armed.victim == name:
            self._arm(plan, self._armed)
        return plan

    @staticmethod
    def _arm(plan: FaultPlan, disturbance: Disturbance) -> None:
        plan.fault, plan.at = disturbance.fault, plan.num_calls + disturbance.at


def refs_by_owner(rig: BankRig, refs: Iterable[BlockRef]) -> dict[str, list[BlockRef]]:
    """Return refs by the shard that owns them, in the order given."""
    split: dict[str, list[BlockRef]] = {}
    for ref in refs:
        split.setdefault(rig.owner_of(ref), []).append(ref)
    return split
