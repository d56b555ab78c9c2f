"""A shard in memory, for `fake_bank`."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from membank.wire.codec import fetch_codec
from membank.wire.crc import crc32c
from membank.wire.errors import Reason, UnavailableError
from membank.wire.format import initial_weight
from membank.wire.records import (
    Block,
    BlockEvent,
    BlockHeader,
    Update,
    UpdateResult,
)
from membank.wire.spec import DTYPES, Array, BankSpec, BlockRef, BlockState


@dataclass(slots=True)
class Held:
    """A block as a shard keeps it."""

    weight: Array
    version: int = 0
    state: BlockState = BlockState.ACTIVE
    step: int = 0


@dataclass(frozen=True, slots=True)
class Fetched:
    """Blocks of one revision."""

    revision: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Pushed:
    """What became of an update."""

    results: tuple[UpdateResult, ...]
    duplicate: bool


class FakeSubscription:
    """Changes that one watcher has not read yet."""

    def __init__(self, refs: Sequence[BlockRef], *, admin_only: bool) -> None:
        self._refs = frozenset(refs)
        self._admin_only = admin_only
        self._queue: queue.SimpleQueue[BlockEvent | None] = queue.SimpleQueue()
        self._read = threading.Event()
        self.is_closed = False

    def offer(self, event: BlockEvent) -> None:
        if self._refs and event.ref not in self._refs:
            return
        if not (self._admin_only and event.is_update):
            self._queue.put(event)

    def next_events(self, timeout_s: float) -> tuple[tuple[BlockEvent, ...], int]:
        try:
            event = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            return (), 0
        self._read.set()
        return ((event,) if event is not None else ()), 0

    def wait_until_read(self) -> None:
        """Wait until the first event was read."""
        if not self._read.wait(timeout=10):
            raise TimeoutError("nobody reads")

    def close(self) -> None:
        self.is_closed = True
        self._queue.put(None)


@dataclass(frozen=True, slots=True)
class Pinned:
    """A snapshot of a fake bank."""

    name: str
    revision: int
    blocks: dict[BlockRef, Held]


class ShardedBank(Protocol):
    """What a fake shard asks of its bank."""

    @property
    def spec(self) -> BankSpec: ...

    def pinned(self, name: str) -> Pinned: ...


class FakeShard:
    """A shard of `FakeBank`; its revision may be held back to play a laggard."""

    def __init__(self, bank: ShardedBank, shard_id: str, partitions: Iterable[int]) -> None:
        self.bank = bank
        self.shard_id = shard_id
        self.partitions = frozenset(partitions)
        self.revision = 0
        self.blocks = {
            ref: Held(initial_weight(bank.spec, ref))
            for ref in bank.spec.blocks()
            if bank.spec.partition_of(ref) in self.partitions
        }
        self.answers: dict[str, Pushed] = {}
        self.subscriptions: list[FakeSubscription] = []
        self.held_back: list[Callable[[], None]] = []
        self.lags = False
        self.num_weights_sent = 0

    @property
    def spec(self) -> BankSpec:
        return self.bank.spec

    def install(self, revision: int, change: Callable[[], None]) -> None:
        """Take part in a transaction, at once or when `catch_up` is called."""

        def commit() -> None:
            change()
            self.revision = revision

        if self.lags:
            self.held_back.append(commit)
        else:
            commit()

    def catch_up(self) -> None:
        """Install what was held back."""
        for commit in self.held_back:
            commit()
        self.held_back = []
        self.lags = False

    def fetch(
        self,
        refs: Sequence[BlockRef],
        *,
        held_versions: Sequence[int | None] | None = None,
        dtype: str | None = None,
        min_revision: int = 0,
        snapshot: str = "",
    ) -> Fetched:
        if self.revision < min_revision:
            # The next attempt finds it up to date.
            self.catch_up()
            raise UnavailableError("behind", reason=Reason.BEHIND_REVISION)
        versions = held_versions or [None] * len(refs)
        blocks = tuple(
            self._fetch_one(ref, version, dtype or self.spec.dtype, snapshot)
            for ref, version in zip(refs, versions, strict=True)
        )
        pinned = self.bank.pinned(snapshot).revision if snapshot else self.revision
        return Fetched(pinned, blocks)

    def _fetch_one(
        self, ref: BlockRef, held_version: int | None, dtype: str, snapshot: str
    ) -> Block:
        kept = self._owned(ref)
        if snapshot and kept.state is BlockState.ACTIVE:
            kept = self.bank.pinned(snapshot).blocks[ref]
        header = BlockHeader(ref=ref, version=kept.version, state=kept.state, dtype=dtype)
        if kept.state is not BlockState.ACTIVE:
            return Block(header=header, weight=None)
        if held_version == kept.version:
            known = crc32c(kept.weight) if dtype == self.spec.dtype else 0
            return Block(header=replace(header, unchanged=True, crc32c=known), weight=None)
        codec = fetch_codec(dtype)
        payload = codec.encode(kept.weight)
        self.num_weights_sent += 1
        return Block(
            header=replace(
                header,
                shape=kept.weight.shape,
                num_bytes=payload.nbytes,
                crc32c=crc32c(payload),
            ),
            # As a shard does: what no bank keeps is as it travels.
            weight=codec.decode(payload, kept.weight.shape).copy() if dtype in DTYPES else payload,
        )

    def push(self, update: Update) -> Pushed:
        if update.request_id in self.answers:
            return replace(self.answers[update.request_id], duplicate=True)
        for gradient in update.gradients:
            self._owned(gradient.ref)
        answer = Pushed(
            tuple(
                self._apply(
                    gradient.ref,
                    gradient.base_version,
                    gradient.values,
                    update.learning_rate_scale,
                )
                for gradient in update.gradients
            ),
            duplicate=False,
        )
        self.answers[update.request_id] = answer
        return answer

    def _apply(self, ref: BlockRef, base: int, gradient: Array, scale: float) -> UpdateResult:
        kept = self.blocks[ref]
        refusal = None
        if kept.state is BlockState.WITHHELD:
            refusal = Reason.BLOCK_WITHHELD
        elif kept.version - base > self.spec.max_staleness:
            refusal = Reason.STALE_VERSION
        if refusal is not None:
            return UpdateResult(ref=ref, accepted=False, version=kept.version, reason=refusal)
        rate = self.spec.levels[ref.level - 1].learning_rate * scale
        step = rate * gradient.astype(np.float32)
        kept.weight = (kept.weight.astype(np.float32) - step).astype(self.spec.numpy_dtype)
        kept.version += 1
        kept.step += 1
        self.tell(ref, is_update=True)
        return UpdateResult(ref=ref, accepted=True, version=kept.version)

    def subscribe(
        self, refs: Sequence[BlockRef] = (), *, admin_only: bool = False
    ) -> FakeSubscription:
        subscription = FakeSubscription(refs, admin_only=admin_only)
        self.subscriptions.append(subscription)
        return subscription

    def tell(self, ref: BlockRef, *, is_update: bool) -> None:
        kept = self.blocks[ref]
        for subscription in self.subscriptions:
            subscription.offer(
                BlockEvent(
                    ref=ref,
                    version=kept.version,
                    state=kept.state,
                    revision=self.revision,
                    is_update=is_update,
                )
            )

    def _owned(self, ref: BlockRef) -> Held:
        self.spec.check_ref(ref)
        if ref not in self.blocks:
            raise UnavailableError(f"{ref} is not mine", reason=Reason.NOT_OWNER)
        return self.blocks[ref]
