"""The directory of a run on the tiny world, as `membank tree` and stage 1 would leave it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from membank.trainer.corpus import Corpus, pack_sequences
from membank.trainer.run import RunConfig, RunDirectory
from membank.trainer.training import (
    AnchorStageConfig,
    MemoryStageConfig,
    PrefetchConfig,
    save_anchor,
    save_sequences,
)
from membank.trainer.tree import TreeConfig, build_tree
from membank.wire.format import TreeDocument
from membank.wire.spec import BankSpec
from tiny_world import World

SEQ_LEN = 24


def make_tiny_run(
    folder: Path, world: World, *, stage2_tokens: int = 40 * 4 * SEQ_LEN
) -> RunDirectory:
    """Write a run whose anchor is untrained and whose leaves are those of the world."""
    run = RunDirectory(folder)
    folder.mkdir(parents=True)
    corpus = folder / "corpus.jsonl"
    corpus.write_text(
        "".join(
            json.dumps({"id": d.doc_id, "text": d.text, "embed_text": d.embed_text}) + "\n"
            for d in world.documents
        )
    )
    levels = world.spec.levels
    config = RunConfig(
        name=world.spec.name,
        corpus=str(corpus),
        vocab_size=world.tokenizer.vocab_size,
        seq_len=SEQ_LEN,
        anchor=world.anchor.config,
        tree=TreeConfig(fan_outs=tuple(level.fan_out for level in levels)),
        block_widths=tuple(level.block_width for level in levels),
        learning_rates=tuple(level.learning_rate for level in levels),
        generic_learning_rate=1e-2,
        init_std=world.spec.init_std,
        stage1=AnchorStageConfig(num_tokens=1),
        stage2=MemoryStageConfig(
            num_tokens=stage2_tokens, batch_size=4, run_length=2, prefetch=PrefetchConfig(depth=0)
        ),
        num_partitions=4,
    )
    run.write_json(run.config_file, config.to_json())
    run.write_json(run.leaves_file, list(world.leaves))
    world.tokenizer.save(run.tokenizer_file)
    run.save_tree(tiny_tree(world))
    save_anchor(run.anchor_file, world.anchor)
    tokens = world.tokenizer.encode_batch([document.text for document in world.documents])
    save_sequences(
        run.memory_sequences_file,
        pack_sequences(
            tokens, seq_len=SEQ_LEN, eot_id=world.tokenizer.eot_id, leaves=np.array(world.leaves)
        ),
    )
    return run


def tiny_tree(world: World) -> TreeDocument:
    """Return a tree document fitted on the world; its leaves need not be those of the world."""
    corpus = Corpus(name="tiny", documents=world.documents, facts=world.facts)
    return build_tree(corpus, TreeConfig(fan_outs=(2, 2))).document()


def bank_spec(run: RunDirectory, config: RunConfig) -> BankSpec:
    """Return the spec of the run's bank, bound to its anchor and tokenizer."""
    return replace(config.bank_spec(fingerprint=run.fingerprint()), bank_id="tiny-1")
