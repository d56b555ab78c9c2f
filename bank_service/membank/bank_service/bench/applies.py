"""Pushing to a shard in this process, beside the optimizer's bare kernel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from membank.bank_service.bench.banks import ADAMW, BlockSize, flat_spec
from membank.bank_service.bench.contract import Progress, Row, Target
from membank.bank_service.bench.measure import costs, interleave, stopwatch
from membank.bank_service.bench.scale import Scale
from membank.bank_service.shard import Shard, ShardConfig
from membank.bank_service.store.bank import Bank
from membank.wire.crc import crc32c
from membank.wire.records import Gradient, Update
from membank.wire.spec import Array, BlockRef

_NEVER = 1 << 40
_TARGET = Target(2.0, at_least=False)


class ApplyBench:
    """Pushes whose gradients were checked on arrival, journalled as durably as `process` says.

    Parameters
    ----------
    folder
        Where the bank lies.
    size
        Size of the blocks.
    num_blocks
        Blocks of one push.
    scale
        How often it is pushed.
    target
        Whether the row is judged; else it is for information.
    """

    def __init__(
        self, folder: Path, size: BlockSize, num_blocks: int, scale: Scale, *, target: bool
    ) -> None:
        self._folder = folder
        self._spec = flat_spec(size, num_blocks, optimizer=ADAMW, num_partitions=1)
        self._scale = scale
        self._target = _TARGET if target else None
        self.name = f"apply-{num_blocks}x{size.label}"
        self.expected_s = 4.0

    def run(self, progress: Progress) -> Row:
        # docstring inherited
        spec = self._spec
        count = max(1, self._scale.sample_bytes // (spec.weight_bytes(1) * spec.num_blocks))
        # As in a shard's process: its own threads share a push out, and torch's would only be more.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        folder = self._folder / self.name
        shard = Shard.open(
            Bank.create(str(folder), spec),
            config=ShardConfig(consolidate_bytes=_NEVER, journal_limit_bytes=_NEVER),
        )
        try:
            pusher, kernel = _Pusher(shard), _BareKernel(shard)
            pairs = interleave(
                lambda: pusher.run(count),
                lambda: kernel.run(count),
                num_pairs=self._scale.num_pairs,
                progress=progress,
            )
        finally:
            shard.close(consolidate=False)
            torch.set_num_threads(num_threads)
        return Row(
            name=self.name,
            what=f"push of {spec.num_blocks} blocks of {spec.block_params(1)} parameters (AdamW) "
            "in one process: copied, updated, looked through, checksummed, journalled (process) "
            "and installed / the optimizer's fused kernel alone on as many, in place, one thread",
            unit="s",
            target=self._target,
            samples=costs(pairs, count),
        )


class _Pusher:
    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        rng = np.random.default_rng(0)
        self._gradients = [_gradient(shard, ref, rng) for ref in shard.spec.blocks()]
        self._crcs = [crc32c(values) for values in self._gradients]
        self._count = 0

    def run(self, count: int) -> float:
        updates = [self._update(self._count + number) for number in range(count)]
        self._count += count
        with stopwatch() as watch:
            answers = [self._shard.push(update) for update in updates]
        assert all(result.accepted for answer in answers for result in answer.results)
        # The journal would grow without end, and the kernel begin to write it back meanwhile.
        self._shard.consolidate()
        return watch.seconds

    def _update(self, version: int) -> Update:
        return Update(
            request_id=f"bench-{version}",
            step=version,
            gradients=tuple(
                Gradient(ref=ref, base_version=version, values=values, crc32c=crc)
                for ref, values, crc in zip(
                    self._shard.spec.blocks(), self._gradients, self._crcs, strict=True
                )
            ),
        )


class _BareKernel:
    def __init__(self, shard: Shard) -> None:
        rng = np.random.default_rng(1)
        self._optimizer = shard.spec.optimizer
        self._lists = [
            [torch.from_numpy(np.abs(_gradient(shard, ref, rng))) for ref in shard.spec.blocks()]
            for _ in range(4)
        ]
        self._steps = [torch.tensor(2.0) for _ in self._lists[0]]

    def run(self, count: int) -> float:
        weights, gradients, exp_avgs, exp_avg_sqs = self._lists
        own = self._optimizer
        with stopwatch() as watch:
            for _ in range(count):
                torch._fused_adamw_(
                    weights, gradients, exp_avgs, exp_avg_sqs, [], self._steps,
                    lr=1e-3, beta1=own.beta1, beta2=own.beta2, weight_decay=own.weight_decay,
                    eps=own.eps, amsgrad=False, maximize=False,
                )  # fmt: skip
        return watch.seconds


def _gradient(shard: Shard, ref: BlockRef, rng: np.random.Generator) -> Array:
    return rng.standard_normal(shard.spec.block_shape(ref.level), np.float32) * np.float32(1e-2)
