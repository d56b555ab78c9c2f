"""Tokens per second of a training step through the service, beside all memory in this process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from membank.bank_service.bench import Row, interleave, rates
from membank.cli.bench.display import Notice
from membank.cli.bench.embedded import EmbeddedService
from membank.cli.bench.presets import SCRATCH_NAME
from membank.client import BankClient, ClientConfig
from membank.trainer.corpus import PackedSequences
from membank.trainer.model import Anchor, AnchorConfig
from membank.trainer.run import RUNS, RunConfig
from membank.trainer.training import (
    InProcessMemory,
    MemorySource,
    MemoryStageConfig,
    PrefetchConfig,
    ServedMemory,
    train_memories,
)
from membank.wire.spec import BankSpec

_RESIDENT_BYTES = 1 << 30
_NUM_SEQUENCES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainScale:
    """How much is trained."""

    num_pairs: int
    """Pairs per row."""
    num_steps: Mapping[str, int]
    """Steps of one sample, by model: a sample of either takes seconds."""


FULL = TrainScale(num_pairs=7, num_steps={"demo": 40, "demo-10x": 8})
"""What results are made with."""
QUICK = TrainScale(num_pairs=1, num_steps={"demo": 3, "demo-10x": 3})
"""Tiny, to show that it works."""


def train_models() -> dict[str, RunConfig]:
    """Return the models that are trained: the demo, and one about ten times as large.

    The larger one has 10 times the demo's parameters in its anchor and in a fetch; tree, batch and
    sequences are the demo's.
    """
    demo = RUNS["demo"]()
    large = AnchorConfig(
        num_layers=6,
        width=256,
        num_heads=8,
        head_dim=32,
        ffn_width=896,
        vocab_size=demo.anchor.vocab_size,
    )
    return {"demo": demo, "demo-10x": replace(demo, anchor=large, block_widths=(20, 60))}


def measure_training(
    name: str,
    num_shards: int,
    scale: TrainScale,
    *,
    folder: Path,
    prefetch: bool,
    seed: int,
    notice: Notice,
) -> Row:
    """Train a model through a service and in this process, in turn.

    Parameters
    ----------
    name
        One of `train_models`.
    num_shards
        Shards of the service, each in a process of its own.
    scale
        How much is trained.
    folder
        Where the bank is made.
    prefetch
        Whether the next batches' blocks are fetched while one is computed.
    seed
        Seed of anchor, sequences and order.
    notice
        Told how far it is.

    Returns
    -------
    Row
        Tokens per second through the service, and with all memory in this process.
    """
    config = train_models()[name]
    spec = replace(config.bank_spec(fingerprint=""), name=SCRATCH_NAME)
    torch.manual_seed(seed)
    anchor = Anchor(config.anchor)
    sequences = random_sequences(spec, config, seed)
    num_steps = scale.num_steps[name]
    num_tokens = num_steps * config.stage2.batch_size * config.seq_len
    stage = replace(config.stage2, num_tokens=num_tokens, seed=seed)
    served_stage = stage if prefetch else replace(stage, prefetch=PrefetchConfig(depth=0))
    row_name = f"train-{name}-{num_shards}-shard{'s' if num_shards > 1 else ''}"
    row_name += "" if prefetch else "-no-prefetch"
    with ExitStack() as stack:
        service = stack.enter_context(
            EmbeddedService(folder, spec, num_shards=num_shards, resident_bytes=_RESIDENT_BYTES)
        )
        client = stack.enter_context(BankClient.connect(service.endpoint, config=ClientConfig()))
        pairs = interleave(
            _trained(anchor, ServedMemory(client), sequences, served_stage),
            # No thread fetches ahead where there is nothing to wait for.
            _trained(
                anchor,
                InProcessMemory(spec),
                sequences,
                replace(stage, prefetch=PrefetchConfig(depth=0)),
            ),
            num_pairs=scale.num_pairs,
            progress=lambda share: notice(row_name, share * scale.num_pairs, scale.num_pairs),
        )
    fetch_params = sum(spec.block_params(level + 1) for level in range(spec.num_levels))
    return Row(
        name=row_name,
        what=f"training an anchor of {config.anchor.num_params} parameters with fetches of "
        f"{fetch_params}, batches of {config.stage2.batch_size} sequences of {config.seq_len} "
        f"tokens, {num_steps} steps: blocks fetched from and gradients pushed to "
        f"{num_shards} shard processes{', fetched ahead' * prefetch} / all blocks and their "
        "optimizer in this process",
        unit="tokens/s",
        target=None,
        samples=rates(pairs, num_tokens),
    )


def _trained(
    anchor: Anchor, source: MemorySource, sequences: PackedSequences, stage: MemoryStageConfig
) -> Callable[[], float]:
    return lambda: train_memories(anchor, source, sequences, stage).seconds


def random_sequences(spec: BankSpec, config: RunConfig, seed: int) -> PackedSequences:
    """Return sequences of random tokens, some topics far more often than others."""
    rng = np.random.Generator(np.random.PCG64([seed, 2]))
    num_leaves = spec.num_clusters(spec.num_levels)
    popularity = 1.0 / np.arange(1, num_leaves + 1)
    ranks_N = rng.choice(num_leaves, _NUM_SEQUENCES, p=popularity / popularity.sum())
    shape = (_NUM_SEQUENCES, config.seq_len)
    return PackedSequences(
        tokens_NT=rng.integers(0, config.anchor.vocab_size, shape, np.int32),
        doc_ids_NT=np.zeros(shape, np.int32),
        leaf_N=rng.permutation(num_leaves)[ranks_N].astype(np.int64),
        source_NT=np.zeros(shape, np.int32),
    )
