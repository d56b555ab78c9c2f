"""What blocks are trained anew on: what remains and nothing else, as often as stage 2 saw it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from membank.trainer.deletion import (
    DeletionConfig,
    Retraining,
    Scope,
    TrainedDocuments,
    plan_deletion,
    plan_retraining,
)
from membank.trainer.run import RunConfig, RunDirectory, load_config
from membank.trainer.training import SequenceOrder, load_sequences
from membank.wire.spec import BlockState
from tiny_run import bank_spec
from tiny_world import World


@pytest.fixture
def config(run: RunDirectory) -> RunConfig:
    return load_config(run)


def _retraining(
    world: World, run: RunDirectory, config: RunConfig, removed: tuple[int, ...], scope: Scope
) -> Retraining:
    spec = bank_spec(run, config)
    tokens = world.tokenizer.encode_batch([document.text for document in world.documents])
    leaf_N = np.array(world.leaves)
    plan = plan_deletion(
        spec,
        TrainedDocuments(leaf_N=leaf_N, num_tokens_N=np.array([len(t) + 1 for t in tokens])),
        removed,
        dict.fromkeys(spec.blocks(), (0, BlockState.ACTIVE)),
        DeletionConfig(scope=scope),
    )
    return plan_retraining(
        plan,
        leaf_N,
        tokens,
        eot_id=world.tokenizer.eot_id,
        run=config,
        run_leaf_N=load_sequences(run.memory_sequences_file).leaf_N,
    )


@pytest.mark.parametrize("scope", Scope)
def test_no_token_of_a_deleted_document_is_trained_on(
    world: World, run: RunDirectory, config: RunConfig, scope: Scope
) -> None:
    sequences = _retraining(world, run, config, (0,), scope).sequences
    sources = set(np.unique(sequences.source_NT).tolist()) - {-1}
    under_topic_0 = {row for row, leaf in enumerate(world.leaves) if leaf in (0, 1)}
    assert sources == under_topic_0 - {0}


def _dealt(leaf_N: np.ndarray[tuple[int], np.dtype[np.int64]], retraining: Retraining) -> float:
    config = retraining.config
    order = SequenceOrder(
        leaf_N, batch_size=config.batch_size, run_length=config.run_length, seed=config.seed
    )
    rows = Counter[int]()
    for step in range(retraining.num_steps):
        rows.update(order.rows(step).tolist())
    return sum(rows.values()) / len(leaf_N)


def test_what_remains_is_seen_as_often_as_stage_2_saw_what_it_trained_on(
    world: World, run: RunDirectory, config: RunConfig
) -> None:
    retraining = _retraining(world, run, config, (0,), Scope.PATHS)
    all_N = load_sequences(run.memory_sequences_file).leaf_N
    whole = Retraining(sequences=load_sequences(run.memory_sequences_file), config=config.stage2)
    assert _dealt(retraining.sequences.leaf_N, retraining) == pytest.approx(
        _dealt(all_N, whole), rel=0.1
    )
    assert retraining.num_steps < whole.num_steps


def test_another_recipe_or_other_documents_have_another_fingerprint(
    world: World, run: RunDirectory, config: RunConfig
) -> None:
    one = _retraining(world, run, config, (0,), Scope.PATHS)
    assert one.fingerprint == _retraining(world, run, config, (0,), Scope.PATHS).fingerprint
    assert one.fingerprint != _retraining(world, run, config, (8,), Scope.PATHS).fingerprint
