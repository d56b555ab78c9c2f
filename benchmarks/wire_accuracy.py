"""What the encodings of the wire cost: accuracy, bytes and time; the tables of docs/wire.md.

    python -m benchmarks.wire_accuracy [--rounds N]

Errors are of synthetic blocks; losses are of a least-squares problem that the optimizers of a shard
solve with gradients that were encoded, with and without error feedback.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from membank.bank_service.shard.optimizer import BlockOptimizer
from membank.client import CompressedPushes, Compression, PushAnswer
from membank.wire.buffers import BufferPool
from membank.wire.codec import FETCH_CODECS, Encoded, Sparse, WireCodec, push_codec
from membank.wire.records import UpdateResult
from membank.wire.spec import (
    Array,
    BankSpec,
    BlockRef,
    LevelSpec,
    OptimizerKind,
    OptimizerSpec,
    Role,
)

REF = BlockRef(1, 0)
BATCH, STEPS = 8, 600
OPTIMIZERS = {
    "sgd": (OptimizerSpec(kind=OptimizerKind.SGD, beta1=0.0), 0.003),
    "momentum": (OptimizerSpec(kind=OptimizerKind.SGD, beta1=0.9), 0.0005),
    "adamw": (OptimizerSpec(kind=OptimizerKind.ADAMW), 0.02),
}
"""Optimizer of the bank, and its learning rate."""

_NUM_ELEMENTS = 4 << 20


class OneBlock:
    """What a service makes of pushes to a block of zeros: decodes them, and runs its optimizer.

    Parameters
    ----------
    optimizer
        Name of one of `OPTIMIZERS`.
    """

    def __init__(self, optimizer: str) -> None:
        kind, rate = OPTIMIZERS[optimizer]
        self.spec = BankSpec(
            name="one",
            num_layers=2,
            width=16,
            levels=(LevelSpec(fan_out=1, block_width=4, learning_rate=rate),),
            optimizer=kind,
        )
        shape = self.spec.block_shape(1)
        self._state: dict[Role, Array] = {
            role: np.zeros(shape, np.float32) for role in self.spec.roles
        }
        self._optimizer = BlockOptimizer(self.spec)
        self._version = 0
        self.num_bytes = 0
        """Bytes that were pushed."""

    @property
    def weight(self) -> NDArray[np.float64]:
        """The weight, flat."""
        return self._state[Role.WEIGHT].reshape(-1).astype(np.float64)

    def push(
        self,
        gradients: Mapping[BlockRef, Array | Encoded],
        *,
        base: Mapping[BlockRef, int],
        step: int = 0,
        learning_rate_scale: float = 1.0,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> PushAnswer:
        """Apply the gradient of the block."""
        encoded = gradients[REF]
        assert isinstance(encoded, Encoded)
        self.num_bytes += encoded.nbytes
        values = push_codec(encoded.codec).decode(encoded.payload, encoded.shape)
        after = self._optimizer.apply(1, self._state, self._version, values, learning_rate_scale)
        assert after is not None
        self._state = after
        self._version += 1
        result = UpdateResult(ref=REF, accepted=True, version=self._version)
        return PushAnswer(results=(result,), duplicate=False)


def trained(optimizer: str, compression: Compression) -> tuple[float, float]:
    """Return the loss after training, against that of zeros, and the bytes, against float32.

    Least squares with noise, in batches. Inputs are of scales from 1 to 1/20, so that some elements
    of every gradient are small, and count all the same.

    Parameters
    ----------
    optimizer
        Name of one of `OPTIMIZERS`.
    compression
        What gradients travel as.
    """
    block = OneBlock(optimizer)
    pushes = CompressedPushes(block, compression)
    size = block.spec.block_params(1)
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2 * size, size)) * np.geomspace(1, 0.05, size)
    targets = inputs @ rng.standard_normal(size) + 0.1 * rng.standard_normal(2 * size)
    for step in range(STEPS):
        rows = rng.integers(0, len(inputs), BATCH)
        gradient = inputs[rows].T @ (inputs[rows] @ block.weight - targets[rows]) / BATCH
        pushes.push(
            {REF: gradient.astype(np.float32).reshape(block.spec.block_shape(1))},
            base={REF: step},
            step=step,
            learning_rate_scale=1.0 if step < STEPS // 2 else 0.1,
        )
    errors = inputs @ block.weight - targets
    loss = float(np.mean(errors**2) / np.mean(targets**2))
    return loss, block.num_bytes / (4 * size * STEPS)


def relative_errors(codec: WireCodec, array: NDArray[np.float32]) -> tuple[float, float]:
    """Return two errors of an encoding.

    Parameters
    ----------
    codec
        The encoding.
    array
        What is encoded.

    Returns
    -------
    tuple of float
        The root mean square of the errors against that of the elements, and the largest error
        against the largest element.
    """
    wide = array.astype(np.float64)
    errors = codec.decode(codec.encode(array), array.shape).astype(np.float64) - wide
    rms = float(np.sqrt(np.mean(errors**2) / np.mean(wide**2)))
    return rms, float(np.abs(errors).max() / np.abs(wide).max())


def _print_errors(rng: np.random.Generator) -> None:
    kinds = {
        "Gaussian": rng.standard_normal(_NUM_ELEMENTS),
        "Student's t, 3 degrees of freedom": rng.standard_t(3, _NUM_ELEMENTS),
    }
    print("| blocks | fetched as | bytes | error, rms | error, largest |")
    print("|---|---|---|---|---|")
    for kind, values in kinds.items():
        for name, codec in FETCH_CODECS.items():
            rms, largest = relative_errors(codec, values.astype(np.float32))
            share = codec.num_bytes(_NUM_ELEMENTS) / (4 * _NUM_ELEMENTS)
            print(f"| {kind} | {name} | {share:.1%} | {rms:.3%} | {largest:.3%} |")


def _median_ms(call: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1e3 * statistics.median(times)


def _print_times(rng: np.random.Generator, rounds: int) -> None:
    values = rng.standard_normal(_NUM_ELEMENTS).astype(np.float32)
    pool, copy = BufferPool(1 << 28), np.empty_like(values)
    codecs = {name: codec for name, codec in FETCH_CODECS.items() if name != "float32"}
    of_push = {"sparse, 10%": Sparse(0.1), "sparse, 1%": Sparse(0.01)}
    print("\n| 16 MiB of float32 | encode | decode |\n|---|---|---|")
    copied = _median_ms(lambda: np.copyto(copy, values), rounds)
    print(f"| copied, for comparison | {copied:.1f} ms | |")
    for name, codec in {**codecs, **of_push}.items():
        payload = codec.encode(values)

        def encode(codec: WireCodec = codec) -> object:
            return codec.encode(values, pool.take)

        def decode(codec: WireCodec = codec, payload: NDArray[np.uint8] = payload) -> object:
            return codec.decode(payload, values.shape, pool.take)

        print(
            f"| {name} | {_median_ms(encode, rounds):.1f} ms | {_median_ms(decode, rounds):.1f} ms |"
        )


def _print_losses() -> None:
    print("\n| optimizer | gradients as | bytes | loss with error feedback | without |")
    print("|---|---|---|---|---|")
    for optimizer in OPTIMIZERS:
        exact, _ = trained(optimizer, Compression(error_feedback=False))
        for wire, share in (("bfloat16", 1.0), ("int8", 1.0), ("sparse", 0.1), ("sparse", 0.01)):
            (kept, num_bytes), (lost, _) = (
                trained(optimizer, Compression(wire=wire, share=share, error_feedback=feedback))
                for feedback in (True, False)
            )
            name = f"{wire}, {share:.0%}" if wire == "sparse" else wire
            print(
                f"| {optimizer} | {name} | {num_bytes:.1%} | {kept / exact:.2f} | {lost / exact:.2f} |"
            )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11, help="times that each is measured")
    rounds = parser.parse_args().rounds
    rng = np.random.default_rng(0)
    _print_errors(rng)
    _print_times(rng, rounds)
    _print_losses()


if __name__ == "__main__":
    main()
