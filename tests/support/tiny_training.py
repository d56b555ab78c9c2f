"""A model, a bank and sequences small enough for a step in a few milliseconds."""

from __future__ import annotations

import numpy as np
import torch

from membank.trainer.corpus import PackedSequences
from membank.trainer.model import Anchor, AnchorConfig
from membank.trainer.training import (
    MemoryStageConfig,
    SequenceOrder,
    distinct_blocks,
    leaf_path,
)
from membank.wire.spec import BankSpec, BlockRef, LevelSpec

VOCAB = 32
SEQ_LEN = 12


def tiny_spec() -> BankSpec:
    """Return a bank of 2 + 6 blocks in two partitions."""
    return BankSpec(
        name="tiny",
        num_layers=2,
        width=16,
        levels=(
            LevelSpec(fan_out=2, block_width=2, learning_rate=3e-3),
            LevelSpec(fan_out=3, block_width=3, learning_rate=1e-2),
        ),
        init_std=0.2,
        num_partitions=2,
    )


def tiny_anchor(spec: BankSpec) -> Anchor:
    """Return an untrained anchor that fits the bank; always the same."""
    torch.manual_seed(0)
    config = AnchorConfig(
        num_layers=spec.num_layers,
        width=spec.width,
        num_heads=2,
        head_dim=8,
        ffn_width=24,
        vocab_size=VOCAB,
        init_std=0.2,
    )
    return Anchor(config)


def tiny_sequences(spec: BankSpec) -> PackedSequences:
    """Return 30 sequences of two documents each, five per leaf; each leaf has tokens it likes."""
    rng = np.random.Generator(np.random.PCG64(3))
    leaf_N = np.repeat(np.arange(spec.num_clusters(2)), 5)
    tokens_NT = rng.integers(0, 6, (len(leaf_N), SEQ_LEN)) + 5 * leaf_N[:, None]
    doc_ids_NT = np.zeros((len(leaf_N), SEQ_LEN), np.int32)
    doc_ids_NT[:, SEQ_LEN // 2 :] = 1
    return PackedSequences(
        tokens_NT.astype(np.int32), doc_ids_NT, leaf_N, np.zeros_like(doc_ids_NT)
    )


def expected_versions(
    spec: BankSpec, config: MemoryStageConfig, num_workers: int
) -> dict[BlockRef, int]:
    """Return the version of each block after stage 2: one for each batch that used it."""
    sequences = tiny_sequences(spec)
    versions = dict.fromkeys(spec.blocks(), 0)
    for rank in range(num_workers):
        order = SequenceOrder(
            sequences.leaf_N,
            batch_size=config.batch_size,
            run_length=config.run_length,
            seed=config.seed,
            rank=rank,
            world_size=num_workers,
        )
        for step in range(config.num_steps(sequences.seq_len, num_workers)):
            leaves = sequences.leaf_N[order.rows(step)]
            for ref in distinct_blocks(leaf_path(spec, int(leaf)) for leaf in leaves):
                versions[ref] += 1
    return versions
