"""Shards that pushes arrive at, and pushes to send there."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self, cast

import numpy as np

from http2_callers import framed_message
from membank.bank_service.rpc.budget import ByteBudget
from membank.bank_service.rpc.direct import DataListener
from membank.bank_service.rpc.server import ServerConfig
from membank.bank_service.shard import ShardApi
from membank.bank_service.shard.contract import PushResult
from membank.v1 import block_service_pb2 as block_pb
from membank.wire import convert
from membank.wire.buffers import BufferPool
from membank.wire.crc import crc32c
from membank.wire.records import Gradient, Update, UpdateResult
from membank.wire.spec import BankSpec, BlockRef, LevelSpec

PUSH_PATH = "/membank.v1.BlockService/PushUpdates"
REF = BlockRef(1, 0)
_NOTHING: Mapping[str, object] = MappingProxyType({})


def spec_of(num_bytes: int) -> BankSpec:
    """Return the spec of a bank whose blocks have `num_bytes`: a multiple of 12, or of 12 KiB."""
    block_width = 1 if num_bytes < 12 << 16 else 1_024
    level = LevelSpec(fan_out=2, block_width=block_width)
    width = num_bytes // (12 * block_width)
    return BankSpec(name="pushed", num_layers=1, width=width, levels=(level,))


class TakesPushes:
    """A shard that keeps what is pushed to it.

    Parameters
    ----------
    num_bytes
        Size of its blocks.
    """

    def __init__(self, num_bytes: int) -> None:
        self.spec = spec_of(num_bytes)
        self.updates: list[Update] = []
        """What was applied; a request id once."""
        self.error: Exception | None = None
        self.is_asked = threading.Event()
        self.may_answer = threading.Event()
        self.may_answer.set()

    def push(self, update: Update) -> PushResult:
        """Apply an update."""
        self.is_asked.set()
        assert self.may_answer.wait(10.0)
        if self.error is not None:
            raise self.error
        is_known = any(each.request_id == update.request_id for each in self.updates)
        if not is_known:
            self.updates.append(update)
        results = (UpdateResult(ref=REF, accepted=True, version=1),)
        return PushResult(results=results, duplicate=is_known)

    def gradient(self, number: int = -1) -> bytes:
        """Return the bytes of a gradient that was applied."""
        return self.updates[number].gradients[0].values.tobytes()


class PushRig:
    """A data listener around a shard that takes pushes.

    Parameters
    ----------
    num_bytes
        Size of the shard's blocks.
    budget_bytes
        Bound on payload bytes in flight.
    token_file, tls
        As in `ServerConfig`.
    stall_s
        As of `DataListener`.
    """

    def __init__(
        self,
        num_bytes: int = 9_600,
        *,
        budget_bytes: int = 1 << 30,
        token_file: Path | None = None,
        tls: tuple[Path, Path] | None = None,
        stall_s: float = 30.0,
    ) -> None:
        self.shard = TakesPushes(num_bytes)
        self.budget = ByteBudget(budget_bytes)
        config = ServerConfig(
            drain_s=1.0, token_file=token_file, tls_cert=tls and tls[0], tls_key=tls and tls[1]
        )
        shard = cast("ShardApi", self.shard)
        self.gradients = BufferPool(64 << 20)
        """Memory that they land in."""
        self.listener = DataListener(
            config, shard, self.budget, stall_s=stall_s, gradients=self.gradients
        )
        self.alternative = self.listener.alternative
        self.port = self.alternative.port

    def update(self, request_id: str = "p1", *, ref: BlockRef = REF, seed: int = 0) -> Update:
        """Return a push of one gradient."""
        rng = np.random.default_rng(seed)
        values = rng.standard_normal(self.shard.spec.block_shape(1), np.float32)
        gradient = Gradient(ref=ref, base_version=0, values=values)
        return Update(request_id=request_id, step=4, gradients=(gradient,))

    def wait_until_idle(self) -> None:
        """Wait until no call holds bytes, and nobody is connected."""
        for _ in range(1_000):
            if not self.budget.used_bytes and not self.listener.num_connections:
                return
            threading.Event().wait(0.01)
        raise AssertionError("a call that has ended holds something still")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shard.may_answer.set()
        self.listener.stop()


def push_messages(
    update: Update, *, chunk_bytes: int = 1_000, changed: Mapping[str, object] = _NOTHING
) -> list[block_pb.PushUpdatesRequest]:
    """Return the messages of a push of one gradient; `changed` fields of the first one."""
    (gradient,) = update.gradients
    values = gradient.values.tobytes()
    header = block_pb.UpdateHeader(
        ref=convert.ref_to_pb(gradient.ref),
        base_version=gradient.base_version,
        dtype=convert.dtype_to_pb("float32"),
        num_bytes=len(values),
        crc32c=crc32c(values),
    )
    first = block_pb.PushUpdatesRequest(
        request_id=update.request_id, step=update.step, headers=[header]
    )
    for name, value in changed.items():
        setattr(first, name, value)
    return [
        first,
        *(
            block_pb.PushUpdatesRequest(data=values[at : at + chunk_bytes])
            for at in range(0, len(values), chunk_bytes)
        ),
    ]


def push_body(
    update: Update, *, chunk_bytes: int = 1_000, changed: Mapping[str, object] = _NOTHING
) -> bytes:
    """Return the same as gRPC frames it."""
    messages = push_messages(update, chunk_bytes=chunk_bytes, changed=changed)
    return b"".join(framed_message(each.SerializeToString()) for each in messages)
