"""A transport around objects in this process, and a faulty one around any transport."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, BinaryIO, Protocol

import numpy as np

from fake_bank import FakeBank
from fake_service import REFUSALS
from faults import Fault, FaultScript
from membank.client import (
    FetchAnswer,
    ImportAnswer,
    LayerListener,
    PackInfo,
    PushAnswer,
    Transport,
    WatchAnswer,
)
from membank.wire.codec import fetch_codec, push_codec
from membank.wire.crc import crc32c
from membank.wire.errors import DeadlineError, Reason, UnavailableError
from membank.wire.records import (
    Applied,
    AuditRecord,
    BankInfo,
    BankStats,
    Block,
    BlockDescription,
    BlockEvent,
    GarbageReport,
    Gradient,
    Snapshot,
    StoredPack,
    Topic,
    TransactionReport,
    Update,
    UpdateResult,
)
from membank.wire.spec import DTYPES, Array, BankSpec, BlockRef
from membank.wire.steps import Step


class FetchedLike(Protocol):
    """Blocks of one revision."""

    @property
    def revision(self) -> int: ...

    @property
    def blocks(self) -> tuple[Block, ...]: ...


class PushedLike(Protocol):
    """What became of an update."""

    @property
    def results(self) -> tuple[UpdateResult, ...]: ...

    @property
    def duplicate(self) -> bool: ...


class SubscriptionLike(Protocol):
    """Changes as they take effect."""

    def next_events(self, timeout_s: float) -> tuple[tuple[BlockEvent, ...], int]: ...

    def close(self) -> None: ...


class ShardLike(Protocol):
    """The data path of a shard, as the service's contract has it."""

    def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held_versions: Sequence[int | None] | None = None,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
    ) -> FetchedLike: ...

    def push(self, update: Update) -> PushedLike: ...

    def subscribe(
        self, refs: Sequence[BlockRef] = (), *, admin_only: bool = False
    ) -> SubscriptionLike: ...


def _decoded_block(block: Block) -> Block:
    header = block.header
    if block.weight is None or header.dtype in DTYPES:
        return block
    weight = fetch_codec(header.dtype).decode(block.weight.view(np.uint8), header.shape)
    return replace(block, weight=weight)


def _decoded_gradient(spec: BankSpec, gradient: Gradient) -> Gradient:
    if not gradient.encoding:
        return gradient
    shape = spec.block_shape(gradient.ref.level)
    values = push_codec(gradient.encoding).decode(gradient.values.view(np.uint8), shape)
    return replace(gradient, values=values, encoding="")


class InProcessTransport:
    """A transport to the gateway of `bank`, and to `shard` where one is given."""

    def __init__(self, bank: FakeBank, shard: ShardLike | None = None) -> None:
        self._bank = bank
        self._shard_or_none = shard
        self.is_closed = False

    @property
    def _shard(self) -> ShardLike:
        if self._shard_or_none is None:
            raise UnavailableError("ask a shard", reason=Reason.NOT_OWNER)
        return self._shard_or_none

    async def get_bank(self, *, timeout_s: float) -> BankInfo:
        return self._bank.info()

    async def get_tree(self, *, timeout_s: float) -> bytes:
        return self._bank.tree()

    async def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held_versions: Sequence[int | None] | None = None,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
        into: Mapping[BlockRef, Array] | None = None,
        timeout_s: float,
    ) -> FetchAnswer:
        fetched = self._shard.fetch(
            refs,
            held_versions=held_versions,
            dtype=dtype,
            min_revision=min_revision,
            snapshot=snapshot,
        )
        blocks = tuple(map(_decoded_block, fetched.blocks))
        for block in blocks:
            if block.weight is not None:
                block.weight.flags.writeable = False
        return FetchAnswer(revision=fetched.revision, blocks=blocks)

    async def fetch_layers(
        self,
        refs: Sequence[BlockRef],
        listener: LayerListener,
        *,
        layers_per_part: int,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
        into: Mapping[BlockRef, Array] | None = None,
        timeout_s: float,
    ) -> None:
        answer = await self.fetch(
            refs, dtype=dtype, min_revision=min_revision, snapshot=snapshot, timeout_s=timeout_s
        )
        listener.restart()
        for block in answer.blocks:
            if block.weight is None:
                listener.take(answer.revision, block, 0)
                continue
            here = (into or {}).get(block.ref, np.empty_like(block.weight))
            here[...] = block.weight
            shown = here.view()
            shown.flags.writeable = False
            whole = replace(block, weight=shown)
            for first in range(0, len(here), layers_per_part):
                listener.take(answer.revision, whole, min(first + layers_per_part, len(here)))

    async def push(self, update: Update, *, timeout_s: float) -> PushAnswer:
        spec = self._bank.info().spec
        gradients = tuple(_decoded_gradient(spec, gradient) for gradient in update.gradients)
        pushed = self._shard.push(replace(update, gradients=gradients))
        return PushAnswer(results=pushed.results, duplicate=pushed.duplicate)

    async def watch(
        self, refs: Sequence[BlockRef], *, admin_only: bool
    ) -> AsyncGenerator[WatchAnswer]:
        subscription = self._shard.subscribe(refs, admin_only=admin_only)
        try:
            yield WatchAnswer(events=())
            while True:
                events, num_dropped = await asyncio.to_thread(subscription.next_events, 0.2)
                if events or num_dropped:
                    yield WatchAnswer(events=events, num_dropped=num_dropped)
        finally:
            subscription.close()

    async def create_bank(
        self, spec: BankSpec, tree: bytes, *, request_id: str, timeout_s: float
    ) -> BankSpec:
        return self._bank.create_bank(spec, tree, request_id=request_id)

    async def list_topics(
        self, parent: BlockRef | None, *, depth: int, timeout_s: float
    ) -> tuple[Topic, ...]:
        return self._bank.topics(parent, depth)

    async def describe(
        self, refs: Sequence[BlockRef], *, timeout_s: float
    ) -> tuple[BlockDescription, ...]:
        return self._bank.describe(refs)

    async def apply(
        self, steps: Sequence[Step], *, request_id: str, dry_run: bool, timeout_s: float
    ) -> Applied:
        return self._bank.apply(steps, request_id=request_id, dry_run=dry_run)

    async def export(
        self,
        topic: BlockRef,
        target: BinaryIO,
        *,
        weights_only: bool,
        since: str | int | None = None,
        timeout_s: float,
    ) -> PackInfo:
        pack = self._bank.export(topic)
        target.write(pack)
        return self._pack_info(pack)

    async def store_pack(
        self,
        topic: BlockRef,
        name: str,
        *,
        weights_only: bool,
        since: str | int | None,
        timeout_s: float,
    ) -> PackInfo:
        return self._pack_info(self._bank.store_pack(topic, name))

    async def list_packs(self, *, timeout_s: float) -> tuple[StoredPack, ...]:
        return self._bank.list_packs()

    async def delete_pack(self, name: str, *, request_id: str, timeout_s: float) -> StoredPack:
        return self._bank.delete_pack(name, request_id=request_id)

    def _pack_info(self, pack: bytes) -> PackInfo:
        return PackInfo(num_bytes=len(pack), crc32c=crc32c(pack), revision=self._bank.revision)

    async def import_pack(
        self,
        pack: BinaryIO | str,
        *,
        topic: BlockRef | None = None,
        force: bool = False,
        request_id: str,
        dry_run: bool,
        timeout_s: float,
    ) -> ImportAnswer:
        data = pack if isinstance(pack, str) else pack.read()
        report, installed = self._bank.import_pack(
            data, topic=topic, request_id=request_id, dry_run=dry_run
        )
        return ImportAnswer(report=report, topic=installed)

    async def create_snapshot(self, name: str, *, request_id: str, timeout_s: float) -> Snapshot:
        return self._bank.create_snapshot(name)

    async def list_snapshots(self, *, timeout_s: float) -> tuple[Snapshot, ...]:
        return self._bank.list_snapshots()

    async def delete_snapshot(
        self, name: str, *, request_id: str, timeout_s: float
    ) -> tuple[Snapshot, int]:
        return self._bank.delete_snapshot(name, request_id=request_id)

    async def rollback(
        self,
        target: str | int,
        topic: BlockRef | None,
        *,
        only_block: bool,
        request_id: str,
        dry_run: bool,
        timeout_s: float,
    ) -> TransactionReport:
        return self._bank.rollback(
            target, topic, only_block=only_block, request_id=request_id, dry_run=dry_run
        )

    async def collect_garbage(
        self, *, keep_revisions: int | None, dry_run: bool, request_id: str, timeout_s: float
    ) -> GarbageReport:
        return self._bank.collect_garbage(keep_revisions=keep_revisions, dry_run=dry_run)

    async def get_stats(self, *, timeout_s: float) -> BankStats:
        return self._bank.stats()

    async def get_receipt(self, revision: int, *, timeout_s: float) -> bytes:
        return self._bank.receipt(revision)

    async def list_audit_records(
        self, *, limit: int, retained_only: bool, timeout_s: float
    ) -> tuple[AuditRecord, ...]:
        return self._bank.audit_records(limit, retained_only=retained_only)

    async def close(self, *, grace_s: float = 0.0) -> None:
        self.is_closed = True


class FaultyTransport:
    """Spoils calls of another transport as a script says, and notes all of them."""

    def __init__(self, inner: Transport, script: FaultScript) -> None:
        self._inner = inner
        self._script = script

    def __getattr__(self, method: str) -> Any:
        call = getattr(self._inner, method)
        if method in ("watch", "close"):
            return call

        async def spoilt(*args: Any, **kwargs: Any) -> Any:
            fault = self._script.take(method)
            self._note(method, args, kwargs)
            if fault in REFUSALS:
                raise REFUSALS[fault]()
            if fault is Fault.SLOW:
                raise DeadlineError(f"{kwargs['timeout_s']:g} s have passed")
            answer = await call(*args, **kwargs)
            if fault is Fault.DROP_RESPONSE:
                raise UnavailableError("the answer was lost")
            return answer

        return spoilt

    def _note(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if method == "push":
            self._script.request_ids.append(args[0].request_id)
            self._script.refs.append(tuple(gradient.ref for gradient in args[0].gradients))
        elif method in ("fetch", "fetch_layers"):
            self._script.refs.append(tuple(args[0]))
        elif "request_id" in kwargs:
            self._script.request_ids.append(kwargs["request_id"])


class InProcessNetwork:
    """A connector to the gateway and the shards of a bank, each with a script of faults.

    Parameters
    ----------
    bank
        The bank; its shards get addresses here.
    """

    GATEWAY = "gateway:1"

    def __init__(self, bank: FakeBank) -> None:
        self.bank = bank
        self.scripts = {self.GATEWAY: FaultScript()}
        self.transports: dict[str, InProcessTransport] = {}
        self.after_fetch: Callable[[], object] = lambda: None
        self._shards: dict[str, ShardLike] = {}
        for number, shard in enumerate(bank.shards):
            self.place(shard.shard_id, shard, f"shard:{number + 1}")

    def place(self, shard_id: str, shard: ShardLike, endpoint: str) -> None:
        """Let a shard answer at `endpoint`, and say so in the placement."""
        self._shards[endpoint] = shard
        self.scripts.setdefault(endpoint, FaultScript())
        self.bank.endpoints[shard_id] = endpoint
        self.bank.generation += 1

    def remove(self, endpoint: str) -> None:
        """Let nobody answer at `endpoint` any more."""
        del self._shards[endpoint]

    def __call__(self, endpoint: str) -> Transport:
        shard = self._shards.get(endpoint)
        inner = InProcessTransport(self.bank, shard)
        self.transports[endpoint] = inner
        reachable: Transport = FaultyTransport(inner, self.scripts[endpoint])
        return _Reachable(reachable, self, endpoint)


class _Reachable:
    """Fails like a refused connection where nobody answers at an endpoint."""

    def __init__(self, inner: Transport, network: InProcessNetwork, endpoint: str) -> None:
        self._inner = inner
        self._network = network
        self._endpoint = endpoint

    async def fetch(self, *args: Any, **kwargs: Any) -> FetchAnswer:
        await asyncio.sleep(0)  # others get to run, as they do while anything travels
        answer: FetchAnswer = await self.__getattr__("fetch")(*args, **kwargs)
        self._network.after_fetch()
        return answer

    def __getattr__(self, method: str) -> Any:
        known = self._network._shards
        if method != "close" and self._endpoint not in {*known, InProcessNetwork.GATEWAY}:
            raise UnavailableError("connection refused", reason=Reason.CONNECT_FAILED)
        return getattr(self._inner, method)
